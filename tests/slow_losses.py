"""Slow loops over plain floats, written from the formulas with no autograd, and the batches on which rows are compared."""

import math

import torch

from suite.engines.losses import policy_loss
from suite.spec.algorithms import resolve

LENGTH_NORM = 16

# --- the slow references ---------------------------------------------------------------------------------------------
# Each takes one response (lists of log-probs, its advantage) and gives per token (term, d term / d log pi(y_t|theta)).


def ppo_terms(new, old, advantage, low=0.2, high=0.28, dual=None):
    terms = []
    for log_pi, log_old in zip(new, old, strict=True):
        ratio = math.exp(log_pi - log_old)
        clipped_ratio = min(max(ratio, 1 - low), 1 + high)
        value, slope = ratio * advantage, ratio * advantage
        if clipped_ratio * advantage < value:
            value, slope = clipped_ratio * advantage, 0.0
        if dual is not None and advantage < 0 and value < dual * advantage:
            value, slope = dual * advantage, 0.0
        terms.append((value, slope))
    return terms


def scaled(terms, weights):
    return [(w * value, w * slope) for (value, slope), w in zip(terms, weights, strict=True)]


def token_tis(new, old, mu, a):
    return scaled(ppo_terms(new, old, a), [min(math.exp(o - m), 3.0) for o, m in zip(old, mu, strict=True)])


def seq_tis(new, old, mu, a):
    rho = math.prod(math.exp(o - m) for o, m in zip(old, mu, strict=True))
    return scaled(ppo_terms(new, old, a), [min(rho, 3.0)] * len(new))


def seq_mis(new, old, mu, a):
    rho = math.prod(math.exp(o - m) for o, m in zip(old, mu, strict=True))
    return scaled(ppo_terms(new, old, a), [rho if rho <= 3.0 else 0.0] * len(new))


def gspo(new, old, mu, a):
    s = math.exp(sum(n - o for n, o in zip(new, old, strict=True)) / len(new))
    clipped = min(max(s, 1 - 3e-4), 1 + 4e-4)
    return [(clipped * a, 0.0) if clipped * a < s * a else (s * a, s * a)] * len(new)


def policy_gradient(new, weights, a):
    return [(w * a * log_pi, w * a) for log_pi, w in zip(new, weights, strict=True)]


def sequence_weight(new, mu):
    return math.prod(math.exp(n - m) for n, m in zip(new, mu, strict=True))


def pg_is(new, old, mu, a):
    return policy_gradient(new, [sequence_weight(new, mu)] * len(new), a)


def pg_tis(new, old, mu, a):
    return policy_gradient(new, [min(sequence_weight(new, mu), 3.0)] * len(new), a)


def pg_mis(new, old, mu, a):
    w = sequence_weight(new, mu)
    return policy_gradient(new, [w if w <= 3.0 else 0.0] * len(new), a)


def token_is(new, old, mu, a):
    return policy_gradient(new, [math.exp(n - m) for n, m in zip(new, mu, strict=True)], a)


def inside(weight, floor, cap):
    return weight if floor <= weight <= cap else 0.0


def icepop(new, old, mu, a):
    return scaled(ppo_terms(new, old, a), [inside(math.exp(o - m), 0.5, 5.0) for o, m in zip(old, mu, strict=True)])


def geo_rs(new, old, mu, a):
    g = math.exp(sum(o - m for o, m in zip(old, mu, strict=True)) / len(new))
    return scaled(ppo_terms(new, old, a), [float(0.999 <= g <= 1.001)] * len(new))


def cispo(new, old, mu, a):
    return policy_gradient(new, [min(math.exp(n - o), 5.0) for n, o in zip(new, old, strict=True)], a)


def total_variation(log_p, log_q):
    return abs(math.exp(log_p) - math.exp(log_q))


def binary_kl(log_p, log_q):
    p, q = math.exp(log_p), math.exp(log_q)
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def dppo(divergence, bound):
    def terms(new, old, mu, a):
        found = []
        for n, m in zip(new, mu, strict=True):
            pushed_further = (a > 0 and n > m) or (a < 0 and n < m)
            weight = 0.0 if pushed_further and divergence(m, n) > bound else min(math.exp(n - m), 20.0)
            found += policy_gradient([n], [weight], a)
        return found

    return terms


REFERENCES = {  # name: (terms of one response, divisor of a response's sum: L, its own length, or the batch's tokens)
    "GRPO": (lambda new, old, mu, a: ppo_terms(new, old, a), "L"),
    "GRPO-std": (lambda new, old, mu, a: ppo_terms(new, old, a), "length"),
    "GRPO-Token-TIS": (token_tis, "L"),
    "GRPO-Seq-TIS": (seq_tis, "L"),
    "GRPO-Seq-MIS": (seq_mis, "L"),
    "GSPO": (gspo, "length"),
    "PG-Seq-IS": (pg_is, "L"),
    "PG-Seq-TIS": (pg_tis, "L"),
    "PG-Seq-MIS": (pg_mis, "L"),
    "Token-IS-PG": (token_is, "L"),
    "REINFORCE": (lambda new, old, mu, a: policy_gradient(new, [1.0] * len(new), a), "L"),
    "DPPO-TV": (dppo(total_variation, 0.15), "L"),
    "DPPO-KL": (dppo(binary_kl, 0.05), "L"),
    "IcePop": (icepop, "L"),
    "CISPO": (cispo, "tokens"),
    "GRPO-Geo-RS": (geo_rs, "L"),
    "DAPO": (lambda new, old, mu, a: ppo_terms(new, old, a, dual=10.0), "tokens"),
}


def reference(name, batch):
    """(loss, gradient as nested lists (B, T)) of a batch, in Python floats."""
    terms_of, divisor = REFERENCES[name]
    rows = [[t for t, m in enumerate(mask) if m] for mask in batch["loss_mask"].tolist()]
    total_tokens = sum(map(len, rows))
    loss, gradient = 0.0, [[0.0] * batch["loss_mask"].shape[1] for _ in rows]
    for b, columns in enumerate(rows):
        if not columns:
            continue
        new, old, mu = ([batch[k][b][t].item() for t in columns] for k in ("new", "old", "mu"))
        scale = {"L": LENGTH_NORM * len(rows), "length": len(columns) * len(rows), "tokens": total_tokens}[divisor]
        for t, (value, slope) in zip(columns, terms_of(new, old, mu, batch["advantages"][b].item()), strict=True):
            loss -= value / scale
            gradient[b][t] = -slope / scale
    return loss, gradient


# --- batches ---------------------------------------------------------------------------------------------------------


def make_batch(seed=0, num=24, width=9, spread=0.3, dtype=torch.float64):
    """Random responses of 1 to `width` tokens; ratios crowd around the clip edges and the caps on both sides."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    new = -normal(num, width).abs() - 0.05
    edges = torch.tensor([0.8, 1.28, 1 - 3e-4, 1 + 4e-4, 1.0, 10.0]).double().log()
    near = edges[torch.randint(len(edges), (num, width), generator=generator)] + 1e-5 * normal(num, width)
    random = spread * normal(num, width)
    old = new - torch.where(torch.rand(num, width, generator=generator) < 0.5, near, random)
    old[: num // 3] = new[: num // 3] - 5e-4 * normal(num // 3, width)  # some sequences inside GSPO's narrow range
    mu = old - 2 * spread * normal(num, width)  # wide enough that single tokens pass the cap of 3 too
    few = slice(num // 3, num // 2)
    mu[few] = old[few] - 5e-4 * normal(few.stop - few.start, width)  # a geometric mean ratio inside GRPO-Geo-RS's range
    old, mu = old.clamp_max(-0.01), mu.clamp_max(-0.01)
    lengths = torch.randint(1, width + 1, (num,), generator=generator)
    lengths[0], lengths[1] = 1, width  # a single token; a response cut off at the budget
    mask = torch.arange(width) < lengths[:, None]
    batch = {"new": new, "old": old, "mu": mu, "advantages": normal(num)}
    return {k: v.to(dtype) for k, v in batch.items()} | {"loss_mask": mask}


def run(name, batch, num_sequences=None, num_tokens=None, **overrides):
    """(output, gradient of the loss with respect to log pi(theta) (B, T))."""
    new = batch["new"].clone().requires_grad_()
    output = policy_loss(
        resolve(name, **overrides),
        new,
        batch["old"],
        batch["mu"],
        batch["loss_mask"],
        batch["advantages"],
        num_sequences=num_sequences or len(new),
        num_tokens=num_tokens or int(batch["loss_mask"].sum()),
        length_norm=LENGTH_NORM,
    )
    (gradient,) = torch.autograd.grad(output.loss, new)
    return output, gradient


def rows_of(batch, index):
    return {k: v[index] for k, v in batch.items()}
