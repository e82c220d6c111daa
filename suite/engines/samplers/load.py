"""Samplers: the rollout policy mu. vllm.py is the engine people run; hf.py is a slow, plain reference."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from suite.engines.batch import Request, Rollout
from suite.errors import UserError
from suite.spec.precision import FORMATS, dtype_name

if TYPE_CHECKING:
    import torch


class Sampler(Protocol):
    """Holds one model in one precision on one device."""

    engine: str

    def sample(self, requests: list[Request]) -> list[Rollout]:
        """One rollout per request, in order. The same request gives the same rollout, also from a fresh engine,
        as long as the list of requests it is sampled with is the same."""

    def score(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray]:
        """log mu of given responses, teacher-forced: (token_ids, num_prompt_tokens) -> (T_response,) float32 nats."""

    def distributions(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray]:
        """log mu of the whole vocabulary at every response position, teacher-forced: (T_response, V) float32 nats each."""

    def expert_choices(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray] | None:
        """Experts at every position, teacher-forced (routing.py); None where the engine does not tell."""

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights by (checkpoint name, tensor) pairs."""

    def executed(self) -> dict[str, str]:
        """Dtypes read from the live engine: rollout_weights, kv_cache, rollout_logits; and what names the engine."""

    def close(self) -> None:
        """Give the memory back."""


def engine_name(asked: str) -> str:
    """`auto` is vLLM where it is installed, else the HF sampler."""
    if asked != "auto":
        return asked
    return "vllm" if importlib.util.find_spec("vllm") else "hf"


def load_sampler(model_path: Path, rollout: dict, precision: str, stop_token_ids: list[int], kv_cache: str | None = None,
                 head: str | None = None) -> Sampler:
    """The sampler that `rollout` (a resolved settings section) asks for, with the model's weights in the format
    `precision`: of a coarse one, rounded to it. kv_cache: an 8-bit format for keys and values, in vLLM alone.
    head: fp32 for the product of the output head of a 16-bit model, in vLLM alone. Raises UserError for another engine."""
    if engine_name(rollout["engine"]) == "vllm":
        from suite.engines.samplers.vllm import VllmSampler

        sampler = VllmSampler(model_path, rollout, precision, stop_token_ids, kv_cache, head)
    else:
        from suite.engines.samplers.hf import HfSampler

        if head not in (None, FORMATS[precision].storage):
            raise UserError(f"precision.rollout_logits: found {head} with rollout.engine hf, allowed: {FORMATS[precision].storage}")
        sampler = HfSampler(model_path, rollout, precision, stop_token_ids)
    if not FORMATS[precision].is_dtype:
        sampler.load_weights(rounded_checkpoint(model_path, precision))
    return sampler


def rounded_checkpoint(model_path: Path, precision: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every weight of a checkpoint, rounded to the format, one at a time."""
    from safetensors import safe_open

    from suite.engines.arithmetic import round_to

    for file in sorted(model_path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                yield name, round_to(tensors.get_tensor(name).float(), precision)


def weights_format(parameters: Iterable[torch.Tensor], precision: str) -> str:
    """The format of live weights: `precision` where all of them lie on its grid, else the dtypes that hold them."""
    from suite.engines.arithmetic import on_grid

    held = [parameter for parameter in parameters if parameter.numel()]
    if all(on_grid(parameter.detach(), precision) for parameter in held):
        return precision
    return "+".join(sorted({dtype_name(parameter.dtype) for parameter in held}))
