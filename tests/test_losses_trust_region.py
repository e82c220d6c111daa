"""Rows with a trust region, a band or another anchor, worked by hand and at their edges."""

import math

import pytest
import torch
from slow_losses import LENGTH_NORM, make_batch, rows_of, run

from suite.engines.losses import policy_loss
from suite.spec.algorithms import ALGORITHMS, resolve

RATIO_ROWS = [name for name, row in ALGORITHMS.items() if row.anchor and row.weight != "old/rollout"]


def one_token(pi: float, mu: float, advantage: float, old: float | None = None) -> dict:
    """A response of one token with these probabilities."""
    prob = {"new": pi, "old": mu if old is None else old, "mu": mu}
    batch = {name: torch.tensor([[math.log(p)]], dtype=torch.float64) for name, p in prob.items()}
    return batch | {"loss_mask": torch.ones(1, 1, dtype=torch.bool), "advantages": torch.tensor([advantage]).double()}


@pytest.mark.parametrize(
    ("pi", "mu", "advantage", "kept"),
    [
        (0.90, 0.30, 1.0, False),  # pushed up, and risen by 0.6
        (0.90, 0.30, -1.0, True),  # pushed back down
        (0.10, 0.70, -1.0, False),  # pushed down, and fallen by 0.6
        (0.10, 0.70, 1.0, True),
        (0.02, 0.001, 1.0, True),  # 20 times as likely, and only 0.019 more: a PPO clip would hold it
        (0.64, 0.50, 1.0, True),  # 0.14
        (0.66, 0.50, 1.0, False),  # 0.16
    ],
)
def test_dppo_tv_drops_a_token_that_has_moved_too_far_the_way_it_is_pushed(pi, mu, advantage, kept):
    output, gradient = run("DPPO-TV", one_token(pi, mu, advantage))
    assert gradient.item() == pytest.approx(-kept * min(pi / mu, 20.0) * advantage / LENGTH_NORM)
    assert output.metrics["clip_fraction"] == 1 - kept


def test_dppo_kl_by_hand():
    """mu = 1/2, pi = 3/4: KL = ln(4/3)/2 = 0.1438; pi = 0.6: 0.0204."""
    far, near = one_token(0.75, 0.5, 1.0), one_token(0.6, 0.5, 1.0)
    assert run("DPPO-KL", far)[1].item() == 0 and run("DPPO-KL", near)[1].item() == pytest.approx(-1.2 / LENGTH_NORM)
    kl = math.log(4 / 3) / 2
    assert run("DPPO-KL", far, divergence_high=kl * 1.0001)[1].item() != 0
    assert run("DPPO-KL", far, divergence_high=kl * 0.9999)[1].item() == 0
    assert run("DPPO-KL", far, divergence_low=1e-9)[1].item() == 0, "the other side's bound says nothing"


@pytest.mark.parametrize("name", ["DPPO-TV", "DPPO-KL"])
def test_a_bound_may_be_lifted_on_one_side(name):
    """The mask that suffices according to the DPPO paper: A < 0 and a fall of at least 0.5."""
    rise, fall = one_token(0.95, 0.05, 1.0), one_token(0.05, 0.95, -1.0)
    wide = {"divergence_high": math.inf}
    assert run(name, rise)[1].item() == 0 and run(name, rise, **wide)[1].item() != 0
    assert run(name, fall, **wide)[1].item() == 0
    assert run("DPPO-TV", fall, divergence_low=0.91)[1].item() != 0


@pytest.mark.parametrize("name", ["DPPO-TV", "DPPO-KL"])
def test_certain_tokens_stay_finite(name):
    """log pi of 0 leaves nothing for other tokens: the divergence is 0 or infinite, never nan."""
    for pi, mu in [(1.0, 1.0), (1.0, 0.5), (0.5, 1.0), (1.0, 1e-30), (1e-30, 1.0)]:
        for advantage in (1.0, -1.0, 0.0):
            output, gradient = run(name, one_token(pi, mu, advantage))
            assert torch.isfinite(output.loss) and torch.isfinite(gradient).all()
            beyond = advantage * (pi - mu) > 0
            assert (gradient.item() == 0) == (beyond or advantage == 0)


def test_icepop_keeps_the_weight_inside_its_band_and_nothing_outside():
    for rho, expected in [(0.4, 0.0), (0.6, 0.6), (1.0, 1.0), (4.9, 4.9), (5.1, 0.0)]:
        output, gradient = run("IcePop", one_token(pi=0.1 * rho, mu=0.1, advantage=1.0, old=0.1 * rho))
        assert gradient.item() == pytest.approx(-expected / LENGTH_NORM)
        assert output.metrics["masked_fraction"] == (expected == 0)


def test_a_geometric_mean_does_not_grow_with_the_length_where_a_product_does():
    """Every token 0.05 % more likely: inside 1.001 at any length; the product passes 3 at 2,200 tokens."""
    for num_tokens, product_is_kept in [(10, True), (3000, False)]:
        new = torch.full((1, num_tokens), -1.0, dtype=torch.float64)
        batch = {"new": new, "old": new, "mu": new - 5e-4, "advantages": torch.ones(1).double()}
        batch["loss_mask"] = torch.ones(1, num_tokens, dtype=torch.bool)
        torch.testing.assert_close(run("GRPO-Geo-RS", batch)[1], run("GRPO", batch)[1])  # kept, with weight 1
        assert bool(run("GRPO-Seq-MIS", batch)[1].any()) == product_is_kept


def test_a_response_outside_the_geometric_band_is_dropped_whole():
    batch = make_batch()
    log_g = torch.where(batch["loss_mask"], batch["old"] - batch["mu"], 0.0).sum(1) / batch["loss_mask"].sum(1)
    kept = (log_g >= math.log(0.999)) & (log_g <= math.log(1.001))
    assert kept.any() and not kept.all()
    gradient, plain = run("GRPO-Geo-RS", batch)[1], run("GRPO", batch)[1]
    assert torch.equal(gradient[kept], plain[kept]) and not gradient[~kept].any()


def test_cispo_keeps_the_gradient_of_tokens_that_ppo_clips():
    batch = one_token(pi=0.8, mu=0.1, advantage=1.0)  # r = 8
    assert run("GRPO", batch)[1].item() == 0
    assert run("CISPO", batch)[1].item() == pytest.approx(-5.0)
    assert run("CISPO", batch, cap=1.28)[1].item() == pytest.approx(-1.28)
    low = one_token(pi=0.05, mu=0.1, advantage=1.0)  # r = 0.5
    assert run("CISPO", low)[1].item() == pytest.approx(-0.5) and run("CISPO", low, floor=0.8)[1].item() == pytest.approx(-0.8)
    assert run("CISPO", low, floor=0.8)[0].metrics["truncated_fraction"] == 1.0


# --- the anchor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RATIO_ROWS)
def test_anchor_rollout_is_the_row_with_the_samplers_log_probs_as_the_old_ones(name):
    batch = make_batch()
    anchored, gradient = run(name, batch, anchor="rollout")
    expected, expected_gradient = run(name, batch | {"old": batch["mu"]}, anchor="trainer")
    assert torch.equal(anchored.loss, expected.loss) and torch.equal(gradient, expected_gradient)
    assert anchored.metrics == expected.metrics
    assert not torch.equal(gradient, run(name, batch, anchor="trainer")[1])


@pytest.mark.parametrize("name", RATIO_ROWS)
def test_anchor_rollout_needs_no_old_log_probs(name):
    row, batch = resolve(name, anchor="rollout"), rows_of(make_batch(), slice(0, 4))
    assert not row.needs_old_trainer_logprobs and resolve(name, anchor="trainer").needs_old_trainer_logprobs
    given = [batch["new"], None, batch["mu"], batch["loss_mask"], batch["advantages"]]
    assert torch.isfinite(policy_loss(row, *given, num_sequences=4, num_tokens=9, length_norm=9).loss)


def test_cispo_anchored_at_the_rollout_is_the_token_level_truncated_policy_gradient():
    batch = make_batch()
    shared = {"cap": 3.0, "aggregation": "sum_over_length"}
    torch.testing.assert_close(run("CISPO", batch, anchor="rollout", **shared)[1], run("Token-IS-PG", batch, **shared)[1])


@pytest.mark.parametrize("name", ["GRPO", "GSPO", "CISPO", "DPPO-TV"])
def test_with_anchor_rollout_a_nan_of_the_sampler_is_seen_and_padding_is_not(name):
    batch = make_batch()
    dirty = batch | {"mu": torch.where(batch["loss_mask"], batch["mu"], math.nan)}
    assert torch.equal(run(name, dirty, anchor="rollout")[1], run(name, batch, anchor="rollout")[1])
    batch["mu"][3, 0] = math.nan
    assert not torch.isfinite(run(name, batch, anchor="rollout")[0].loss)
