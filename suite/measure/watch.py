"""What to watch in training besides reward: in which direction the mismatch pushes the policy, and by how much. No torch.

With r = pi/mu of a sampled token and A the advantage of its response, a policy gradient that should weigh the token by r
and weighs it by 1 is off by -(r - 1) A grad log pi. Its size split by the sign of A says whether the mismatch makes good
responses more likely than it should or bad ones less likely; later work holds that harm comes from few tokens of bad
responses that the trainer finds much less likely than the sampler did (DPPO, arXiv 2602.04879; GradLoc).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from suite.measure.mismatch import log_ratio, prob_diff
from suite.spec.algorithms import Algorithm

LOG_RATIO_LIMIT = Algorithm.log_ratio_limit  # nats, as in the losses
BAD_UPDATE_DROPS = {"bad_update_share_0p5": 0.5, "bad_update_share_0p2": 0.2}  # metric: how far pi lies below mu


def by_advantage(rollout_logprobs: Float[np.ndarray, "T"], trainer_logprobs: Float[np.ndarray, "T"],
                 advantages: Float[np.ndarray, "N"], num_tokens: Int[np.ndarray, "N"]) -> dict[str, float | None]:
    """The mismatch of a step, split by the sign of the advantage; N responses with T tokens altogether.

    mismatch_push_positive, _negative: sum over the tokens of responses with A > 0, and with A < 0, of -(r - 1) A, per
    response token of the step; r is at most e^20, as in the losses. bad_update_share_0p5, _0p2: share
    of the step's tokens with A < 0 and pi - mu below -0.5, below -0.2. None for a step without tokens.
    """
    tokens = int(np.sum(num_tokens))
    if not tokens:
        return dict.fromkeys(("mismatch_push_positive", "mismatch_push_negative", *BAD_UPDATE_DROPS))
    per_token = np.repeat(np.asarray(advantages, np.float64), num_tokens)
    ratios = np.minimum(log_ratio(rollout_logprobs, trainer_logprobs), LOG_RATIO_LIMIT)
    push = -np.expm1(ratios) * per_token
    drop = -prob_diff(rollout_logprobs, trainer_logprobs)
    shares = {name: float(((per_token < 0) & (drop > limit)).mean()) for name, limit in BAD_UPDATE_DROPS.items()}
    signed = {"positive": per_token > 0, "negative": per_token < 0}
    return {f"mismatch_push_{name}": float(push[chosen].sum() / tokens) for name, chosen in signed.items()} | shares


def argmax_flips(rollout: Sequence[Sequence[int]], trainer: Sequence[Sequence[int]]) -> dict[str, float | None]:
    """argmax_flip_share: share of the step's response tokens at which the most probable token of the sampler is not that of
    the trainer; N responses of T_i token ids each. None for a step without tokens."""
    ours, theirs = (np.concatenate([np.asarray(one, np.int64) for one in each]) for each in (rollout, trainer))
    return {"argmax_flip_share": float((ours != theirs).mean()) if ours.size else None}
