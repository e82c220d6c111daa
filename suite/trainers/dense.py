"""The dense trainer: a transformers model, with peft's adapters if asked, whose forward and backward run in one compute dtype, with fp32 masters behind.

Compute parameters are in the compute dtype, as FSDP2 casts them with `param_dtype`; on a CPU the 16-bit products go
through arithmetic.RoundedProducts. Log-probs are taken in fp32 from the logits of the response positions alone, a
bounded number of them at a time, so that peak memory does not grow with batch x length x vocabulary.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from suite.algorithms import Algorithm
from suite.arithmetic import arithmetic_for
from suite.batch import MiniBatch, pad_sequences
from suite.errors import UserError
from suite.losses import LossStatistics, policy_loss
from suite.precision import Precision, dtype_name, torch_dtype
from suite.ranks import Ranks, ReplicaError
from suite.trainers.health import ActivationWatch, underflow_share
from suite.trainers.lora import add_adapters, merged_weights
from suite.trainers.loss_scale import LossScaler
from suite.trainers.masters import MasterWeights

# Logits at a time, where train.head_chunk_tokens does not say how many tokens: 256 MiB in fp32, whatever the vocabulary.
DEFAULT_HEAD_CHUNK_LOGITS = 2**26
DEFAULT_MICRO_BATCH_SIZE = 32


class DenseTrainer:
    """One model in one compute dtype. `score` gives log pi in nats, with the batch shape that train.score_batch_size fixes;
    `update` takes one gradient step, together with the trainers of the other `ranks`. A trainer without train.optimizer only
    scores, and holds no masters. With train.lora the adapters alone are trained; `seed` draws what they start from.
    """

    def __init__(self, model_path: Path, train: dict, precision: dict, temperature: float, seed: int = 0,
                 ranks: Ranks = Ranks()):
        asked = Precision.of(precision)
        self._train, self._temperature, self._ranks = train, temperature, ranks
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype, self._head_dtype = torch_dtype(asked.train), torch_dtype(asked.trainer_head)
        self._can_train = train.get("optimizer") is not None
        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch.float32 if self._can_train else self._dtype,
            attn_implementation=train.get("attention") or "sdpa",
        )  # fmt: skip
        self._model = model.eval().to(self._device)
        self.arithmetic, self._products = arithmetic_for(self._device, self._dtype)
        self._logits_dtype: torch.dtype | None = None
        self._checkpoint_dtype = _dtype_on_disk(Path(model_path))
        if train.get("perturb"):
            self._perturb(**train["perturb"])
        if self._can_train:
            if train.get("lora"):
                add_adapters(self._model, train["lora"], seed)
            named = dict(self._model.named_parameters())
            self._frozen = {name: p for name, p in named.items() if not p.requires_grad}  # of a base with adapters
            for parameter in self._frozen.values():
                parameter.data = parameter.data.to(self._dtype)
            trained = {name: p for name, p in named.items() if name not in self._frozen}
            self.masters = MasterWeights(trained, self._dtype, train["optimizer"])
            scaling = precision.get("loss_scaling") or {"enabled": False}
            self.scaler = LossScaler(**scaling)
            self._watch = ActivationWatch(self._model.base_model.layers)
            if train.get("gradient_checkpointing"):
                self._model.gradient_checkpointing_enable(self._checkpointing())

    def _perturb(self, parameter: str, scale: float) -> None:
        """Scale one parameter on purpose: the control that a working measurement must catch."""
        parameters = dict(self._model.named_parameters())
        if parameter not in parameters:
            known = ", ".join(sorted(parameters)[:6])
            raise UserError(f"train.perturb.parameter: found {parameter!r}, allowed: a parameter of the model ({known}, ...)")
        with torch.no_grad():
            parameters[parameter].mul_(scale)

    def score(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray]:
        """log pi of each response token, teacher-forced; sequences of like length share a forward of fixed row count."""
        return self._score(sequences, self._chunk_logprobs)

    def score_and_entropy(self, sequences: list[tuple[list[int], int]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The log-probs of `score`, and the entropy of pi at each of those positions, nats."""
        both = self._score(sequences, self._chunk_logprobs_and_entropies)
        return [one[0] for one in both], [one[1] for one in both]

    @torch.inference_mode()
    def _score(self, sequences: list[tuple[list[int], int]], chunk) -> list[np.ndarray]:
        size = self._train["score_batch_size"]
        order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i][0]), i))
        scores: list[np.ndarray | None] = [None] * len(sequences)
        with self._products():
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                for index, score in zip(batch, self._score_batch([sequences[i] for i in batch], size, chunk), strict=True):
                    scores[index] = score
        return scores

    def _score_batch(self, sequences: list[tuple[list[int], int]], num_rows: int, chunk) -> list[np.ndarray]:
        padded = pad_sequences(sequences, num_rows)
        token_ids = torch.from_numpy(padded.token_ids).to(self._device)
        wanted = torch.from_numpy(padded.response_mask).to(self._device)
        scores = self._over_response(token_ids, wanted, chunk).cpu().numpy()
        counts = [len(tokens) - num_prompt for tokens, num_prompt in sequences]
        return np.split(scores, np.cumsum(counts)[:-1], axis=-1)

    @torch.inference_mode()
    def distributions(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray]:
        """log pi of the whole vocabulary at every response position: (T_response, V) float32 nats each; small V only."""
        full = []
        with self._products():
            for tokens, num_prompt in sequences:
                inputs = torch.tensor([tokens], device=self._device)
                hidden = self._model.base_model(input_ids=inputs, use_cache=False).last_hidden_state[0, num_prompt - 1 : -1]
                full.append(torch.log_softmax(self._logits(hidden), -1).cpu().numpy())
        return full

    def _over_response(self, token_ids: torch.Tensor, wanted: torch.Tensor, chunk) -> torch.Tensor:
        """(B, T) ids and mask -> (..., N) float32: what `chunk` makes of the masked tokens, row by row."""
        hidden = self._model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state  # (B, T, H)
        before = hidden[:, :-1][wanted[:, 1:]]  # (N, H): the states that predict the response tokens
        return self._in_chunks(before, token_ids[wanted], chunk)

    def token_logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(N, H) states and (N,) token ids -> (N,) float32 log-probs."""
        return self._in_chunks(hidden, targets, self._chunk_logprobs)

    def _in_chunks(self, hidden: torch.Tensor, targets: torch.Tensor, chunk) -> torch.Tensor:
        """`chunk` of `head_chunk_tokens` states and tokens at a time; with gradients each chunk's logits are made again in
        the backward pass instead of being kept."""
        vocabulary = self._model.get_output_embeddings().weight.shape[0]
        size = self._train.get("head_chunk_tokens") or max(64, DEFAULT_HEAD_CHUNK_LOGITS // vocabulary)
        parts = list(zip(hidden.split(size), targets.split(size), strict=True))
        if len(parts) == 1 or not torch.is_grad_enabled():
            return torch.cat([chunk(*part) for part in parts], dim=-1)
        return torch.cat([checkpoint(chunk, *part, **self._checkpointing()) for part in parts], dim=-1)

    def _checkpointing(self) -> dict:
        """Options of torch's checkpoint: a forward repeated in the backward pass needs the mode of its own, since the
        one around it is switched off while autograd runs."""
        return {"use_reentrant": False, "context_fn": lambda: (nullcontext(), self._products())}

    def _chunk_logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self._logits(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def _chunk_logprobs_and_entropies(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logprobs = self._logits(hidden).log_softmax(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)  # logits are finite, so log-probs are: no 0 x inf
        return torch.stack([logprobs.gather(1, targets[:, None])[:, 0], entropies])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, H) -> (N, V) fp32 logits at the task's temperature, from a head product in the head's dtype."""
        head = self._model.get_output_embeddings()
        if self._head_dtype == self._dtype:
            logits = head(hidden)
        else:
            logits = torch.nn.functional.linear(hidden.to(self._head_dtype), head.weight.to(self._head_dtype))
        self._logits_dtype = logits.dtype
        logits = logits.float()
        return logits if self._temperature in (0, 1) else logits / self._temperature

    def update(self, batch: MiniBatch, algorithm: Algorithm) -> dict[str, float]:
        """One gradient step on a mini-batch: forward and backward in micro-batches, shared out over the ranks, then add up,
        unscale, check, clip, step.

        Returns the metrics of the step, named as in metrics.jsonl. A loss or gradient that is not finite skips the step.
        Rows without any advantage have a gradient of exactly 0, which says nothing about underflow: a micro-batch of such
        rows does not count towards its share, and a mini-batch of them reports none. Raises ReplicaError if the ranks
        took different steps.
        """
        size = self._train.get("micro_batch_size") or DEFAULT_MICRO_BATCH_SIZE
        order = sorted(range(len(batch.sequences)), key=lambda i: (len(batch.sequences[i][0]), i))
        parts = self._ranks.share([order[start : start + size] for start in range(0, len(order), size)])
        self._model.train(bool(self._train.get("gradient_checkpointing")))  # transformers recomputes in this mode alone
        with self._products(), self._watch:
            done = [self._backward(batch.rows(part), algorithm, batch) for part in parts]
        self._model.eval()
        done = [one for share in self._ranks.gather(done) for one in share]
        report = {
            "loss": sum(loss for loss, _, _ in done),
            "activation_max_abs": float(np.max(self._ranks.gather(self._watch.largest))),  # nan, if one is
        }
        underflow = [pair for _, _, pair in done if pair]
        if underflow:
            shares, num_rows = zip(*underflow)
            report["grad_underflow_share"] = float(np.average(shares, weights=num_rows))
        self._ranks.add_up(self.masters.gradients() if self._ranks.size > 1 else [])
        stepped = self.masters.step(self.scaler, self._train.get("grad_clip"))
        if self._ranks.size > 1:
            self._check_replicas(stepped["grad_norm"])
        return report | reduce(add, (statistics for _, statistics, _ in done)).metrics() | stepped

    def _check_replicas(self, grad_norm: float) -> None:
        """Every rank must have taken the same step and hold the same masters. Raises ReplicaError."""
        checksum = sum(master.detach().double().sum().item() for master in self.masters.masters.values())
        found = {repr(pair) for pair in self._ranks.gather((grad_norm, checksum))}
        if len(found) > 1:
            raise ReplicaError(f"the trainers of the ranks have come apart: (gradient norm, sum of weights) {', '.join(sorted(found))}")

    def _backward(self, rows: MiniBatch, algorithm: Algorithm, batch: MiniBatch):
        """Gradients of one micro-batch of `batch` into the masters. Returns its loss, its statistics, and (share of the
        gradients that underflowed, rows) if any row has an advantage."""
        output = self._loss(rows, algorithm, len(batch.sequences), batch.num_response_tokens)
        self.scaler.scale(output.loss).backward()
        underflow = (underflow_share(self._model), len(rows.sequences)) if rows.advantages.any() else None
        self.masters.collect()
        return output.loss.item(), output.statistics, underflow

    def _loss(self, rows: MiniBatch, algorithm: Algorithm, num_sequences: int, num_tokens: int):
        padded = pad_sequences(rows.sequences, len(rows.sequences))
        token_ids = torch.from_numpy(padded.token_ids).to(self._device)
        mask = torch.from_numpy(padded.response_mask).to(self._device)

        def spread(values: torch.Tensor) -> torch.Tensor:  # (N,) -> (B, T), 0 outside the mask
            return torch.zeros(mask.shape, dtype=values.dtype, device=self._device).masked_scatter(mask, values)

        given = [rows.old_trainer_logprobs, rows.rollout_logprobs]
        old, rollout = (spread(torch.from_numpy(np.concatenate(arrays)).to(self._device)) for arrays in given)
        return policy_loss(
            algorithm, spread(self._over_response(token_ids, mask, self._chunk_logprobs)), old, rollout, mask,
            torch.from_numpy(rows.advantages).to(self._device),
            num_sequences=num_sequences, num_tokens=num_tokens, length_norm=rows.length_norm,
        )  # fmt: skip

    def named_weights(self, dtype: torch.dtype):
        """(name, tensor) of every parameter as the checkpoint names them, rounded to `dtype` from the fp32 masters; of a
        model with adapters the merged weights."""
        masters = self.masters.masters
        whole = merged_weights(self._model, masters) if self._train.get("lora") else masters.items()
        rounded = {name: weight.detach().to(dtype) for name, weight in whole}
        yield from revert_weight_conversion(self._model, rounded).items()  # transformers 5 fuses experts; checkpoints do not

    @contextmanager
    @torch.no_grad()
    def moved_weights(self, move):
        """Inside the context the masters, and a frozen base, are changed by `move(named weights)`; afterwards they are what
        they were."""
        weights = self.masters.masters | self._frozen
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        move(weights.items())
        self.masters.round()
        try:
            yield
        finally:
            for name, weight in weights.items():
                weight.copy_(kept[name])
            self.masters.round()

    def state_dict(self) -> dict:
        return {"masters": self.masters.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.masters.load_state_dict(state["masters"])
        self.scaler.load_state_dict(state["scaler"])

    def executed(self) -> dict[str, str]:
        """Dtypes of the live tensors; `optimizer_state` and `gradient_reduction` once a step was taken."""
        points = {
            "checkpoint": self._checkpoint_dtype,
            "compute": _dtypes(self._model.parameters()),
            "trainer_head": dtype_name(self._logits_dtype) if self._logits_dtype else "not scored yet",
            "arithmetic": self.arithmetic,
            "trainer_attention": self._model.config._attn_implementation,
        }
        if self._can_train:
            if lora := self._train.get("lora"):
                points["trainer_adapters"] = f"lora, rank {lora['rank']}, alpha {lora['alpha']}; merged in fp32 for the sampler"
            points["master_weights"] = _dtypes(self.masters.masters.values())
            moments = [state["exp_avg"] for state in self.masters.optimizer.state.values()]
            points |= {"optimizer_state": _dtypes(moments)} if moments else {}
            if self.masters.gradient_dtypes:
                points["gradient_reduction"] = "+".join(sorted(self.masters.gradient_dtypes))
        return points

    def close(self) -> None:
        """Give the memory of model, masters and optimizer back."""
        self._model = self.masters = None


def _dtypes(tensors) -> str:
    return "+".join(sorted({dtype_name(tensor.dtype) for tensor in tensors}))


def _dtype_on_disk(model_path: Path) -> str:
    """The dtype of the weights in the checkpoint file, read from its header."""
    from safetensors import safe_open

    names = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
    found = set()
    for file in sorted(model_path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {names.get(d := tensors.get_slice(key).get_dtype(), d) for key in tensors.keys()}
    return "+".join(sorted(found)) or "unknown"
