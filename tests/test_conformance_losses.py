"""The losses of DPPO, IcePop, CISPO and Geo-RS as verl, prime-rl, slime and TRL write them, on fixed vectors: each formula
from its source (named in the row of algorithms.py), and where a peer's default is another one, the setting that gives it."""

import math

import pytest
import torch

from suite.engines.losses import policy_loss
from suite.spec.algorithms import resolve

MU = [[-0.50, -1.20, -0.01, -3.00], [-0.70, -0.03, -2.00], [-0.03, -2.30, -0.10, -0.90, -4.00, -0.20], [-1.000, -0.400]]
PI = [[-0.52, -1.15, -0.02, -2.60], [-0.80, -0.02, -2.30], [-0.60, -2.31, -0.25, -0.88, -4.70, -0.19], [-1.002, -0.399]]
THETA = [[-0.50, -0.50, -0.60, -1.90], [-0.75, -0.70, -0.30], [-0.01, -0.80, -0.40, -0.80, -0.90, -0.15], [-1.100, -0.300]]
ADVANTAGE = [0.5, -1.0, 0.25, -0.5]
LENGTH, CAP = 8, 3.0
WIDTH = max(map(len, MU))


def padded(responses):
    return torch.tensor([response + [-1.0] * (WIDTH - len(response)) for response in responses], dtype=torch.float64)


MASK = torch.arange(WIDTH) < torch.tensor([len(response) for response in MU])[:, None]
NEW, OLD, ROLLOUT = padded(THETA), padded(PI), padded(MU)
A = torch.tensor(ADVANTAGE, dtype=torch.float64)[:, None]


def our_gradient(name, **overrides):
    new = NEW.clone().requires_grad_()
    row = resolve(name, aggregation="sum_over_length", **overrides)
    policy_loss(row, new, OLD, ROLLOUT, MASK, A[:, 0], num_sequences=len(MU), length_norm=LENGTH).loss.backward()
    return new.grad


def peer_gradient(token_loss):
    new = NEW.clone().requires_grad_()
    ((token_loss(new) * MASK).sum(1) / LENGTH).mean().backward()
    return new.grad


def ppo(new, old, low=0.2, high=0.28):
    ratio = torch.exp(new - old)
    return torch.max(-A * ratio, -A * torch.clamp(ratio, 1 - low, 1 + high))


def verl_dppo(valid, new, cap=CAP):
    ratio = torch.exp(torch.clamp(new - ROLLOUT, -20.0, 20.0))
    return -A * torch.clamp(ratio, max=cap).detach() * new * valid.detach().double()


def verl_dppo_tv(new, bound=0.15):
    moved = new.exp() - ROLLOUT.exp()
    return verl_dppo(torch.where(A > 0, moved <= bound, moved >= -bound), new)


def verl_dppo_kl(new, bound=0.05):
    prob, old_prob = new.exp(), ROLLOUT.exp()
    kl = old_prob * (ROLLOUT - new) + (1 - old_prob) * torch.log((1.0 - old_prob + 1e-8) / (1.0 - prob + 1e-8))
    return verl_dppo(torch.where(A > 0, (kl <= bound) | (prob <= old_prob), (kl <= bound) | (prob >= old_prob)), new)


def prime_dppo(new, bound=0.2):
    moved = new.exp() - ROLLOUT.exp()
    return -(~torch.where(A > 0, moved > bound, moved < -bound) * A * torch.exp(new - ROLLOUT))  # kl_tau 0


def slime_icepop(new, low=0.5, high=CAP):
    ratio = torch.exp(OLD - ROLLOUT)
    return ppo(new, OLD) * torch.where((ratio >= low) & (ratio <= high), ratio, torch.zeros_like(ratio))


def cispo(new, lowest, highest):
    return -torch.clamp(torch.exp(new - OLD), lowest, highest).detach() * A * new


def verl_geo_rs(new, lower=0.999, upper=1.001):
    k1 = (-(OLD - ROLLOUT) * MASK).sum(1, keepdim=True) / MASK.sum(1, keepdim=True)
    return ppo(new, OLD) * ((k1 >= math.log(lower)) & (k1 <= math.log(upper)))


PEERS = {  # (peer, what it calls it): (our row, its settings here, the peer's token loss)
    ("verl", "dppo_tv"): ("DPPO-TV", {"cap": CAP}, verl_dppo_tv),
    ("verl", "dppo_kl"): ("DPPO-KL", {"cap": CAP}, verl_dppo_kl),
    ("prime-rl", "default_loss_fn"): (
        "DPPO-TV", {"cap": math.inf, "divergence_low": 0.2, "divergence_high": 0.2}, prime_dppo,
    ),
    ("slime", "icepop_function"): ("IcePop", {"cap": CAP}, slime_icepop),
    ("TRL", "cispo"): ("CISPO", {"cap": CAP}, lambda new: cispo(new, 0.0, CAP)),
    ("slime", "compute_cispo_loss, eps_clip 1"): ("CISPO", {"cap": 1.28}, lambda new: cispo(new, 0.0, 1 + 0.28)),
    ("verl", "cispo"): ("CISPO", {"cap": 1.2, "floor": 0.8}, lambda new: cispo(new, 1 - 0.2, 1 + 0.2)),
    ("verl", "seq_mean_k1"): ("GRPO-Geo-RS", {"floor": 1 / 1.001, "cap": 1 / 0.999}, verl_geo_rs),
    ("verl", "bypass_mode, ppo_clip"): ("GRPO", {"anchor": "rollout"}, lambda new: ppo(new, ROLLOUT)),
}  # fmt: skip


@pytest.mark.parametrize("peer", PEERS, ids=[f"{system}:{name}" for system, name in PEERS])
def test_the_peers_loss_has_the_gradient_of_our_row(peer):
    name, overrides, token_loss = PEERS[peer]
    expected = peer_gradient(token_loss)
    assert expected[MASK].any() and (expected[MASK] == 0).any() or name == "CISPO", "the vectors reach both sides of a bound"
    torch.testing.assert_close(our_gradient(name, **overrides), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["DPPO-TV", "DPPO-KL", "IcePop", "CISPO", "GRPO-Geo-RS"])
def test_on_these_vectors_every_new_row_differs_from_every_other_and_from_grpo(name):
    others = {"GRPO", "Token-IS-PG", "DPPO-TV", "DPPO-KL", "IcePop", "CISPO", "GRPO-Geo-RS"} - {name}
    assert not any(torch.allclose(our_gradient(name), our_gradient(other)) for other in others)


def test_verl_bounds_the_inverse_of_the_geometric_mean_so_the_same_two_numbers_are_another_band():
    """A response with g = 1.00105: above 1.001, and 1/g = 0.99895 is below 0.999; with g = 1.0010005 only ours rejects."""
    g = 1.0010005
    assert not 0.999 <= g <= 1.001 and 0.999 <= 1 / g <= 1.001
    assert 1 / 1.001 <= g <= 1 / 0.999
