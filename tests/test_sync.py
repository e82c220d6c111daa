"""Weight sync into the real engine, and the proof of it: stale weights are caught when the repair is left out."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")

from small_models import EOS, OPTIMIZER, ROLLOUT, TRAIN, as_sequences, some_requests, write_model  # noqa: E402

from suite.engines.samplers.load import load_sampler  # noqa: E402
from suite.engines.sync import Gap, Probe, SyncError, prove_sync, sync_weights  # noqa: E402
from suite.engines.trainers.load import load_trainer  # noqa: E402

pytestmark = pytest.mark.engine

KINDS = {"untied": {}, "tied": {"tied": True}, "experts": {"experts": True}, "experts-moe": {"experts": True}}


class WithoutRepair:
    """The same engine, loaded the way vLLM's own reload does it."""

    def __init__(self, sampler):
        self._sampler = sampler

    def load_weights(self, named_tensors):
        self._sampler.load_weights(named_tensors, repair=False)

    def __getattr__(self, name):
        return getattr(self._sampler, name)


def nudge(named_masters) -> None:
    """About what an update does to a weight."""
    for _, master in named_masters:
        master.mul_(1.001)


@pytest.mark.parametrize(("kind", "dtype", "stale_without_repair"), [
    ("untied", "bf16", False), ("tied", "fp32", True), ("tied", "bf16", True), ("experts", "fp16", True),
    ("experts-moe", "fp32", True), ("experts-moe", "bf16", True),
])  # fmt: skip
def test_every_weight_arrives_and_a_stale_one_is_caught_at_the_first_sync(tmp_path, kind, dtype, stale_without_repair):
    folder = write_model(tmp_path / "model", **KINDS[kind])
    sampler = load_sampler(folder, ROLLOUT, dtype, [EOS])
    try:
        train = TRAIN | {"optimizer": OPTIMIZER, "engine": "moe" if kind == "experts-moe" else "dense"}
        trainer = load_trainer(folder, train, {"rollout": dtype, "train": dtype}, 1.0)
        probe = Probe(as_sequences(sampler.sample(some_requests(8))), dtype)
        floor = prove_sync(trainer, sampler, dtype, probe)
        assert floor.logprob_diff_mean < {"fp32": 1e-5, "bf16": 0.1, "fp16": 0.02}[dtype]
        if stale_without_repair:
            with pytest.raises(SyncError, match="stale weights"):
                prove_sync(trainer, WithoutRepair(sampler), dtype, probe)
            sync_weights(trainer, sampler, dtype)
            with trainer.moved_weights(nudge):  # a floor taken when the stale tensor lags by one update hides nothing
                sync_weights(trainer, WithoutRepair(sampler), dtype)
                with pytest.raises(SyncError, match="stale weights"):
                    prove_sync(trainer, WithoutRepair(sampler), dtype, probe)
            sync_weights(trainer, sampler, dtype)  # the repaired path mends what the other left behind
            probe.check(probe.gap(sampler, trainer), floor, "after the repair")
        else:
            prove_sync(trainer, WithoutRepair(sampler), dtype, probe)
    finally:
        sampler.close()


def test_one_perturbed_weight_in_the_sampler_is_caught(tmp_path):
    folder = write_model(tmp_path / "model")
    sampler = load_sampler(folder, ROLLOUT, "fp32", [EOS])
    try:
        trainer = load_trainer(folder, TRAIN | {"optimizer": OPTIMIZER}, {"rollout": "fp32", "train": "fp32"}, 1.0)
        probe = Probe(as_sequences(sampler.sample(some_requests(8))), "fp32")
        floor = prove_sync(trainer, sampler, "fp32", probe)
        weights = dict(trainer.named_weights(next(iter(trainer.masters.masters.values())).dtype))
        weights["model.layers.1.mlp.down_proj.weight"] = weights["model.layers.1.mlp.down_proj.weight"] * 1.02
        sampler.load_weights(weights.items())
        with pytest.raises(SyncError, match="after one weight was perturbed"):
            probe.check(probe.gap(sampler, trainer), floor, "after one weight was perturbed")
    finally:
        sampler.close()


def test_a_gap_that_is_not_a_number_is_not_at_the_floor():
    with pytest.raises(SyncError):
        Probe([], "bf16").check(Gap(float("nan"), float("nan")), Gap(1e-7, 1e-13), "after a step")
