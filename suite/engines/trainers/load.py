"""Trainers: the training policy pi. dense.py is transformers (and peft), moe.py is megatron-core."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from suite.engines.world import World


class Trainer(Protocol):
    """Holds one model in one compute precision on one device."""

    def score(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray]:
        """log pi of given responses: (token_ids, num_prompt_tokens) -> (T_response,) float32 nats each."""

    def expert_choices(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray] | None:
        """Experts at every position of each sequence (routing.py); None of a model without experts."""

    def executed(self) -> dict[str, str]:
        """Dtypes read from the live objects, and the arithmetic of their products."""

    def close(self) -> None: ...


def load_trainer(model_path: Path, train: dict, precision: dict, temperature: float, seed: int = 0,
                 world: World = World()) -> Trainer:
    """The trainer that `train` (a resolved settings section) asks for; `seed` draws weights that no checkpoint holds, and
    its gradient steps are taken together with the other ranks of `world`."""
    if train["engine"] == "moe":
        from suite.engines.trainers.moe import MoeTrainer as trainer
    else:
        from suite.engines.trainers.dense import DenseTrainer as trainer
    return trainer(model_path, train, precision, temperature, seed, world)
