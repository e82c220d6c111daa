"""The dense trainer: a transformers model, with peft's adapters if asked, whose forward and backward run in one compute dtype, with fp32 masters behind.

Compute parameters are in the compute dtype, as FSDP2 casts them with `param_dtype`; on a CPU the 16-bit products go
through arithmetic.RoundedProducts. Log-probs are taken in fp32 (scoring.py); steps.py is the gradient step.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from suite.engines.arithmetic import arithmetic_for, experts_for, torch_dtype
from suite.engines.batch import MiniBatch
from suite.engines.ranks import Ranks
from suite.engines.trainers.health import ActivationWatch, underflow_share
from suite.engines.trainers.lora import add_adapters, merged_weights
from suite.engines.trainers.loss_scale import LossScaler
from suite.engines.trainers.masters import MasterWeights
from suite.engines.trainers.perturb import scale_one
from suite.engines.trainers.scoring import Scorer, recomputing
from suite.engines.trainers.steps import DEFAULT_MICRO_BATCH_SIZE, Stepper
from suite.spec.algorithms import Algorithm
from suite.spec.precision import Precision, dtype_name


class DenseTrainer:
    """One model in one compute dtype. `score` gives log pi in nats, with the batch shape that train.score_batch_size fixes;
    `update` takes one gradient step, together with the trainers of the other `ranks`. A trainer without train.optimizer only
    scores, and holds no masters. With train.lora the adapters alone are trained; `seed` draws what they start from.
    """

    def __init__(self, model_path: Path, train: dict, precision: dict, temperature: float, seed: int = 0,
                 ranks: Ranks = Ranks()):
        asked = Precision.of(precision)
        self._train = train
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = torch_dtype(asked.train)
        self._can_train = train.get("optimizer") is not None
        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch.float32 if self._can_train else self._dtype,
            attn_implementation=train.get("attention") or "sdpa", trust_remote_code=False, **experts_for(self._device),
        )  # fmt: skip
        self._model = model.eval().to(self._device)
        self.arithmetic, self._products = arithmetic_for(self._device, self._dtype)
        self._checkpoint_dtype = _dtype_on_disk(Path(model_path))
        if train.get("perturb"):
            scale_one(dict(self._model.named_parameters()), **train["perturb"], of="parameter of the model")
        if self._can_train:
            if train.get("lora"):
                add_adapters(self._model, train["lora"], seed)
            named = dict(self._model.named_parameters())
            self._frozen = {name: p for name, p in named.items() if not p.requires_grad}  # of a base with adapters
            for parameter in self._frozen.values():
                parameter.data = parameter.data.to(self._dtype)
            trained = {name: p for name, p in named.items() if name not in self._frozen}
            self.masters = MasterWeights(trained, self._dtype, train["optimizer"], torch_dtype(asked.gradient_reduction))
            scaling = precision.get("loss_scaling") or {"enabled": False}
            self.scaler = LossScaler(**scaling)
            if train.get("gradient_checkpointing"):
                self._model.gradient_checkpointing_enable(recomputing(self._products))
        self._scorer = Scorer(
            self._states, self._model.get_output_embeddings(), torch_dtype(asked.trainer_head), self._products, temperature,
            train["score_batch_size"], self._device, train.get("head_chunk_tokens"),
        )  # fmt: skip
        if self._can_train:
            self._stepper = Stepper(
                self._scorer, self.masters, self.scaler, ActivationWatch(self._model.base_model.layers), self._underflow,
                ranks, train.get("micro_batch_size") or DEFAULT_MICRO_BATCH_SIZE, train.get("grad_clip"),
            )  # fmt: skip

    def _underflow(self) -> float:
        return underflow_share(self._model.parameters(), self._model.get_input_embeddings().weight)

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

    def named_weights(self, dtype: torch.dtype):
        """(name, tensor) of every parameter as the checkpoint names them, rounded to `dtype` from the fp32 masters; of a
        model with adapters the merged weights."""
        masters = self.masters.masters
        whole = merged_weights(self._model, masters) if self._train.get("lora") else masters.items()
        rounded = {name: weight.detach().to(dtype) for name, weight in whole}
        yield from revert_weight_conversion(self._model, rounded).items()  # transformers 5 fuses experts; checkpoints do not

    def moved_weights(self, move):
        """Inside the context the masters, and a frozen base, are changed by `move(named weights)`; afterwards they are what
        they were."""
        return self.masters.moved(move, self._frozen)

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
        self._model = self.masters = self._scorer = self._stepper = None


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
