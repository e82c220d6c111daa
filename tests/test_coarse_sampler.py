"""A sampler whose weights are rounded to a few mantissa bits: what it holds, and a sync that is proved at any coarseness."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from small_models import EOS, OPTIMIZER, ROLLOUT, TRAIN, as_sequences, some_requests, weights_of, write_model  # noqa: E402

from suite.engines.arithmetic import on_grid, round_to  # noqa: E402
from suite.engines.samplers.load import load_sampler, rounded_checkpoint  # noqa: E402
from suite.engines.sync import Probe, SyncError, prove_sync, sync_weights  # noqa: E402
from suite.engines.trainers.load import load_trainer  # noqa: E402

PLAIN = ROLLOUT | {"engine": "hf"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("coarse") / "model")


def fp32_trainer(model):
    return load_trainer(model, TRAIN | {"optimizer": OPTIMIZER}, {"rollout": "fp32", "train": "fp32"}, 1.0)


@pytest.mark.parametrize("name", ["m0", "m2", "m7"])
def test_a_coarse_sampler_scores_as_a_model_with_rounded_weights_does(model, name):
    sampler = load_sampler(model, PLAIN, name, [EOS])
    sequences = as_sequences(sampler.sample(some_requests(4)))
    reference = fp32_trainer(model)
    with reference.moved_weights(lambda weights: [w.copy_(round_to(w, name)) for _, w in weights]):
        expected = np.concatenate(reference.score(sequences))
    np.testing.assert_allclose(np.concatenate(sampler.score(sequences)), expected, atol=2e-5)
    assert (name == "m7") == bool(np.allclose(expected, np.concatenate(reference.score(sequences)), atol=1e-6))
    assert sampler.executed()["rollout_weights"] == name and sampler.executed()["kv_cache"] == "fp32"


def test_a_weight_off_the_grid_is_read_from_the_live_engine(model):
    sampler = load_sampler(model, PLAIN, "m3", [EOS])
    sampler.load_weights([("model.norm.weight", torch.full((64,), 1.01))])
    assert sampler.executed()["rollout_weights"] == "fp32"


def test_a_checkpoint_is_rounded_tensor_by_tensor(model):
    weights = dict(rounded_checkpoint(model, "m2"))
    assert weights and all(on_grid(tensor, "m2") for tensor in weights.values())


@pytest.mark.parametrize("name", ["m0", "m1", "m4"])
def test_the_sync_is_proved_however_coarse_the_wire_and_a_stale_tensor_is_caught(model, name):
    sampler, trainer = load_sampler(model, PLAIN, name, [EOS]), fp32_trainer(model)
    probe = Probe(as_sequences(sampler.sample(some_requests(8))), "fp32", wire=name)
    assert sync_weights(trainer, sampler, name) == name
    floor = prove_sync(trainer, sampler, name, probe)
    assert floor.logprob_diff_mean < 1e-5  # the rounding itself, of 0.01 nats and more, is not in the floor

    class Stale:
        """Drops one tensor of every reload."""

        def load_weights(self, named_tensors):
            sampler.load_weights([pair for pair in named_tensors if "layers.1.mlp.down_proj" not in pair[0]])

        def __getattr__(self, attribute):
            return getattr(sampler, attribute)

    with pytest.raises(SyncError, match="stale weights"):
        prove_sync(trainer, Stale(), name, probe)


def test_the_proof_leaves_the_trainer_as_it_was(model):
    sampler, trainer = load_sampler(model, PLAIN, "m1", [EOS]), fp32_trainer(model)
    before = weights_of(trainer)
    probe = Probe(as_sequences(sampler.sample(some_requests(8))), "fp32", wire="m1")
    sync_weights(trainer, sampler, "m1")
    prove_sync(trainer, sampler, "m1", probe)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())
