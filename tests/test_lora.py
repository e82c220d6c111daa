"""LoRA in the dense trainer: against the checkpoint, against a plain forward of the merged weights, against the formula;
and the merged weights in the real sampler.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from small_models import EOS, OPTIMIZER, ROLLOUT, TRAIN, as_sequences, passed_on, some_requests, weights_of, write_model  # noqa: E402
from test_dense_trainer import BF16, FP16, FP32, minibatch, sequences  # noqa: E402

from suite.engines.arithmetic import torch_dtype  # noqa: E402
from suite.engines.trainers.health import whole  # noqa: E402
from suite.engines.trainers.load import load_trainer  # noqa: E402
from suite.errors import UserError  # noqa: E402
from suite.spec.algorithms import resolve  # noqa: E402

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = {"rank": 4, "alpha": 8, "targets": SEVEN}
ROWS = sequences()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def trainer(model, precision=FP32, seed=0, **changes):
    return load_trainer(model, TRAIN | {"optimizer": OPTIMIZER, "lora": LORA} | changes, precision, 1.0, seed)


def frozen_of(ours):
    return {name: whole(p.detach()).clone() for name, p in ours.masters.frozen.items()}


def step(ours, advantage_seed=0):
    advantages = np.random.default_rng(advantage_seed).normal(size=len(ROWS)).astype(np.float32)
    return ours.update(minibatch(ROWS, ours.score(ROWS), advantages), resolve("GRPO"))


@pytest.mark.parametrize("precision", [FP32, BF16, FP16])
def test_fresh_adapters_leave_the_checkpoint_as_it_is(model, precision):
    plain = load_trainer(model, TRAIN | {"optimizer": OPTIMIZER}, precision, 1.0)
    ours = trainer(model, precision)
    for found, expected in zip(ours.score(ROWS), plain.score(ROWS), strict=True):
        np.testing.assert_array_equal(found, expected)
    wire = torch_dtype(precision["rollout"])
    merged, whole = dict(ours.named_weights(wire)), dict(plain.named_weights(wire))
    assert merged.keys() == whole.keys()
    assert all(torch.equal(merged[name], whole[name]) for name in whole)


def test_the_merged_weights_are_the_model_that_was_trained(model):
    """A plain transformers model that holds the merged weights gives the log-probs of the trainer with its adapters."""
    from transformers import AutoModelForCausalLM

    ours = trainer(model)
    before = np.concatenate(ours.score(ROWS))
    for seed in range(3):
        step(ours, seed)
    after = ours.score(ROWS)
    assert np.abs(np.concatenate(after) - before).mean() > 1e-2, "three steps must have moved something"
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain.load_state_dict(dict(ours.named_weights(torch.float32)))
    for (tokens, num_prompt), found in zip(ROWS, after, strict=True):
        logprobs = plain(input_ids=torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[num_prompt - 1 :, 0]
        np.testing.assert_allclose(found, expected.detach(), atol=2e-5)


@pytest.mark.parametrize(("rank", "alpha"), [(1, 2), (4, 2), (32, 64)])
def test_the_update_is_alpha_over_rank_times_b_a(model, rank, alpha):
    ours = trainer(model, BF16, lora=LORA | {"rank": rank, "alpha": alpha})
    base = dict(ours.named_weights(torch.float32))
    step(ours)
    merged = dict(ours.named_weights(torch.float32))
    layer = "model.layers.1.mlp.down_proj"
    a, b = (weights_of(ours)[f"{layer}.lora_{part}.default.weight"].double() for part in "AB")
    assert a.shape[0] == b.shape[1] == rank
    update = merged[f"{layer}.weight"].double() - base[f"{layer}.weight"].double()
    torch.testing.assert_close(update, alpha / rank * b @ a, atol=1e-6, rtol=1e-3)


def test_the_first_step_moves_every_b_and_no_a_and_nothing_else_ever_moves(model):
    """With B = 0 the gradient of A is exactly 0."""
    ours = trainer(model)
    before, frozen = weights_of(ours), frozen_of(ours)
    assert len(before) == 2 * len(SEVEN) * 2, "A and B in seven layers of two blocks"
    assert all(torch.any(p) == (".lora_A." in name) for name, p in before.items())
    step(ours)
    for name, master in weights_of(ours).items():
        assert torch.equal(master, before[name]) == (".lora_A." in name), name
    step(ours, 1)
    assert not any(torch.equal(master, before[name]) for name, master in weights_of(ours).items())
    assert all(torch.equal(p, frozen[name]) for name, p in frozen_of(ours).items())


def test_the_launch_seed_draws_a_and_nothing_else_hears_of_it(model):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (weights_of(trainer(model, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    drawn = [name for name in first if ".lora_A." in name]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize("precision", [BF16, FP16])
def test_adapters_have_fp32_masters_over_a_base_of_16_bits(model, precision):
    ours = trainer(model, precision)
    assert step(ours)["step_skipped"] == 0
    executed = ours.executed()
    assert executed["compute"] == precision["train"], "base and adapters alike"
    assert executed["master_weights"] == executed["optimizer_state"] == executed["gradient_reduction"] == "fp32"
    assert executed["trainer_adapters"].startswith("lora, rank 4, alpha 8")


def test_gradient_checkpointing_changes_no_adapter(model):
    plain, recomputed = trainer(model, FP16), trainer(model, FP16, gradient_checkpointing=True)
    for ours in (plain, recomputed):
        step(ours), step(ours, 1)
    found = weights_of(recomputed)
    assert all(torch.equal(master, found[name]) for name, master in weights_of(plain).items())


def test_a_resumed_trainer_with_adapters_goes_on_bit_for_bit(model, tmp_path):
    straight, half = trainer(model, FP16), trainer(model, FP16)
    step(straight), step(straight, 1), step(half)
    resumed = passed_on(half, trainer(model, FP16, seed=9), tmp_path)  # other fresh adapters, all of them replaced
    step(resumed, 1)
    found = weights_of(resumed)
    assert all(torch.equal(master, found[name]) for name, master in weights_of(straight).items())


def test_moved_weights_reach_base_and_adapters_and_come_back_exactly(model):
    ours = trainer(model, FP16)
    step(ours)
    before, merged = np.concatenate(ours.score(ROWS)), dict(ours.named_weights(torch.float32))
    with ours.moved_weights(lambda named: [tensor.add_(0.25) for _, tensor in named]):
        moved = dict(ours.named_weights(torch.float32))
        assert not any(torch.equal(moved[name], merged[name]) for name in merged)
    assert np.array_equal(np.concatenate(ours.score(ROWS)), before)


@pytest.mark.parametrize("targets", [("q_proj", "query"), ("lm_head",), ("embed_tokens",)])
def test_a_target_that_is_no_linear_layer_of_the_model_is_refused(model, targets):
    with pytest.raises(UserError, match=f"train.lora.targets: found {targets[-1]}, allowed: down_proj, gate_proj"):
        trainer(model, lora=LORA | {"targets": targets})


# --- in the real sampler ----------------------------------------------------------------------------------------------


class BaseAlone:
    """A trainer whose adapters are forgotten on the way to the sampler."""

    def __init__(self, ours):
        self._trainer = ours

    def named_weights(self, dtype):
        yield from ((name.replace(".base_layer", ""), p.to(dtype)) for name, p in frozen_of(self._trainer).items())

    def __getattr__(self, name):
        return getattr(self._trainer, name)


@pytest.mark.engine
@pytest.mark.parametrize("precision", [FP32, BF16])
def test_the_sampler_follows_the_adapters_and_forgotten_ones_are_caught(model, precision):
    pytest.importorskip("vllm")
    from suite.engines.samplers.load import load_sampler
    from suite.engines.sync import Probe, SyncError, prove_sync, sync_weights

    dtype = precision["rollout"]
    sampler = load_sampler(model, ROLLOUT, dtype, [EOS])
    try:
        ours = trainer(model, precision)
        probe = Probe(as_sequences(sampler.sample(some_requests(8))), dtype)
        floor = prove_sync(ours, sampler, dtype, probe)
        with pytest.raises(SyncError, match="stale weights"):
            prove_sync(BaseAlone(ours), sampler, dtype, probe)
        for seed in range(3):
            step(ours, seed)
        assert sync_weights(ours, sampler, dtype) == dtype
        probe.check(probe.gap(sampler, ours), floor, "after three steps")
    finally:
        sampler.close()
