"""Every row's loss and gradient against slow loops over plain floats (slow_losses.py)."""

import math

import pytest
import torch
from slow_losses import LENGTH_NORM, REFERENCES, make_batch, reference, rows_of, run

from suite.engines.losses import LossStatistics, advantages
from suite.spec.algorithms import ALGORITHMS

EVERY_ROW = pytest.mark.parametrize("name", ALGORITHMS)

# --- values and gradients --------------------------------------------------------------------------------------------


def test_every_row_has_a_reference():
    assert set(REFERENCES) == set(ALGORITHMS)


@EVERY_ROW
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_equal_the_formula_in_fp64(name, seed):
    batch = make_batch(seed)
    output, gradient = run(name, batch)
    loss, expected = reference(name, batch)
    assert output.loss.item() == pytest.approx(loss, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-14)


@EVERY_ROW
def test_the_random_batch_reaches_both_sides_of_every_bound(name):
    """Otherwise the comparison above would not have tested the clip, the cap or the mask."""
    statistics = run(name, make_batch(), **({"cap": 1.05} if name == "Token-IS-PG" else {}))[0].metrics
    row = ALGORITHMS[name]
    if row.ratio_level != "none" or row.divergence != "none":
        assert 0 < statistics["clip_fraction"] < 1
    if row.correction != "none":
        assert 0 < statistics["truncated_fraction" if row.correction == "truncate" else "masked_fraction"] < 1


@EVERY_ROW
def test_fp32_agrees_with_fp64(name):
    loss, expected = reference(name, make_batch(spread=0.1))
    output, gradient = run(name, make_batch(spread=0.1, dtype=torch.float32))
    assert output.loss.dtype == torch.float32
    # a ratio within fp32 rounding of a clip edge may fall on its other side: allow for one token in a hundred
    differing = (gradient - torch.tensor(expected)).abs() > 1e-6
    assert differing.double().mean() < 0.01 and output.loss.item() == pytest.approx(loss, abs=1e-3)


def test_one_token_by_hand():
    one = {"new": [[-1.0]], "old": [[-1.0 - math.log(1.5)]], "mu": [[-1.0 - math.log(1.5) - math.log(2.0)]]}
    batch = {k: torch.tensor(v).double() for k, v in one.items()}
    batch |= {"loss_mask": torch.ones(1, 1, dtype=torch.bool), "advantages": torch.tensor([2.0]).double()}
    # r = 1.5 is clipped to 1.28: P = 2.56, no gradient; rho = 2 is below C = 3; w = 3
    assert run("GRPO", batch)[0].loss.item() == pytest.approx(-2.56 / LENGTH_NORM)
    assert run("GRPO", batch)[1].item() == 0.0
    assert run("GRPO-Token-TIS", batch)[0].loss.item() == pytest.approx(-5.12 / LENGTH_NORM)
    assert run("PG-Seq-IS", batch)[1].item() == pytest.approx(-3.0 * 2.0 / LENGTH_NORM)
    batch["advantages"] = torch.tensor([-2.0]).double()  # now the clip does not bind: r A = -3, gradient r A
    assert run("GRPO", batch)[0].loss.item() == pytest.approx(3.0 / LENGTH_NORM)
    assert run("GRPO", batch)[1].item() == pytest.approx(3.0 / LENGTH_NORM)


def test_gspo_passes_each_token_the_gradient_of_the_sequence_ratio():
    """Straight-through: s is constant, s_t = s pi_t / sg[pi_t], so every token gets s A / |y|, not its own ratio."""
    old = torch.tensor([[-1.0, -2.0, -0.5]]).double()
    new = old + torch.tensor([[3e-4, -6e-4, 6e-4]]).double()  # mean 1e-4: inside the clip although tokens are not
    batch = {"new": new, "old": old, "mu": old, "advantages": torch.tensor([1.5]).double()}
    batch["loss_mask"] = torch.ones(1, 3, dtype=torch.bool)
    gradient = run("GSPO", batch)[1]
    torch.testing.assert_close(gradient, torch.full((1, 3), -math.exp(1e-4) * 1.5 / 3).double())
    batch["new"] = old + 5e-4  # beyond 1 + 4e-4 with A > 0: clipped, no gradient anywhere
    assert (run("GSPO", batch)[1] == 0).all()


def test_gspo_does_not_use_the_rollout_policy():
    batch = make_batch()
    torch.testing.assert_close(run("GSPO", batch)[1], run("GSPO", batch | {"mu": batch["mu"] - 1.0})[1])


@pytest.mark.parametrize("name", ["PG-Seq-MIS", "GRPO-Seq-MIS"])
def test_masking_zeroes_the_gradient_above_the_cap_and_only_there(name):
    batch = make_batch()
    numerator = batch["new"] if name == "PG-Seq-MIS" else batch["old"]
    log_weight = torch.where(batch["loss_mask"], numerator - batch["mu"], 0.0).sum(1)
    above = log_weight > math.log(3.0)
    gradient = run(name, batch)[1]
    assert above.any() and not above.all()
    assert (gradient[above] == 0).all()
    kept = gradient[~above].abs().sum(1) > 0
    assert kept.all() if name == "PG-Seq-MIS" else kept.any()


def test_truncation_keeps_the_gradient_that_masking_drops():
    batch = make_batch()
    masked, truncated = run("PG-Seq-MIS", batch)[1], run("PG-Seq-TIS", batch)[1]
    dropped = (masked == 0).all(1)
    assert (truncated[dropped].abs().sum(1) > 0).all()
    torch.testing.assert_close(masked[~dropped], truncated[~dropped])


# --- invariances -----------------------------------------------------------------------------------------------------


@EVERY_ROW
def test_on_policy_every_row_has_the_gradient_of_reinforce_up_to_its_normaliser(name):
    batch = make_batch()
    batch |= {"old": batch["new"], "mu": batch["new"]}
    gradient, plain = run(name, batch)[1], run("REINFORCE", batch)[1]
    lengths = batch["loss_mask"].sum(1, keepdim=True).double()
    normaliser = {
        "sum_over_length": torch.ones(1).double(),
        "token_mean_per_sequence": LENGTH_NORM / lengths,
        "token_mean": LENGTH_NORM / lengths.mean(),
    }[ALGORITHMS[name].aggregation]
    torch.testing.assert_close(gradient, plain * normaliser, rtol=1e-12, atol=0)


@EVERY_ROW
def test_micro_batches_add_up_to_the_mini_batch(name):
    batch = make_batch()
    total = int(batch["loss_mask"].sum())
    whole, gradient = run(name, batch)
    parts = [run(name, rows_of(batch, slice(i, i + 5)), 24, total) for i in range(0, 24, 5)]
    torch.testing.assert_close(sum(p.loss for p, _ in parts), whole.loss)
    torch.testing.assert_close(torch.cat([g for _, g in parts]), gradient)
    merged = sum((p.statistics for p, _ in parts[1:]), parts[0][0].statistics)
    assert isinstance(merged, LossStatistics) and merged.metrics() == pytest.approx(whole.metrics)


@EVERY_ROW
def test_the_order_of_the_responses_does_not_matter(name):
    batch = make_batch()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(run(name, rows_of(batch, order))[1], run(name, batch)[1][order])


@EVERY_ROW
@pytest.mark.parametrize("filling", [math.inf, -math.inf, math.nan, 1e30])
def test_padding_may_hold_anything(name, filling):
    batch = make_batch()
    dirty = {k: torch.where(batch["loss_mask"], batch[k], filling) for k in ("new", "old", "mu")}
    clean_output, clean_gradient = run(name, batch)
    output, gradient = run(name, batch | dirty)
    assert torch.equal(output.loss, clean_output.loss) and torch.equal(gradient, clean_gradient)
    assert output.metrics == clean_output.metrics
    assert (gradient[~batch["loss_mask"]] == 0).all()


@EVERY_ROW
def test_more_padding_changes_nothing(name):
    batch = make_batch()
    wider = {k: torch.cat([batch[k], torch.full((24, 4), -7.0).double()], 1) for k in ("new", "old", "mu")}
    wider["loss_mask"] = torch.cat([batch["loss_mask"], torch.zeros(24, 4, dtype=torch.bool)], 1)
    low_cap = {"cap": 0.5, "floor": 0.4} if ALGORITHMS[name].correction != "none" else {}  # below 1, an empty position's
    (output, gradient), (padded, wide_gradient) = run(name, batch, **low_cap), run(name, batch | wider, **low_cap)
    torch.testing.assert_close(wide_gradient[:, :-4], gradient)
    assert padded.metrics == pytest.approx(output.metrics) and not wide_gradient[:, -4:].any()


def test_the_rows_own_aggregation_length_wins_over_the_response_budget():
    batch = make_batch()
    torch.testing.assert_close(run("GRPO", batch, aggregation_length=4)[1], run("GRPO", batch)[1] * LENGTH_NORM / 4)


# --- edges -----------------------------------------------------------------------------------------------------------


@EVERY_ROW
@pytest.mark.parametrize("shifted", ["new", "old", "mu"])
@pytest.mark.parametrize("shift", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_overflowing_ratio_leaves_loss_gradient_and_metrics_finite(name, shifted, shift, dtype):
    batch = make_batch(dtype=dtype)
    batch[shifted][2] += shift
    output, gradient = run(name, batch)
    assert torch.isfinite(output.loss) and torch.isfinite(gradient).all()
    assert all(math.isfinite(value) for value in output.metrics.values())
    untouched = torch.arange(24) != 2
    torch.testing.assert_close(gradient[untouched], run(name, make_batch(dtype=dtype))[1][untouched])


def test_an_overflowing_weight_is_masked_truncated_or_held_at_the_limit_as_its_row_says():
    batch = rows_of(make_batch(), slice(1, 2))  # one full-length response
    batch["mu"] = batch["new"] - 1e4
    a, length = batch["advantages"].item(), batch["new"].shape[1]
    for name, weight in [("PG-Seq-MIS", 0.0), ("PG-Seq-TIS", 3.0), ("PG-Seq-IS", math.exp(20)), ("REINFORCE", 1.0)]:
        gradient = run(name, batch)[1]
        torch.testing.assert_close(gradient, torch.full((1, length), -weight * a / LENGTH_NORM).double())


def test_the_dual_clip_bounds_a_negative_advantage_and_can_be_switched_off():
    batch = rows_of(make_batch(), slice(1, 2)) | {"advantages": torch.tensor([-1.0]).double()}
    batch["old"] = batch["new"] - math.log(12.0)
    length = batch["new"].shape[1]
    bounded, gradient = run("DAPO", batch)
    assert bounded.loss.item() == pytest.approx(10.0) and (gradient == 0).all()
    assert bounded.metrics["clip_fraction"] == 1.0
    free, gradient = run("DAPO", batch, dual_clip=math.inf)
    assert free.loss.item() == pytest.approx(12.0)
    torch.testing.assert_close(gradient, torch.full((1, length), 12.0 / length).double())


@EVERY_ROW
def test_groups_of_equal_rewards_give_no_gradient(name):
    kind = ALGORITHMS[name].advantage
    rewards, groups = torch.tensor([0.0] * 12 + [0.3 if kind != "reward" else 0.0] * 12), torch.arange(24) // 4
    batch = make_batch() | {"advantages": advantages(rewards, groups, kind).double()}
    output, gradient = run(name, batch)
    assert output.loss.item() == 0 and (gradient == 0).all()


@EVERY_ROW
def test_an_empty_response_contributes_nothing_but_is_counted_in_the_mean(name):
    batch = make_batch()
    batch["loss_mask"][5] = False
    output, gradient = run(name, batch)
    loss, expected = reference(name, batch)
    assert output.loss.item() == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(gradient, torch.tensor(expected).double())
    nothing = run(name, batch | {"loss_mask": torch.zeros_like(batch["loss_mask"])}, num_tokens=1)
    assert nothing[0].loss.item() == 0 and (nothing[1] == 0).all() and nothing[0].metrics == {}


@EVERY_ROW
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_under_the_mask_is_not_hidden(name, bad):
    """A nan weight must not be masked away: the trainer has to see it, skip the step and count it."""
    uses_mu = "rollout" in (ALGORITHMS[name].anchor, *ALGORITHMS[name].weight.split("/"))
    for key in ["new"] + ["mu"] * (uses_mu and math.isnan(bad)):
        batch = make_batch()
        batch[key][3, 0] = bad
        output, _ = run(name, batch)
        bounded_by_the_ratio_limit = ALGORITHMS[name].ratio_level == "token" and not math.isnan(bad)
        assert bounded_by_the_ratio_limit or not math.isfinite(output.loss.item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logprobs_are_summed_in_fp32(dtype):
    """160 tokens of log-ratio 2^-7 sum to 1.25; weights and loss come out in fp32, not rounded to 16 bits again."""
    new, mu = torch.full((1, 160), -1.0, dtype=dtype), torch.full((1, 160), -1.0 - 2**-7, dtype=dtype)
    batch = {"new": new, "old": new, "mu": mu, "advantages": torch.ones(1)}
    batch["loss_mask"] = torch.ones(1, 160, dtype=torch.bool)
    output = run("PG-Seq-IS", batch)[0]
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(math.exp(1.25) * 160 / LENGTH_NORM, rel=1e-6)
    assert output.metrics["importance_weight_max"] == pytest.approx(math.exp(1.25), rel=1e-6)


# --- what the metrics say --------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    """Two responses with w = 1 and w = 4 under a cap of 3: (1 + 4)^2 / (2 (1 + 16)) = 25/34."""
    new = torch.tensor([[-1.0, 99.0], [-1.0, -1.0]]).double()
    mu = new - torch.tensor([[0.0, 0.0], [math.log(2.0), math.log(2.0)]]).double()
    mask = torch.tensor([[True, False], [True, True]])
    batch = {"new": new, "old": mu, "mu": mu, "advantages": torch.tensor([1.0, 1.0]).double(), "loss_mask": mask}
    raw = {"importance_weight_mean": 2.5, "importance_weight_max": 4.0, "effective_sample_size": 25 / 34}
    unclipped = {"clip_fraction": 0.0, "log_ratio_limited_fraction": 0.0}
    mis = raw | unclipped | {"correction_mean": 0.5, "truncated_fraction": 0.0, "masked_fraction": 0.5}
    tis = raw | unclipped | {"correction_mean": 2.0, "truncated_fraction": 0.5, "masked_fraction": 0.0}
    assert run("PG-Seq-MIS", batch)[0].metrics == pytest.approx(mis)
    assert run("PG-Seq-TIS", batch)[0].metrics == pytest.approx(tis)
    grpo = raw | unclipped | {"clip_fraction": 2 / 3}  # r = 2 on two of three tokens, A > 0
    assert run("GRPO", batch)[0].metrics == pytest.approx(grpo), "a row without a weight reports no correction"
    negative = batch | {"advantages": -batch["advantages"]}  # r = 2 with A < 0 is not held by the clip
    assert run("GRPO", negative)[0].metrics == pytest.approx(raw | unclipped)
