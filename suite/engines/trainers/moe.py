"""The MoE trainer: a Qwen3-MoE on megatron-core in one compute dtype, with fp32 masters behind; the same contract as the
dense trainer, whose scoring, gradient step, masters and loss scaling it shares.

Masters and scaler are the suite's own and not megatron's: its optimizer needs CUDA, and by its defaults its scaler starts
at 2^32, waits 1,000 steps and forgives one overflow, where the paper starts at 65,536, waits 400 and forgives none. One
process holds the whole model; expert, tensor and pipeline parallelism are not part of this trainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from suite.engines.arithmetic import arithmetic_for, torch_dtype
from suite.engines.batch import MiniBatch, pad_sequences
from suite.engines.checkpoint import Saved
from suite.engines.trainers.health import ActivationWatch, underflow_share
from suite.engines.trainers.loss_scale import LossScaler
from suite.engines.trainers.masters import MasterWeights
from suite.engines.trainers.megatron_names import parted, read_shape, read_weights, table
from suite.engines.trainers.perturb import scale_one
from suite.engines.trainers.scoring import Scorer, by_length, recomputing
from suite.engines.trainers.steps import DEFAULT_MICRO_BATCH_SIZE, Stepper
from suite.engines.world import World
from suite.errors import UserError
from suite.measure.routing import RouteBook
from suite.spec.algorithms import Algorithm
from suite.spec.precision import Precision, dtype_name

if not torch.cuda.is_available():
    from suite.engines.trainers import megatron_cpu

    megatron_cpu.apply()

from suite.engines.trainers import megatron  # noqa: E402  (after the shims)


class MoeTrainer:
    """One model in one compute dtype. A trainer without train.optimizer only scores, and holds no masters."""

    def __init__(self, model_path: Path, train: dict, precision: dict, temperature: float, seed: int = 0,
                 world: World = World()):
        if train.get("lora"):
            raise UserError("train.lora: found adapters, allowed with train.engine moe: nothing")
        if train.get("attention") not in (None, "sdpa"):
            raise UserError(f"train.attention: found {train['attention']!r}, allowed with train.engine moe: 'sdpa'")
        asked = Precision.of(precision)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = torch_dtype(asked.train)
        self._can_train = train.get("optimizer") is not None
        self._shape = read_shape(model_path)
        self.arithmetic, products = arithmetic_for(self._device, self._dtype)
        self._model = megatron.build(self._shape, self._dtype)
        if self._can_train:
            self._model.float()  # what the masters are taken from
        self._model.to(self._device)
        self._checkpoint_dtypes = self._load(Path(model_path), train.get("perturb"))
        if train.get("gradient_checkpointing"):
            _recompute_layers(self._model, products)
        if self._can_train:
            self.masters = MasterWeights(
                dict(self._model.named_parameters()), self._dtype, train["optimizer"], torch_dtype(asked.gradient_reduction), world
            )
            self.scaler = LossScaler(**(precision.get("loss_scaling") or {"enabled": False}))
        self._model.train(self._can_train)
        self._book = RouteBook()
        self._scorer = Scorer(
            self._states, _head(self._model), torch_dtype(asked.trainer_head), products, temperature,
            train["score_batch_size"], self._device, train.get("head_chunk_tokens"), world=world,
        )  # fmt: skip
        if self._can_train:
            self._stepper = Stepper(
                self._scorer, self.masters, self.scaler, ActivationWatch(self._model.decoder.layers), self._underflow,
                world, train.get("micro_batch_size") or DEFAULT_MICRO_BATCH_SIZE, train.get("grad_clip"),
            )  # fmt: skip

    @torch.no_grad()
    def _load(self, folder: Path, perturb: dict | None) -> set[str]:
        """Fill the model from the checkpoint, one parameter scaled on purpose if asked; the dtypes on disk."""
        parameters, dtypes = dict(self._model.named_parameters()), set()
        for name, value in read_weights(folder, self._shape):
            parameters.pop(name).copy_(value)
            dtypes.add(dtype_name(value.dtype))
        if parameters:
            raise RuntimeError(f"megatron-core has parameters that the table does not know: {', '.join(sorted(parameters))}")
        if perturb:
            scale_one(self._checkpoint_tensors(), **perturb, of="tensor of the checkpoint")
        return dtypes

    def _checkpoint_tensors(self) -> dict[str, torch.Tensor]:
        """{name in the checkpoint: the part of the parameter that holds it}; writing to it changes the model."""
        parameters = dict(self._model.named_parameters())
        return {name: part for row in table(self._shape) for name, part in parted(row, parameters[row.parameter], self._shape)}

    def _states(self, token_ids: torch.Tensor) -> torch.Tensor:
        megatron.follow(self._model, self._routes(token_ids))
        return megatron.hidden_states(self._model, token_ids)

    def _routes(self, token_ids: torch.Tensor) -> torch.Tensor | None:
        """(B, T, layers, k) of the experts to follow; None where every router is to choose itself."""
        if not self._book:
            return None
        shape = self._shape
        return torch.from_numpy(self._book.rows(token_ids.cpu().numpy(), shape.num_layers, shape.experts_per_token))

    def follow(self, sequences: list[tuple[list[int], int]], choices: list[np.ndarray]) -> None:
        """From now on take these experts, (T, layers, k) each, in every forward of these sequences; other rows, and positions
        beyond those given, are routed by the model itself. Without sequences nothing is followed any more."""
        self._book = RouteBook(sequences, choices)

    def _underflow(self) -> float:
        return underflow_share(self._model.parameters(), self._model.embedding.word_embeddings.weight)

    def score(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray]:
        return self._scorer.score(sequences)

    def score_and_entropy(self, sequences: list[tuple[list[int], int]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        return self._scorer.score_and_entropy(sequences)

    def score_and_argmax(self, sequences: list[tuple[list[int], int]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        return self._scorer.score_and_argmax(sequences)

    def distributions(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray]:
        return self._scorer.distributions(sequences)

    @torch.inference_mode()
    def expert_choices(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray]:
        """Experts at every position, in forwards of the shape of `score`."""
        order, found = by_length(sequences), [None] * len(sequences)
        num_rows = self._scorer.num_rows
        with self._scorer.products():
            for start in range(0, len(order), num_rows):
                part = order[start : start + num_rows]
                choices = self._choices([sequences[i] for i in part], num_rows)
                for index, one in zip(part, choices, strict=False):
                    found[index] = one[: len(sequences[index][0])]
        return found

    def _choices(self, sequences: list[tuple[list[int], int]], num_rows: int) -> np.ndarray:
        """(B, T, layers, k) of one forward, padding included."""
        token_ids = torch.from_numpy(pad_sequences(sequences, num_rows).token_ids).to(self._device)
        maps: list[torch.Tensor] = []  # (T x B, experts) bool, layer after layer
        routers = [layer.mlp.router for layer in self._model.decoder.layers]
        hooks = [router.register_forward_hook(lambda _, args, output: maps.append(output[1])) for router in routers]
        try:
            self._states(token_ids)
        finally:
            for hook in hooks:
                hook.remove()
        num, length = token_ids.shape
        chosen = torch.stack(maps).reshape(len(maps), length, num, -1).permute(2, 1, 0, 3)  # (B, T, layers, experts)
        return chosen.nonzero()[:, -1].reshape(num, length, len(maps), -1).cpu().numpy()  # each row's, in ascending order

    def update(self, batch: MiniBatch, algorithm: Algorithm) -> dict[str, float]:
        return self._stepper.update(batch, algorithm)

    def named_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every tensor as the checkpoint names them, rounded to `dtype` from the fp32 masters; one
        parameter of the model is held at a time."""
        for row in table(self._shape):
            yield from parted(row, self.masters.masters[row.parameter].detach().to(dtype), self._shape)

    def moved_weights(self, move):
        """Inside the context the masters are changed by `move(named weights)`; afterwards they are what they were."""
        return self.masters.moved(move, {})

    def held(self) -> tuple[dict[str, torch.Tensor], dict]:
        """(tensors, numbers) that a checkpoint holds."""
        tensors, numbers = self.masters.held()
        return tensors, numbers | {"scaler": self.scaler.state_dict()}

    def take_over(self, saved: Saved) -> None:
        """Go on from a checkpoint."""
        self.masters.take_over(saved)
        self.scaler.load_state_dict(saved.numbers["scaler"])

    def executed(self) -> dict[str, str]:
        """Dtypes of the live tensors; `optimizer_state` and `gradient_reduction` once a step was taken."""
        logits = self._scorer.logits_dtype
        points = {
            "checkpoint": "+".join(sorted(self._checkpoint_dtypes)),
            "compute": "+".join(sorted({dtype_name(p.dtype) for p in self._model.parameters()})),
            "trainer_head": dtype_name(logits) if logits else "not scored yet",
            "arithmetic": self.arithmetic,
            "trainer_engine": "megatron-core",
            "trainer_attention": "sdpa",
        }
        return points | self.masters.executed() if self._can_train else points

    def close(self) -> None:
        """Give the memory of model, masters and optimizer back."""
        self._model = self.masters = self._scorer = self._stepper = None


def _head(model: torch.nn.Module) -> torch.nn.Linear:
    """The model's output layer as a plain linear layer on the same parameter."""
    weight = model.output_layer.weight
    head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = weight
    return head


def _recompute_layers(model: torch.nn.Module, products) -> None:
    """Keep only what enters each layer, and run the layer again in the backward pass. Not by megatron's own means, which
    restore CUDA's random numbers."""
    for layer in model.decoder.layers:

        def again(*args, forward=layer.forward, **kwargs):
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, **recomputing(products), **kwargs)

        layer.forward = again
