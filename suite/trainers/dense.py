"""The dense trainer: a transformers model whose forward and backward run in one compute dtype.

Compute parameters are in the compute dtype, as FSDP2 casts them with `param_dtype`; on a CPU the 16-bit products go
through arithmetic.RoundedProducts. Log-probs are taken in fp32 from the logits of the response positions alone, a few
hundred positions at a time, so that peak memory does not grow with batch x length x vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from suite.arithmetic import arithmetic_for
from suite.batch import pad_sequences
from suite.errors import UserError
from suite.precision import Precision, dtype_name, torch_dtype

DEFAULT_HEAD_CHUNK_TOKENS = 512


class DenseTrainer:
    """One model in one compute dtype. `score` gives log pi in nats; batch shape is fixed by train.score_batch_size."""

    def __init__(self, model_path: Path, train: dict, precision: dict, temperature: float):
        from transformers import AutoModelForCausalLM

        asked = Precision.of(precision)
        self._train, self._temperature = train, temperature
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype, self._head_dtype = torch_dtype(asked.train), torch_dtype(asked.trainer_head)
        attention = train.get("attention") or "sdpa"
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=self._dtype, attn_implementation=attention)
        self._model = model.eval().to(self._device)
        self.arithmetic, self._products = arithmetic_for(self._device, self._dtype)
        self._logits_dtype: torch.dtype | None = None
        self._checkpoint_dtype = _dtype_on_disk(Path(model_path))
        if train.get("perturb"):
            self._perturb(**train["perturb"])

    def _perturb(self, parameter: str, scale: float) -> None:
        """Scale one parameter on purpose: the control that a working measurement must catch."""
        parameters = dict(self._model.named_parameters())
        if parameter not in parameters:
            known = ", ".join(sorted(parameters)[:6])
            raise UserError(f"train.perturb.parameter: found {parameter!r}, allowed: a parameter of the model ({known}, ...)")
        with torch.no_grad():
            parameters[parameter].mul_(scale)

    @torch.inference_mode()
    def score(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray]:
        """log pi of each response token, teacher-forced; sequences of like length share a forward of fixed row count."""
        size = self._train["score_batch_size"]
        order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i][0]), i))
        scores: list[np.ndarray | None] = [None] * len(sequences)
        with self._products():
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                for index, score in zip(batch, self._score_batch([sequences[i] for i in batch], size), strict=True):
                    scores[index] = score
        return scores

    def _score_batch(self, sequences: list[tuple[list[int], int]], num_rows: int) -> list[np.ndarray]:
        padded = pad_sequences(sequences, num_rows)
        token_ids = torch.from_numpy(padded.token_ids).to(self._device)
        wanted = torch.from_numpy(padded.response_mask).to(self._device)
        hidden = self._model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state  # (B, T, H)
        before = hidden[:, :-1][wanted[:, 1:]]  # (N, H): the states that predict the response tokens, row by row
        logprobs = self.token_logprobs(before, token_ids[wanted]).cpu().numpy()
        counts = [len(tokens) - num_prompt for tokens, num_prompt in sequences]
        return np.split(logprobs, np.cumsum(counts)[:-1])

    def token_logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(N, H) states and (N,) token ids -> (N,) float32 log-probs, `head_chunk_tokens` rows of logits at a time."""
        chunk = self._train.get("head_chunk_tokens") or DEFAULT_HEAD_CHUNK_TOKENS
        pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        return torch.cat([self._chunk_logprobs(states, ids) for states, ids in pieces])

    def _chunk_logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        head = self._model.get_output_embeddings()
        if self._head_dtype == self._dtype:
            logits = head(hidden)
        else:
            logits = torch.nn.functional.linear(hidden.to(self._head_dtype), head.weight.to(self._head_dtype))
        self._logits_dtype = logits.dtype
        logits = logits.float()
        if self._temperature not in (0, 1):
            logits = logits / self._temperature
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    def executed(self) -> dict[str, str]:
        compute = {dtype_name(p.dtype) for p in self._model.parameters()}
        return {
            "checkpoint": self._checkpoint_dtype,
            "compute": "+".join(sorted(compute)),
            "trainer_head": dtype_name(self._logits_dtype) if self._logits_dtype else "not scored yet",
            "arithmetic": self.arithmetic,
            "trainer_attention": self._model.config._attn_implementation,
        }

    def close(self) -> None:
        self._model = None


def _dtype_on_disk(model_path: Path) -> str:
    """The dtype of the weights in the checkpoint file, read from its header."""
    from safetensors import safe_open

    names = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
    found = set()
    for file in sorted(model_path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {names.get(d := tensors.get_slice(key).get_dtype(), d) for key in tensors.keys()}
    return "+".join(sorted(found)) or "unknown"
