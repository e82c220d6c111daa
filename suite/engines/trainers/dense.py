"""The dense trainer: a transformers model, with peft's adapters if asked, whose forward and backward run in one compute
dtype; its fp32 masters are spread over the ranks by FSDP2 (shards.py), in one process as in many.

On a CPU the 16-bit products go through arithmetic.RoundedProducts. Log-probs are taken in fp32 (scoring.py); steps.py is the
gradient step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from suite.engines.arithmetic import arithmetic_for, experts_for, torch_dtype
from suite.engines.batch import MiniBatch
from suite.engines.checkpoint import Saved
from suite.engines.trainers.health import ActivationWatch, whole
from suite.engines.trainers.lora import add_adapters, merged_weights
from suite.engines.trainers.loss_scale import LossScaler
from suite.engines.trainers.perturb import scale_one
from suite.engines.trainers.scoring import Scorer, plainly, recomputing
from suite.engines.trainers.shards import Policy, ShardedWeights
from suite.engines.trainers.steps import DEFAULT_MICRO_BATCH_SIZE, Stepper
from suite.engines.world import World
from suite.spec.algorithms import Algorithm
from suite.spec.precision import Precision, dtype_name


class DenseTrainer:
    """One model in one compute dtype. `score` gives log pi in nats, with the batch shape that train.score_batch_size fixes;
    `update` takes one gradient step; both together with the trainers of the other ranks of `world`. A trainer without
    train.optimizer only scores, and holds no masters. With train.lora the adapters alone are trained; `seed` draws what
    they start from.
    """

    def __init__(self, model_path: Path, train: dict, precision: dict, temperature: float, seed: int = 0,
                 world: World = World()):
        asked = Precision.of(precision)
        self._train = train
        self._device = world.device
        self._dtype = torch_dtype(asked.train)
        self._can_train = train.get("optimizer") is not None
        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch.float32 if self._can_train else self._dtype,
            attn_implementation=train.get("attention") or "sdpa", trust_remote_code=False, **experts_for(self._device),
        )  # fmt: skip
        self._model = model.eval()
        self.arithmetic, self._products = arithmetic_for(self._device, self._dtype)
        self._checkpoint_dtype = _dtype_on_disk(Path(model_path))
        if train.get("perturb"):
            scale_one(dict(self._model.named_parameters()), **train["perturb"], of="parameter of the model")
        run = plainly
        if self._can_train:
            run = self._policy = Policy(self._model)
            self._prepare_training(asked, precision, seed, world)
        else:
            self._model.to(self._device)
        self._scorer = Scorer(
            self._states, self._model.get_output_embeddings(), torch_dtype(asked.trainer_head), self._products, temperature,
            train["score_batch_size"], self._device, train.get("head_chunk_tokens"), world=world, whole=run,
        )  # fmt: skip
        if self._can_train:
            self._stepper = Stepper(
                self._scorer, self.masters, self.scaler, ActivationWatch(self._model.base_model.layers),
                self.masters.underflow_share, world, train.get("micro_batch_size") or DEFAULT_MICRO_BATCH_SIZE,
                train.get("grad_clip"),
            )  # fmt: skip

    def _prepare_training(self, asked: Precision, precision: dict, seed: int, world: World) -> None:
        """Adapters, recomputation, masters over the ranks, loss scaling."""
        if self._train.get("lora"):
            add_adapters(self._model, self._train["lora"], seed)
        for parameter in self._model.parameters():
            if not parameter.requires_grad:  # of a base with adapters
                parameter.data = parameter.data.to(self._dtype)
        if self._train.get("gradient_checkpointing"):
            self._model.gradient_checkpointing_enable(recomputing(self._products))
        self.masters = ShardedWeights(
            self._policy, self._model.base_model.layers, world, self._dtype, self._train["optimizer"],
            torch_dtype(asked.gradient_reduction),
        )  # fmt: skip
        self.scaler = LossScaler(**(precision.get("loss_scaling") or {"enabled": False}))

    def score(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray]:
        return self._scorer.score(sequences)

    def score_and_entropy(self, sequences: list[tuple[list[int], int]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        return self._scorer.score_and_entropy(sequences)

    def score_and_argmax(self, sequences: list[tuple[list[int], int]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        return self._scorer.score_and_argmax(sequences)

    def distributions(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray]:
        return self._scorer.distributions(sequences)

    def expert_choices(self, sequences: list[tuple[list[int], int]]) -> None:
        """A mixture of experts in this trainer does not tell what it chose; the moe trainer does."""

    def _states(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state

    def update(self, batch: MiniBatch, algorithm: Algorithm) -> dict[str, float]:
        self._model.train(bool(self._train.get("gradient_checkpointing")))  # transformers recomputes in this mode alone
        report = self._stepper.update(batch, algorithm)
        self._model.eval()
        return report

    def named_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every parameter as the checkpoint names them, rounded to `dtype` from the fp32 masters; of a
        model with adapters the merged weights. One is gathered at a time: all ranks must take them, in step."""
        if self._train.get("lora"):
            named = ((name, weight.to(dtype)) for name, weight in merged_weights(self._model, whole))
        else:
            named = ((name, whole(weight.detach().to(dtype))) for name, weight in self.masters.masters.items())
        return _as_in_checkpoint(self._model, named)

    def moved_weights(self, move):
        """Inside the context the masters, and a frozen base, are changed by `move(named parts of this rank)`; afterwards they
        are what they were."""
        return self.masters.moved(move)

    def held(self) -> tuple[dict[str, torch.Tensor], dict]:
        """(tensors, numbers) that a checkpoint holds."""
        tensors, numbers = self.masters.held()
        return tensors, numbers | {"scaler": self.scaler.state_dict()}

    def take_over(self, saved: Saved) -> None:
        """Go on from a checkpoint, whatever number of ranks wrote it."""
        self.masters.take_over(saved)
        self.scaler.load_state_dict(saved.numbers["scaler"])

    def executed(self) -> dict[str, str]:
        """Dtypes of the live tensors; `optimizer_state` and `gradient_reduction` once a step was taken."""
        points = {
            "checkpoint": self._checkpoint_dtype,
            "compute": "not scored yet" if self._can_train else _dtypes(self._model.parameters()),
            "trainer_head": dtype_name(self._scorer.logits_dtype) if self._scorer.logits_dtype else "not scored yet",
            "arithmetic": self.arithmetic,
            "trainer_attention": self._model.config._attn_implementation,
        }
        if self._can_train:
            if lora := self._train.get("lora"):
                points["trainer_adapters"] = f"lora, rank {lora['rank']}, alpha {lora['alpha']}; merged in fp32 for the sampler"
            points |= self.masters.executed()
        return points

    def close(self) -> None:
        """Give the memory of model, masters and optimizer back."""
        self._model = self._policy = self.masters = self._scorer = self._stepper = None


LAYER = re.compile(r".*?layers\.\d+\.")


def _as_in_checkpoint(model: torch.nn.Module, named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights under the names of the checkpoint. transformers 5 fuses experts of a layer, which checkpoints keep apart:
    such a model comes a layer at a time, others a tensor at a time."""
    def unit(pair):
        layer = LAYER.match(pair[0]) if model._weight_conversions else None
        return layer[0] if layer else pair[0]

    for _, together in groupby(named, key=unit):
        yield from revert_weight_conversion(model, dict(together)).items()


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
