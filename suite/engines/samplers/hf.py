"""A slow, plain reference sampler: a transformers model, its KV cache, and one categorical draw per token."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from suite.engines.arithmetic import arithmetic_for, experts_for, torch_dtype
from suite.engines.batch import Request, Rollout, empty_rollout, response_room
from suite.engines.samplers.load import weights_format
from suite.spec.defaults import default
from suite.spec.precision import dtype_name

DEFAULT_MAX_NUM_SEQS = default("rollout.max_num_seqs")


class HfSampler:
    """Samples batches of requests of equal prompt length, so that no padding ever enters the cache."""

    engine = "hf"

    def __init__(self, model_path: Path, rollout: dict, precision: str, stop_token_ids: list[int]):
        from transformers import AutoModelForCausalLM

        self._rollout, self._precision, self._stop = rollout, precision, set(stop_token_ids)
        self._strings = StopStrings(model_path, rollout["stop"]) if rollout.get("stop") else None
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch_dtype(precision), trust_remote_code=False, **experts_for(self._device)
        )
        self._model = self._model.eval().to(self._device)
        self.arithmetic, self._products = arithmetic_for(self._device, torch_dtype(precision))
        self._cache_dtype = self._logits_dtype = None

    @torch.inference_mode()
    def sample(self, requests: list[Request]) -> list[Rollout]:
        by_length: dict[tuple[int, int], list[int]] = {}
        for index, request in enumerate(requests):
            if (room := response_room(request, self._rollout)) > 0:
                by_length.setdefault((len(request.prompt_token_ids), room), []).append(index)
        size = self._rollout.get("max_num_seqs") or DEFAULT_MAX_NUM_SEQS
        rollouts = [empty_rollout(request) for request in requests]
        with self._products():
            for indices in by_length.values():
                for start in range(0, len(indices), size):
                    batch = indices[start : start + size]
                    for index, rollout in zip(batch, self._sample_batch([requests[i] for i in batch]), strict=True):
                        rollouts[index] = rollout
        return rollouts

    def _sample_batch(self, requests: list[Request]) -> list[Rollout]:
        """One token per sequence and turn; a finished sequence leaves the batch, and its rows leave the cache."""
        generators = [np.random.default_rng(request.seed) for request in requests]
        tokens: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        likeliest: list[list[int]] = [[] for _ in requests]
        reasons = ["length"] * len(requests)
        alive = list(range(len(requests)))
        inputs = torch.tensor([request.prompt_token_ids for request in requests], device=self._device)
        cache = None
        for _ in range(response_room(requests[0], self._rollout)):
            output = self._model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            self._cache_dtype, self._logits_dtype = cache.layers[0].keys.dtype, output.logits.dtype
            distribution = self._log_probs(output.logits[:, -1])  # (B, V) float32
            uniforms = [generators[row].random() for row in alive]
            chosen = _categorical(distribution, torch.tensor(uniforms, device=self._device, dtype=torch.float64))
            picked = distribution.gather(1, chosen[:, None])[:, 0]
            first = distribution.argmax(-1)
            for row, token, logprob, top in zip(alive, chosen.tolist(), picked.tolist(), first.tolist(), strict=True):
                tokens[row].append(token)
                logprobs[row].append(logprob)
                likeliest[row].append(top)
                ended = token in self._stop or (self._strings is not None and self._strings.end(tokens[row]))
                reasons[row] = "stop" if ended else "length"
            keep = [place for place, row in enumerate(alive) if reasons[row] != "stop"]
            if not keep:
                break
            if len(keep) < len(alive):
                index = torch.tensor(keep, device=self._device)
                cache.batch_select_indices(index)
                chosen = chosen[index]
                alive = [alive[place] for place in keep]
            inputs = chosen[:, None]
        rows = zip(requests, tokens, logprobs, reasons, likeliest, strict=True)
        return [Rollout(q, t, np.array(p, np.float32), reason, top) for q, t, p, reason, top in rows]

    def _log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """log mu in fp32 of the distribution that is sampled from: temperature, then top-k and top-p. (B, V) -> (B, V)"""
        logits = logits.float()
        temperature, top_k, top_p = (self._rollout.get(name) for name in ("temperature", "top_k", "top_p"))
        if temperature == 0:
            greedy = torch.full_like(logits, -torch.inf)
            return greedy.scatter(1, logits.argmax(-1, keepdim=True), 0.0)
        logits = logits / temperature
        if top_k:
            kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if top_p is not None and top_p < 1:
            ordered, order = logits.softmax(-1).sort(-1, descending=True)
            outside = (ordered.cumsum(-1) - ordered >= top_p).scatter(1, order, ordered.cumsum(-1) - ordered >= top_p)
            logits = logits.masked_fill(outside, -torch.inf)
        return torch.log_softmax(logits, dim=-1)

    @torch.inference_mode()
    def distributions(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray]:
        with self._products():
            return [
                self._log_probs(self._model(input_ids=torch.tensor([tokens], device=self._device)).logits[0, num_prompt - 1 : -1])
                .cpu()
                .numpy()
                for tokens, num_prompt in sequences
            ]

    def score(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray]:
        rows = zip(self.distributions(sequences), sequences, strict=True)
        return [np.take_along_axis(full, np.array([tokens[n:]], dtype=np.int64).T, 1)[:, 0] for full, (tokens, n) in rows]

    @torch.inference_mode()
    def expert_choices(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray] | None:
        gates = [module for name, module in self._model.named_modules() if name.endswith("mlp.gate")]
        if not gates:
            return None
        layers: list[torch.Tensor] = []  # (T, k) each, of one sequence
        note = lambda gate, args, output: layers.append(output[2].sort(-1).values)  # noqa: E731
        hooks, found = [gate.register_forward_hook(note) for gate in gates], []
        try:
            with self._products():
                for tokens, _ in sequences:
                    layers.clear()
                    self._model.base_model(input_ids=torch.tensor([tokens], device=self._device), use_cache=False)
                    found.append(torch.stack(layers, dim=1).cpu().numpy())
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @torch.no_grad()
    def load_weights(self, named_tensors) -> None:
        parameters = dict(self._model.named_parameters())
        for name, tensor in named_tensors:
            _place(parameters, name).copy_(tensor)

    def executed(self) -> dict[str, str]:
        return {
            "rollout_weights": weights_format(self._model.parameters(), self._precision),
            "kv_cache": dtype_name(self._cache_dtype) if self._cache_dtype else "not sampled yet",
            "rollout_logits": dtype_name(self._logits_dtype) if self._logits_dtype else "not sampled yet",
            "sampler_engine": "hf",
            "sampler_attention": self._model.config._attn_implementation,
            "sampler_products": self.arithmetic,
        }

    def close(self) -> None:
        self._model = None


EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def _place(parameters: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Where the checkpoint's tensor `name` is held: transformers 5 keeps a layer's experts in two parameters, (experts, gate
    rows then up rows, H) and (experts, H, width)."""
    expert = EXPERT.fullmatch(name)
    if not expert or name in parameters:
        return parameters[name]
    layer, number, kind = expert.groups()
    if kind == "down":
        return parameters[f"{layer}.down_proj"][int(number)]
    return parameters[f"{layer}.gate_up_proj"][int(number)].chunk(2)[kind == "up"]


class StopStrings:
    """Whether the last token of a response completes one of some strings."""

    def __init__(self, model_path: Path, strings):
        from transformers import AutoTokenizer

        self._tokenizer, self._strings = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False), tuple(strings)
        self._tail = max(map(len, strings)) * 4  # tokens that can reach into the longest one: at most 4 bytes a character

    def end(self, tokens: list[int]) -> bool:
        text = self._tokenizer.decode(tokens[-self._tail :], skip_special_tokens=True)
        return any(string in text for string in self._strings)


def _categorical(log_probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse transform sampling: (B, V) log-probs and (B,) uniforms in [0, 1) -> (B,) token ids."""
    cumulative = log_probs.double().exp().cumsum(-1)
    return torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]
