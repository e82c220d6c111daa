"""What other systems call the same thing: their formulas, as we read them in their sources and wrote them out here, give our
numbers on fixed vectors to 1e-6.

So a number from verl, OAT (the paper's code), NeMo-RL, TRL, OpenRLHF, prime-rl or slime can be laid beside ours, and
where a peer's definition differs (another sign, another mean, truncated weights) the difference is stated by a test.
Nothing of theirs is run: that a peer changed, or that we misread one, no test here can see. Not written out are verl's PPO
clip, Vanilla-GSPO, PG-Seq-IS and PG-Seq-TIS, DAPO, and advantages (tests/test_losses.py has our own equations of all rows).
"""

import math

import numpy as np
import pytest
import torch

from suite.engines.losses import policy_loss
from suite.measure.mismatch import estimates, prompt_sums, token_statistics
from suite.spec.algorithms import resolve
from suite.spec.estimands import ESTIMANDS

# Three responses of 4, 1 and 6 tokens; the sixth token is an outlier of the kind the paper shows (mu 0.97, pi 0.55).
MU = [[-0.50, -1.20, -0.01, -3.00], [-0.70], [-0.0304592, -2.30, -0.10, -0.90, -4.00, -0.20]]
PI = [[-0.52, -1.15, -0.02, -2.60], [-0.70], [-0.5978370, -2.31, -0.25, -0.88, -4.70, -0.19]]
LENGTHS = [len(response) for response in MU]
PAIRS = [(pi, mu) for a, b in zip(PI, MU, strict=True) for pi, mu in zip(a, b, strict=True)]  # (train, rollout)
SEQUENCES = [list(zip(a, b, strict=True)) for a, b in zip(PI, MU, strict=True)]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def approx(value):
    return pytest.approx(value, rel=1e-6, abs=1e-12)


@pytest.fixture(scope="module")
def ours():
    mu, pi = np.concatenate(MU), np.concatenate(PI)
    sums = prompt_sums(["a", "b", "a"], LENGTHS, mu, pi)
    return estimates(sums) | token_statistics(mu, pi, LENGTHS)


# --- metrics ---------------------------------------------------------------------------------------------------------

PEER_METRICS = {  # (peer, its name): (our name, the peer's formula on these vectors)
    ("verl", "rollout_corr/kl"): ("k1_nats_per_token", mean(-(p - m) for p, m in PAIRS)),
    ("OpenRLHF", "vllm_kl"): ("k1_nats_per_token", mean(m - p for p, m in PAIRS)),
    ("slime", "mismatch_kl"): ("k1_nats_per_token", mean(m - p for p, m in PAIRS)),
    ("OAT", "kl_sample_train_v1"): ("k1_nats_per_token", sum(m - p for p, m in PAIRS) / len(PAIRS)),
    ("OAT", "kl_sample_train_v2"): ("k2_nats_per_token", 0.5 * sum((m - p) ** 2 for p, m in PAIRS) / len(PAIRS)),
    ("verl", "rollout_corr/k3_kl"): ("k3_nats_per_token", mean(math.exp(p - m) - (p - m) - 1 for p, m in PAIRS)),
    ("prime-rl", "mismatch_kl"): ("k3_nats_per_token", mean(math.exp(p - m) - 1 - (p - m) for p, m in PAIRS)),
    ("NeMo-RL", "gen_kl_error"): ("k3_nats_per_token", mean(math.exp(p) / math.exp(m) - (p - m) - 1 for p, m in PAIRS)),
    ("NeMo-RL", "policy_kl_error"): (
        "reverse_k3_nats_per_token",
        mean(math.exp(m - p) - (m - p) - 1 for p, m in PAIRS),
    ),
    ("NeMo-RL", "token_mult_prob_error"): ("mult_prob_error", mean(math.exp(abs(m - p)) for p, m in PAIRS)),
    ("NeMo-RL", "max_seq_mult_prob_error"): (
        "seq_mult_prob_error_max",
        max(mean(math.exp(abs(m - p)) for p, m in sequence) for sequence in SEQUENCES),
    ),
    ("NeMo-RL", "is_oob_ratio at [0.9, 1.1]"): (
        "out_of_band_share",
        mean(not 0.9 <= math.exp(p - m) <= 1.1 for p, m in PAIRS),
    ),
    ("verl", "training/rollout_probs_diff_mean"): (
        "prob_diff_mean",
        mean(abs(math.exp(p) - math.exp(m)) for p, m in PAIRS),
    ),
    ("verl", "training/rollout_actor_probs_pearson_corr"): (
        "prob_pearson",
        np.corrcoef(np.exp([p for p, _ in PAIRS]), np.exp([m for _, m in PAIRS]))[0, 1],
    ),
    # OAT subtracts the other way round: minus its minimum is the maximum of the paper's figure, and the reverse
    ("OAT", "-sampler_learner_prob_diff_min"): ("prob_diff_max", -min(math.exp(m) - math.exp(p) for p, m in PAIRS)),
    ("OAT", "-sampler_learner_prob_diff_max"): ("prob_diff_min", -max(math.exp(m) - math.exp(p) for p, m in PAIRS)),
    ("TRL", "sampling/sampling_logp_difference/mean"): ("logprob_diff_mean", mean(abs(p - m) for p, m in PAIRS)),
    ("SkyRL", "rollout_train_logprobs_abs_diff_mean"): ("logprob_diff_mean", mean(abs(m - p) for p, m in PAIRS)),
    # figure 5: nats per sequence, the signed sum over tokens first, then the mean over sequences
    ("paper", "KL[mu||pi]"): ("seq_kl_k1_nats", mean(sum(m - p for p, m in sequence) for sequence in SEQUENCES)),
}


@pytest.mark.parametrize("peer", PEER_METRICS, ids=[f"{system}:{name}" for system, name in PEER_METRICS])
def test_the_peers_formula_gives_our_metric(ours, peer):
    name, theirs = PEER_METRICS[peer]
    assert ours[name] == approx(theirs)


def test_fixed_vectors_are_far_from_every_symmetry(ours):
    """If mu and pi could be swapped, or tokens and sequences, without a change, agreement would prove nothing."""
    assert abs(ours["k1_nats_per_token"]) > 0.01
    assert ours["k3_nats_per_token"] != approx(ours["reverse_k3_nats_per_token"])
    assert ours["prob_diff_max"] != approx(-ours["prob_diff_min"])
    assert len(set(LENGTHS)) == len(LENGTHS) and 0 < ours["out_of_band_share"] < 1


def test_slime_averages_over_samples_first_so_it_differs_unless_lengths_are_equal(ours):
    per_sample = mean(mean(abs(p - m) for p, m in sequence) for sequence in SEQUENCES)
    assert ours["logprob_diff_mean"] != approx(per_sample)
    equal = prompt_sums(["a", "b"], [2, 2], np.array(MU[0]), np.array(PI[0]))
    pairs = SEQUENCES[0]
    per_sample = mean(mean(abs(p - m) for p, m in half) for half in (pairs[:2], pairs[2:]))
    assert estimates(equal)["logprob_diff_mean"] == approx(per_sample)


def verl_effective_sample_size(log_weights, lengths, cap=2.0):
    """1 / mean((w / mean w)^2), both means over tokens, each of which has the truncated weight of its sequence."""
    weights = np.repeat(np.minimum(np.exp(log_weights), cap), lengths)
    return 1 / np.mean((weights / weights.mean()) ** 2)


def our_effective_sample_size(log_weights, lengths):
    r = np.repeat(np.asarray(log_weights) / lengths, lengths)
    return token_statistics(np.full(r.size, -8.0), r - 8.0, lengths)["effective_sample_size"]


def test_verls_effective_sample_size_is_ours_for_equal_lengths_and_weights_below_its_cap():
    log_weights = [0.3, -0.5, 0.1, 0.6]
    assert our_effective_sample_size(log_weights, [3, 3, 3, 3]) == approx(verl_effective_sample_size(log_weights, [3, 3, 3, 3]))


def test_verls_effective_sample_size_lets_long_responses_weigh_more():
    log_weights = [0.3, -0.5, 0.1, 0.6]
    theirs = verl_effective_sample_size(log_weights, [1, 2, 3, 40])
    assert theirs > our_effective_sample_size(log_weights, [1, 2, 3, 40]) + 0.05
    assert our_effective_sample_size(log_weights, [1, 2, 3, 40]) == approx(our_effective_sample_size(log_weights, [3, 3, 3, 3]))


def test_only_an_effective_sample_size_of_untruncated_weights_shows_the_collapse():
    one_dominates, lengths = [6.0, 0.0, 0.0, 0.0], [1, 1, 1, 1]
    assert our_effective_sample_size(one_dominates, lengths) < 0.26
    assert verl_effective_sample_size(one_dominates, lengths) > 0.89


# Peers' names in suite/spec/estimands.py for which no formula stands above: definitions stated in a test of their own, with a band
# or a sign of their own, or a mean of rewards. Another name without a formula fails the test below.
WITHOUT_FORMULA = {
    "AReaL behave_approx_kl", "slime mismatch_k3_kl", "slime train_rollout_logprob_abs_diff (mean over samples first)",
    "open-instruct vllm_vs_local_logprob_diff_mean", "torchtitan bit_wise/logprob_diff/mean", "verl rollout_is_oob_ratio",
    "SkyRL mask ratio (each with its own band)", "verl critic/rewards/mean", "AReaL update_successful (its complement)",
    "verl rollout_is_eff_sample_size (there over tokens, so that long responses weigh more, and of truncated weights)",
}  # fmt: skip


def test_a_peers_name_stands_only_on_the_quantity_whose_formula_gives_it():
    known = {f"{system} {name.split(' at ')[0]}".replace("OAT", "oat fork"): ours for (system, name), (ours, _) in PEER_METRICS.items()}
    named = {peer: row.name for row in ESTIMANDS.values() for peer in row.peers if not peer.startswith("paper ")}
    assert {peer: known.get(peer, "no formula") for peer in named if peer not in WITHOUT_FORMULA} == {
        peer: ours for peer, ours in named.items() if peer not in WITHOUT_FORMULA
    }
    assert named.keys() >= WITHOUT_FORMULA and named.keys() >= known.keys() - {"paper KL[mu||pi]"}


def test_rolls_signed_difference_cancels_where_ours_does_not():
    mu, pi = np.log([0.5, 0.5]), np.log([0.6, 0.4])
    found = estimates(prompt_sums(["a"], [2], mu, pi))
    assert np.mean(np.exp(pi) - np.exp(mu)) == pytest.approx(0, abs=1e-15)
    assert found["prob_diff_mean"] == approx(0.1)
    assert (found["prob_diff_max"], found["prob_diff_min"]) == approx((0.1, -0.1))


# --- weights of the losses -------------------------------------------------------------------------------------------

# log pi(theta), after some gradient steps from PI
THETA = [[-0.50, -1.10, -0.03, -2.50], [-0.90], [-0.70, -2.30, -0.20, -0.80, -4.60, -0.15]]
ADVANTAGE = [0.5, -1.0, 0.25]
LENGTH = 8
CAP = 0.7  # low, so that truncation and masking both happen on these vectors
WIDTH = max(LENGTHS)


def padded(responses, filling=-1.0):
    return torch.tensor([r + [filling] * (WIDTH - len(r)) for r in responses], dtype=torch.float64)


MASK = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
NEW, OLD, ROLLOUT = padded(THETA), padded(PI), padded(MU)
A = torch.tensor(ADVANTAGE, dtype=torch.float64)[:, None]


def our_gradient(name, **overrides):
    new = NEW.clone().requires_grad_()
    row = resolve(name, **overrides)
    output = policy_loss(row, new, OLD, ROLLOUT, MASK, A[:, 0], num_sequences=3, num_tokens=11, length_norm=LENGTH)
    output.loss.backward()
    return new.grad


def peer_gradient(token_loss, per_token_mean=False):
    """Gradient of a peer's token losses (B, T): sum over a response / L (or its token mean), then the mean of those."""
    new = NEW.clone().requires_grad_()
    losses = (token_loss(new) * MASK).sum(1)
    (losses / (MASK.sum(1) if per_token_mean else LENGTH)).mean().backward()
    return new.grad


def ppo(new, low=0.2, high=0.2):
    ratio = torch.exp(new - OLD)
    return torch.max(-A * ratio, -A * torch.clamp(ratio, 1 - low, 1 + high))


def response_weight(logps):
    return torch.exp(((logps - ROLLOUT) * MASK).sum(1, keepdim=True)).detach()


RHO, RHO_TOKEN = response_weight(OLD), torch.exp(OLD - ROLLOUT)
W, W_TOKEN = response_weight(NEW), torch.exp(NEW - ROLLOUT)

PEER_LOSSES = {  # (peer, what it calls it): (our row, its token loss)
    ("OAT", "drgrpo"): ("GRPO", ppo),
    ("OAT", "tis_c"): ("GRPO-Token-TIS", lambda new: ppo(new) * RHO_TOKEN.clamp(max=CAP)),
    ("OAT", "ppo_use_seq_is"): ("GRPO-Seq-MIS", lambda new: ppo(new) * (RHO <= CAP) * RHO),
    ("OAT", "use_seq_is, as in its seq_mis scripts"): ("PG-Seq-TIS", lambda new: -W.clamp(max=CAP) * A * new),
    ("OAT", "use_seq_is without a cap"): ("PG-Seq-IS", lambda new: -W * A * new),
    ("OAT", "use_token_is"): ("Token-IS-PG", lambda new: -W_TOKEN.clamp(max=CAP) * A * new),
    ("OAT", "reinforce_update"): ("REINFORCE", lambda new: -A * new),
    ("TRL", "token_truncate"): ("GRPO-Token-TIS", lambda new: ppo(new) * torch.clamp(RHO_TOKEN, max=CAP)),
    ("TRL", "sequence_truncate"): ("GRPO-Seq-TIS", lambda new: ppo(new) * torch.clamp(RHO, max=CAP)),
    ("TRL", "sequence_mask"): ("GRPO-Seq-MIS", lambda new: ppo(new) * RHO.masked_fill(RHO > CAP, 0.0)),
    # verl's PG-Seq-MIS has no mask: clamping w pi_t / sg[pi_t] at C has no gradient above C
    ("verl", "PG-Seq-MIS"): (
        "PG-Seq-MIS",
        lambda new: -A * torch.clamp(W * torch.exp(new - new.detach()), max=CAP),
    ),
}


@pytest.mark.parametrize("peer", PEER_LOSSES, ids=[f"{system}:{name}" for system, name in PEER_LOSSES])
def test_the_peers_loss_has_the_gradient_of_our_row(peer):
    name, token_loss = PEER_LOSSES[peer]
    row = resolve(name)
    overrides = {"cap": CAP} if row.correction != "none" else {}
    overrides |= {"clip_high": 0.2} if row.clip_high is not None else {}
    torch.testing.assert_close(our_gradient(name, **overrides), peer_gradient(token_loss), rtol=1e-6, atol=1e-12)


def test_oats_gspo_has_the_gradient_of_our_row_inside_and_outside_its_clip():
    def oat(new, low=3e-4, high=4e-4):
        log_s = ((new.detach() - OLD) * MASK).sum(1, keepdim=True) / MASK.sum(1, keepdim=True)
        ratio = torch.exp(log_s) * torch.exp(new) / torch.exp(new).detach()
        return torch.max(-A * ratio, -A * torch.clamp(ratio, 1 - low, 1 + high))

    expected = peer_gradient(oat, per_token_mean=True)
    torch.testing.assert_close(our_gradient("GSPO"), expected, rtol=1e-6, atol=1e-12)
    wide = peer_gradient(lambda new: oat(new, 0.5, 0.5), per_token_mean=True)
    torch.testing.assert_close(our_gradient("GSPO", clip_low=0.5, clip_high=0.5), wide, rtol=1e-6, atol=1e-12)
    assert (expected[MASK] == 0).any() and not torch.equal(expected, wide)


def test_the_cap_divides_these_responses_and_tokens():
    """Otherwise the comparison would not tell truncating from masking, or either from doing nothing."""
    for weight in (RHO, W):
        assert (weight > CAP).any() and (weight <= CAP).any()
    for weight in (RHO_TOKEN, W_TOKEN):
        assert (weight[MASK] > CAP).any() and (weight[MASK] <= CAP).any()


def test_oats_scripts_named_mis_truncate_and_so_differ_from_the_formula_of_that_name():
    oat = peer_gradient(PEER_LOSSES["OAT", "use_seq_is, as in its seq_mis scripts"][1])
    assert not torch.allclose(oat, our_gradient("PG-Seq-MIS", cap=CAP))


def test_the_sequence_ratio_is_a_product_of_token_ratios_not_their_sum():
    """The slip that a review of unsloth-zoo#870 found."""
    weight = (-our_gradient("PG-Seq-IS") * LENGTH * 3 / A)[:, 0]
    products = [math.prod(math.exp(n - m) for n, m in zip(a, b, strict=True)) for a, b in zip(THETA, MU, strict=True)]
    sums = [sum(math.exp(n - m) for n, m in zip(a, b, strict=True)) for a, b in zip(THETA, MU, strict=True)]
    assert weight.tolist() == approx(products) and weight.tolist() != approx(sums)
