"""The sampler that people run: vLLM, in this process, on a CPU or a GPU.

In-process, because a benchmark must read the dtypes of the live engine and load weights into it. Chunked prefill is off
on a CPU: with it, per-request seeds crash there ("CPU Generator does not use offset").
"""

from __future__ import annotations

import gc
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

from suite.engines.batch import Request, Rollout, empty_rollout, response_room
from suite.engines.samplers.load import weights_format
from suite.engines.world import ensure_group, keeping_the_group
from suite.spec.precision import CACHE_FORMATS, FORMATS, NATIVE, dtype_name

IN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
# fp32 products of Triton kernels, attention among them, are TF32 on NVIDIA GPUs unless this says otherwise (triton/knobs.py,
# language/core.py of 3.9: dot). Read when a kernel is compiled; a value that is set already stays.
FP32_DOT, FP32_DOT_EXACT = "TRITON_F32_DEFAULT", "ieee"
DEFAULT_CACHE_GIB = 1.0


class VllmSampler:
    """One vLLM engine with one model in one precision. Units: log-probs in nats, lengths in tokens, cache in GiB."""

    engine = "vllm"

    def __init__(self, model_path: Path, rollout: dict, precision: str, stop_token_ids: list[int], kv_cache: str | None = None,
                 head: str | None = None):
        os.environ.update(IN_PROCESS)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        on_gpu = torch.cuda.is_available()
        cache_gib = rollout.get("kv_cache_gib") or (None if on_gpu else DEFAULT_CACHE_GIB)
        if cache_gib and not on_gpu:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(cache_gib)))
        if on_gpu and FORMATS[precision].storage == "fp32":
            os.environ.setdefault(FP32_DOT, FP32_DOT_EXACT)
        from vllm import LLM

        ensure_group()  # or vLLM makes one of its own kind, without gloo on a GPU
        self._rollout, self._precision, self._stop_token_ids = rollout, precision, list(stop_token_ids)
        self._logits_dtype: torch.dtype | None = None
        arguments = _engine_arguments(rollout, cache_gib, on_gpu)
        if kv_cache in CACHE_FORMATS:
            arguments["kv_cache_dtype"] = kv_cache
        if head not in (None, FORMATS[precision].storage):  # both operands are cast before the product of the head
            arguments["hf_overrides"] = {"head_dtype": FORMATS[head].torch_name}
        self._llm = LLM(str(model_path), dtype=FORMATS[precision].torch_name, **arguments)
        self._runner = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self._watch_logits()

    def _watch_logits(self) -> None:
        """Note the dtype in which the model hands over its logits, from a call that happens anyway."""
        model = self._runner.model
        compute = model.compute_logits

        def compute_and_note(*args, **kwargs):
            logits = compute(*args, **kwargs)
            self._logits_dtype = self._logits_dtype or logits.dtype
            return logits

        model.compute_logits = compute_and_note

    def sample(self, requests: list[Request]) -> list[Rollout]:
        fitting = [request for request in requests if self._room(request) > 0]
        prompts = [{"prompt_token_ids": list(request.prompt_token_ids)} for request in fitting]
        outputs = self._llm.generate(prompts, [self._params(request) for request in fitting], use_tqdm=False)
        sampled = iter(outputs)
        return [
            _rollout(request, next(sampled).outputs[0]) if self._room(request) > 0 else empty_rollout(request)
            for request in requests
        ]

    def _params(self, request: Request):
        from vllm import SamplingParams

        rollout, stop = self._rollout, list(self._rollout.get("stop") or ())
        return SamplingParams(
            temperature=rollout["temperature"], top_p=rollout["top_p"], top_k=rollout.get("top_k") or 0,
            max_tokens=self._room(request), seed=request.seed, logprobs=1, flat_logprobs=True,
            stop_token_ids=self._stop_token_ids, stop=stop, detokenize=bool(stop),
        )  # fmt: skip

    def _room(self, request: Request) -> int:
        return response_room(request, self._rollout)

    def score(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray]:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        prompts = [{"prompt_token_ids": tokens} for tokens, _ in sequences]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [
            np.array([output.prompt_logprobs[t][tokens[t]].logprob for t in range(num_prompt, len(tokens))], np.float32)
            for output, (tokens, num_prompt) in zip(outputs, sequences, strict=True)
        ]

    def distributions(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray]:
        from vllm import SamplingParams

        size = self._llm.llm_engine.model_config.get_vocab_size()
        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=size, flat_logprobs=True, detokenize=False)
        outputs = self._llm.generate([{"prompt_token_ids": tokens} for tokens, _ in sequences], params, use_tqdm=False)
        return [
            np.stack([_dense_row(output.prompt_logprobs, t, size) for t in range(num_prompt, len(tokens))])
            for output, (tokens, num_prompt) in zip(outputs, sequences, strict=True)
        ]

    def expert_choices(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray] | None:
        """Read from the outputs of the gates while the sequences are pre-filled; on a GPU, where graphs run no hooks, and
        of a model without gates: None."""
        gates = [module for name, module in self._runner.model.named_modules() if name.endswith("mlp.gate")]
        if not gates or torch.cuda.is_available():
            return None
        if not sequences:
            return []
        k = self._llm.llm_engine.model_config.hf_config.num_experts_per_tok
        seen: list[list[np.ndarray]] = [[] for _ in gates]
        token_ids: list[np.ndarray] = []

        def note_tokens(module, args, kwargs):
            token_ids.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).cpu().numpy().copy())

        def note(module, args, output, layer):
            logits = output[0] if isinstance(output, tuple) else output
            seen[layer].append(logits.float().topk(k, dim=-1).indices.sort(dim=-1).values.cpu().numpy())

        hooks = [gate.register_forward_hook(partial(note, layer=layer)) for layer, gate in enumerate(gates)]
        hooks.append(self._runner.model.register_forward_pre_hook(note_tokens, with_kwargs=True))
        try:
            self.score(sequences)
        finally:
            for hook in hooks:
                hook.remove()
        fed = np.concatenate(token_ids)
        if fed.tolist() != [token for tokens, _ in sequences for token in tokens]:
            raise RuntimeError("vLLM did not pre-fill the sequences one after the other: whose experts these are is not known")
        choices = np.stack([np.concatenate(layer) for layer in seen], axis=1)  # (all tokens, layers, k)
        return np.split(choices, np.cumsum([len(tokens) for tokens, _ in sequences])[:-1])

    def load_weights(self, named_tensors, repair: bool = True) -> None:
        """Replace the engine's weights by (checkpoint name, tensor) pairs; repair=False only to show what a reload
        without the repair leaves behind. sync.prove_sync is what says whether they arrived."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self._llm.llm_engine.vllm_config):  # what sets up kernels of experts again asks for it
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named_tensors)})
        if repair and not torch.cuda.is_available():
            _repack(self._runner.model)
        if self._rollout["prefix_caching"] and not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its prefix cache: rollouts would go on from keys of the old weights")

    def executed(self) -> dict[str, str]:
        parameters = list(self._runner.model.parameters())
        biases = {dtype_name(p.dtype) for p in parameters if p.dim() <= 1}  # vLLM keeps bf16 biases in fp32 on a CPU
        return {
            "rollout_weights": weights_format([p for p in parameters if p.dim() > 1], self._precision),
            "rollout_vectors": "+".join(sorted(biases)),
            "kv_cache": self._cache_format(),
            "rollout_logits": dtype_name(self._logits_dtype) if self._logits_dtype else "not sampled yet",
            "sampler_engine": "vllm",
            "sampler_attention": self._runner.attn_groups[0][0].backend.get_name(),
            "sampler_products": _products(self._runner.model),
            "sampler_fp32_dot": os.environ.get(FP32_DOT, "default"),
            "sampler_runner": f"{type(self._runner).__module__}.{type(self._runner).__name__}",
        }

    def _cache_format(self) -> str:
        """That of the live cache; of one that is held as bytes, what the attention layers read the bytes as."""
        dtypes = {cache.dtype for cache in self._runner.kv_caches}
        if dtypes != {torch.uint8}:
            return "+".join(sorted(map(dtype_name, dtypes)))
        layers = self._runner.compilation_config.static_forward_context.values()
        return "+".join(sorted({layer.impl.kv_cache_dtype for layer in layers if hasattr(layer, "impl")}))

    def close(self) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        with keeping_the_group():  # which is the trainer's too
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = self._runner = None
            cleanup_dist_env_and_memory()
        gc.collect()


def _products(model: torch.nn.Module) -> str:
    """Which kernel forms the products of the linear layers: on a CPU vLLM picks one by dtype and shape, and keeps a
    function that calls it."""
    chosen = {getattr(module, "cpu_linear", None) for module in model.modules()} - {None}
    names = {function.__code__.co_names[-1] if hasattr(function, "__code__") else function.__name__ for function in chosen}
    return "+".join(sorted(names)) or NATIVE


def _dense_row(flat, position: int, size: int) -> np.ndarray:
    """(V,) float32: all log-probs of one position of vLLM's flat list, by token id."""
    listed = slice(flat.start_indices[position], flat.end_indices[position])
    row = np.full(size, -np.inf, np.float32)
    row[flat.token_ids[listed]] = flat.logprobs[listed]
    return row


def _repack(model: torch.nn.Module) -> None:
    """Pack again what a reload on a CPU leaves in the old packing: output heads that share their weight with the
    embedding, and MoE experts (vLLM 0.32)."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        kernel = getattr(method, "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)
        elif hasattr(module, "cpu_linear") and module.weight.numel():  # kept its plain weight: can be packed again
            method.process_weights_after_loading(module)


def _engine_arguments(rollout: dict, cache_gib: float | None, on_gpu: bool) -> dict:
    arguments = {
        "skip_tokenizer_init": not rollout.get("stop"),  # strings are looked for in text
        "enforce_eager": rollout["enforce_eager"],
        "enable_prefix_caching": rollout["prefix_caching"],
        "enable_chunked_prefill": rollout["chunked_prefill"],
        "max_logprobs": -1,  # no cap: `distributions` asks for the whole vocabulary
        "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from, temperature included
        "max_model_len": rollout.get("max_model_len"),
        "max_num_seqs": rollout.get("max_num_seqs"),
        "max_num_batched_tokens": rollout.get("max_num_batched_tokens"),
        "attention_backend": rollout.get("attention_backend"),
        "seed": rollout.get("seed") or 0,
        "disable_log_stats": True,
        "load_format": "auto",
        "trust_remote_code": False,
    }
    if on_gpu:  # the CPU backend has no cascade attention, and 0.32 dropped the flag
        arguments["disable_cascade_attn"] = not rollout["cascade_attention"]
    if on_gpu and cache_gib:
        arguments["kv_cache_memory_bytes"] = int(cache_gib * 2**30)
    if rollout.get("gpu_memory_utilization"):
        arguments["gpu_memory_utilization"] = rollout["gpu_memory_utilization"]
    return {name: value for name, value in arguments.items() if value is not None}


def _rollout(request: Request, completion) -> Rollout:
    logprobs = np.array(completion.logprobs.logprobs, np.float32)
    tokens = list(completion.token_ids)
    per_position = np.array(completion.logprobs.start_indices)
    # position t lists the sampled token first, and with logprobs=1 the most probable one after it
    listed = np.array(completion.logprobs.token_ids)
    return Rollout(request, tokens, logprobs[per_position], completion.finish_reason, listed[per_position + 1].tolist())
