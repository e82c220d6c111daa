"""The dense trainer: scores against a plain forward, one gradient step against autograd, and the edges of a step."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from small_models import OPTIMIZER, TRAIN, VOCABULARY, passed_on, weights_of, write_model  # noqa: E402

from suite.engines.batch import PAD_TO_TOKENS, MiniBatch, pad_sequences  # noqa: E402
from suite.engines.trainers.load import load_trainer  # noqa: E402
from suite.errors import UserError  # noqa: E402
from suite.spec.algorithms import resolve  # noqa: E402

FP32 = {"rollout": "fp32", "train": "fp32"}
FP16 = {"rollout": "fp16", "train": "fp16", "loss_scaling": {"enabled": True}}
BF16 = {"rollout": "bf16", "train": "bf16"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def sequences(num=10, seed=0, low=12, high=40):
    draw = np.random.default_rng(seed)
    return [(draw.integers(3, VOCABULARY, draw.integers(low, high)).tolist(), int(draw.integers(2, 8))) for _ in range(num)]


def minibatch(rows, old, advantages=None, rollout=None):
    advantages = np.linspace(-1, 1, len(rows), dtype=np.float32) if advantages is None else advantages
    return MiniBatch(rows, old if rollout is None else rollout, old, advantages, 32)


def plain_logprobs(folder, rows):
    """One unpadded transformers forward per sequence, full logits, log_softmax: the slow reference."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scores = []
    for tokens, num_prompt in rows:
        logits = reference(input_ids=torch.tensor([tokens])).logits[0, :-1]
        logprobs = torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        scores.append(logprobs[num_prompt - 1 :])
    return reference, scores


def test_scores_are_those_of_a_plain_forward(model):
    rows = sequences()
    _, expected = plain_logprobs(model, rows)
    for changes in ({}, {"head_chunk_tokens": 7}, {"score_batch_size": 3}, {"score_batch_size": 64}):
        found = load_trainer(model, TRAIN | changes, FP32, 1.0).score(rows)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == np.float32
            np.testing.assert_allclose(a, b.detach().numpy(), atol=3e-6)


@pytest.mark.parametrize("precision", [FP32, BF16])
def test_the_most_probable_tokens_are_those_of_the_whole_distribution_and_leave_the_scores_as_they_are(model, precision):
    rows = [*sequences(), ([5, 6, 7], 3)]
    trainer = load_trainer(model, TRAIN | {"head_chunk_tokens": 7}, precision, 1.0)
    scores, likeliest = trainer.score_and_argmax(rows)
    for plain, score, argmax, (tokens, num_prompt) in zip(trainer.score(rows), scores, likeliest, rows, strict=True):
        np.testing.assert_array_equal(plain, score)
        assert argmax.dtype == np.int64 and len(argmax) == len(tokens) - num_prompt
    for argmax, full in zip(likeliest[:3], trainer.distributions(rows[:3]), strict=True):
        assert (full[np.arange(len(full)), argmax] >= full.max(axis=1) - (1e-5 if precision is FP32 else 0.05)).all()


@pytest.mark.parametrize("precision", [FP32, BF16])
def test_entropies_are_those_of_the_whole_distribution_and_leave_the_scores_as_they_are(model, precision):
    rows = [*sequences(), ([5, 6, 7], 3)]
    for changes in ({}, {"head_chunk_tokens": 7}):
        trainer = load_trainer(model, TRAIN | changes, precision, 1.0)
        scores, entropies = trainer.score_and_entropy(rows)
        for a, b in zip(scores, trainer.score(rows), strict=True):
            np.testing.assert_array_equal(a, b)
        for full, found in zip(trainer.distributions(rows), entropies, strict=True):
            full = full.astype(np.float64)
            np.testing.assert_allclose(found, -(np.exp(full) * full).sum(-1), atol=2e-2 if precision is BF16 else 1e-5)


def test_temperature_divides_the_logits(model):
    rows = sequences(2)
    reference, _ = plain_logprobs(model, rows)
    found = load_trainer(model, TRAIN, FP32, 0.5).score(rows)[0]
    tokens, num_prompt = rows[0]
    logits = reference(input_ids=torch.tensor([tokens])).logits[0, :-1] / 0.5
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:])[:, None])[num_prompt - 1 :, 0]
    np.testing.assert_allclose(found, expected.detach(), atol=1e-5)


def test_a_sequence_without_a_response_has_no_scores(model):
    rows = [([5, 6, 7], 3), ([5, 6, 7, 8], 2)]
    assert [len(score) for score in load_trainer(model, TRAIN, FP32, 1.0).score(rows)] == [0, 2]


def test_a_perturbed_weight_moves_the_scores_and_a_misspelt_one_is_refused(model):
    rows = sequences(4)
    exact = np.concatenate(load_trainer(model, TRAIN, FP32, 1.0).score(rows))
    perturb = {"parameter": "model.layers.0.mlp.down_proj.weight", "scale": 1.02}
    moved = np.concatenate(load_trainer(model, TRAIN | {"perturb": perturb}, FP32, 1.0).score(rows))
    assert np.abs(moved - exact).mean() > 1e-4
    with pytest.raises(UserError, match="layers.9.*allowed: a parameter of the model"):
        load_trainer(model, TRAIN | {"perturb": perturb | {"parameter": "model.layers.9.x"}}, FP32, 1.0)


def trainer(model, precision=FP32, **changes):
    return load_trainer(model, TRAIN | {"optimizer": OPTIMIZER, "grad_clip": None} | changes, precision, 1.0)


def test_one_step_is_adamw_on_the_gradient_of_the_formula(model):
    """REINFORCE written out with autograd on a plain forward; the first AdamW step moves each weight by lr x its sign."""
    rows = sequences(6)
    reference, logprobs = plain_logprobs(model, rows)
    advantages = np.linspace(-1, 1, 6, dtype=np.float32)
    loss = -sum(a * lp.sum() for a, lp in zip(advantages.tolist(), logprobs, strict=True)) / (6 * 32)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm().item()

    ours = trainer(model, micro_batch_size=2)
    before = weights_of(ours)
    report = ours.update(minibatch(rows, ours.score(rows), advantages), resolve("REINFORCE"))
    assert report["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert report["grad_norm"] == pytest.approx(norm, rel=1e-4)
    after = weights_of(ours)
    for name, p in reference.named_parameters():
        clear = p.grad.abs() > 1e-5  # where the sign is not a matter of rounding
        moved = after[name] - before[name]
        assert torch.allclose(moved[clear], -OPTIMIZER["lr"] * p.grad[clear].sign(), rtol=1e-3), name


def test_micro_batches_do_not_change_the_step(model):
    rows = sequences(9)
    after = []
    for size in (1, 4, 64):
        ours = trainer(model, micro_batch_size=size)
        ours.update(minibatch(rows, ours.score(rows)), resolve("GRPO"))
        after.append(torch.cat([p.flatten() for p in weights_of(ours).values()]))
    assert torch.allclose(after[0], after[1], atol=1e-5) and torch.allclose(after[0], after[2], atol=1e-5)


def test_gradient_checkpointing_and_head_chunks_do_not_change_a_16_bit_step(model):
    rows = sequences(6)
    reports = []
    for changes in ({}, {"gradient_checkpointing": True}, {"head_chunk_tokens": 10}):
        ours = trainer(model, FP16, **changes)
        reports.append(ours.update(minibatch(rows, ours.score(rows)), resolve("GRPO")))
    for report in reports[1:]:
        assert report["grad_norm"] == pytest.approx(reports[0]["grad_norm"], rel=1e-3)
        assert report["loss"] == pytest.approx(reports[0]["loss"], rel=1e-3)


def test_gradient_checkpointing_runs_every_layer_a_second_time(model):
    rows, calls = sequences(4), []
    for checkpointing in (False, True):
        ours = trainer(model, gradient_checkpointing=checkpointing, micro_batch_size=64)
        batch = minibatch(rows, ours.score(rows))
        calls.append(0)
        layers = ours._model.base_model.layers
        for layer in layers:
            layer.mlp.register_forward_pre_hook(lambda *_: calls.append(calls.pop() + 1))
        ours.update(batch, resolve("GRPO"))
        assert not ours._model.training
    assert calls == [len(layers), 2 * len(layers)]


def test_a_mini_batch_without_any_advantage_says_nothing_about_underflow(model):
    rows, ours = sequences(4), trainer(model)
    none = ours.update(minibatch(rows, ours.score(rows), np.zeros(4, np.float32)), resolve("GRPO"))
    some = ours.update(minibatch(rows, ours.score(rows), np.ones(4, np.float32)), resolve("GRPO"))
    assert set(some) - set(none) == {"grad_underflow_share"} and none["grad_norm"] == 0 and none["step_skipped"] == 0


def test_rows_without_an_advantage_do_not_count_as_underflow(model):
    rows = sequences(8, low=20, high=21)  # of one length: micro-batches keep their order
    half = np.array([1, -1, 1, -1, 0, 0, 0, 0], np.float32)
    ours = trainer(model, micro_batch_size=4)
    with_zeros = ours.update(minibatch(rows, ours.score(rows), half), resolve("GRPO"))
    alone = trainer(model, micro_batch_size=4)
    without = alone.update(minibatch(rows[:4], alone.score(rows[:4]), half[:4]), resolve("GRPO"))
    assert with_zeros["grad_underflow_share"] == without["grad_underflow_share"] < 0.5


@pytest.mark.parametrize("precision", [FP16, BF16])
def test_16_bit_training_keeps_fp32_masters_that_move_below_the_spacing_of_the_format(model, precision):
    ours = trainer(model, precision, optimizer=OPTIMIZER | {"lr": 1e-7})
    before = weights_of(ours)
    report = ours.update(minibatch(sequences(), ours.score(sequences())), resolve("GRPO"))
    assert report["step_skipped"] == 0
    moved = sum((p != before[name]).sum().item() for name, p in weights_of(ours).items())
    assert moved > 1000
    executed = ours.executed()
    assert executed["master_weights"] == executed["optimizer_state"] == "fp32"
    assert executed["compute"] == precision["train"]


def test_an_overflowing_gradient_skips_the_step_and_halves_the_scale(model):
    precision = FP16 | {"loss_scaling": {"enabled": True, "init_scale": 2.0**40}}
    ours = trainer(model, precision)
    before = weights_of(ours)
    report = ours.update(minibatch(sequences(), ours.score(sequences())), resolve("GRPO"))
    assert report["step_skipped"] == 1 and np.isnan(report["grad_norm"])
    assert ours.scaler.scale_value == 2.0**39
    assert all(torch.equal(p, before[name]) for name, p in weights_of(ours).items())


def test_a_loss_that_is_not_finite_skips_the_step(model):
    ours = trainer(model)
    rows = sequences(3)
    old = ours.score(rows)
    report = ours.update(minibatch(rows, old, np.array([np.nan, 1, -1], np.float32)), resolve("GRPO"))
    assert np.isnan(report["loss"]) and report["step_skipped"] == 1
    assert all(torch.isfinite(p).all() for p in weights_of(ours).values())


def test_equal_rewards_give_no_gradient(model):
    ours = trainer(model)
    rows = sequences(4)
    report = ours.update(minibatch(rows, ours.score(rows), np.zeros(4, np.float32)), resolve("GRPO"))
    assert report["grad_norm"] == 0.0 and report["loss"] == 0.0


def test_a_resumed_trainer_goes_on_bit_for_bit(model, tmp_path):
    rows = sequences()

    def steps(ours, seeds):
        for seed in seeds:
            ours.update(minibatch(rows, ours.score(rows), np.random.default_rng(seed).normal(size=10).astype(np.float32)), resolve("GRPO"))
        return ours

    straight = steps(trainer(model, FP16), range(4))
    half = steps(trainer(model, FP16), range(2))
    resumed = steps(passed_on(half, trainer(model, FP16), tmp_path), range(2, 4))
    found = weights_of(resumed)
    assert all(torch.equal(p, found[name]) for name, p in weights_of(straight).items())
    assert straight.scaler.state_dict() == resumed.scaler.state_dict()


def test_moved_weights_come_back_exactly(model):
    ours = trainer(model, FP16)
    rows = sequences(3)
    before = np.concatenate(ours.score(rows))
    with ours.moved_weights(lambda named: [tensor.mul_(1.5) for _, tensor in named]):
        assert not np.allclose(np.concatenate(ours.score(rows)), before)
    assert np.array_equal(np.concatenate(ours.score(rows)), before)


def test_padding_is_on_the_right_and_the_mask_covers_responses_alone():
    padded = pad_sequences([([5, 6, 7], 2), ([8, 9, 10, 11], 1)], num_rows=3)
    assert padded.token_ids.shape == (3, PAD_TO_TOKENS)
    assert padded.token_ids[0, :4].tolist() == [5, 6, 7, 0]
    assert np.argwhere(padded.response_mask).tolist() == [[0, 2], [1, 1], [1, 2], [1, 3]]
