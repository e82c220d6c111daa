"""The twelve rows of the paper give, to the bit, what plain torch makes of their formula in one fixed order of operations:
an addition to the table or to losses.py must not move a published run."""

import math

import pytest
import torch
from slow_losses import LENGTH_NORM, make_batch, run

LIMIT = 20.0


def weight(log_weight, cap=math.inf, mask=False):
    """sg[weight]: beyond the cap 0 or the cap."""
    log_cap = math.log(cap)
    log_weight = log_weight.detach()
    bounded = torch.where(log_weight > log_cap, -math.inf, log_weight) if mask else log_weight.clamp_max(log_cap)
    return bounded.clamp_max(LIMIT).exp()


def clipped(ratio, a, low=0.2, high=0.28, dual=None):
    term = torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    return term if dual is None else torch.where((a < 0) & (term < dual * a), dual * a, term)


def ppo(new, old, a, dual=None):
    return clipped((new - old).clamp(-LIMIT, LIMIT).exp(), a, dual=dual)


def gspo(new, old, a, length):
    mean = (new - old).detach().sum(1, keepdim=True) / length
    return clipped(mean.clamp(-LIMIT, LIMIT).exp() * (new - new.detach()).exp(), a, 3e-4, 4e-4)


def whole(log_ratio):
    return log_ratio.sum(1, keepdim=True)


ROWS = {  # name: (terms of (new, old, mu, A, lengths), aggregation)
    "GRPO": (lambda n, o, m, a, t: ppo(n, o, a), "length_norm"),
    "GRPO-std": (lambda n, o, m, a, t: ppo(n, o, a), "own length"),
    "GRPO-Token-TIS": (lambda n, o, m, a, t: weight(o - m, 3.0) * ppo(n, o, a), "length_norm"),
    "GRPO-Seq-TIS": (lambda n, o, m, a, t: weight(whole(o - m), 3.0) * ppo(n, o, a), "length_norm"),
    "GRPO-Seq-MIS": (lambda n, o, m, a, t: weight(whole(o - m), 3.0, mask=True) * ppo(n, o, a), "length_norm"),
    "GSPO": (lambda n, o, m, a, t: gspo(n, o, a, t), "own length"),
    "PG-Seq-IS": (lambda n, o, m, a, t: weight(whole(n - m)) * (a * n), "length_norm"),
    "PG-Seq-TIS": (lambda n, o, m, a, t: weight(whole(n - m), 3.0) * (a * n), "length_norm"),
    "PG-Seq-MIS": (lambda n, o, m, a, t: weight(whole(n - m), 3.0, mask=True) * (a * n), "length_norm"),
    "Token-IS-PG": (lambda n, o, m, a, t: weight(n - m) * (a * n), "length_norm"),
    "REINFORCE": (lambda n, o, m, a, t: a * n, "length_norm"),
    "DAPO": (lambda n, o, m, a, t: ppo(n, o, a, dual=10.0), "tokens"),
}


def as_stored(name, batch):
    """(loss, gradient) of the fixed order of operations."""
    leaf, mask = batch["new"].clone().requires_grad_(), batch["loss_mask"]
    new, old, mu = (torch.where(mask, values, 0.0) for values in (leaf, batch["old"], batch["mu"]))
    lengths = mask.sum(1, keepdim=True).to(new.dtype)
    terms, aggregation = ROWS[name]
    objective = torch.where(mask, terms(new, old, mu, batch["advantages"][:, None], lengths), 0.0)
    if aggregation == "tokens":
        loss = -(objective.sum() / int(mask.sum()))
    elif aggregation == "own length":
        loss = -((objective.sum(1, keepdim=True) / lengths).sum() / len(new))
    else:
        loss = -(objective.sum(1, keepdim=True).sum() / (LENGTH_NORM * len(new)))
    return loss, torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.01, 0.3, 3.0])
def test_the_papers_rows_keep_every_bit_of_loss_and_gradient(name, dtype, spread):
    batch = make_batch(dtype=dtype, spread=spread)
    output, gradient = run(name, batch)
    loss, expected = as_stored(name, batch)
    assert torch.equal(output.loss, loss) and torch.equal(gradient, expected)
