"""The algorithms as one table: a row says everything a loss needs to know, and cites the equation it implements.

Notation (section 2 of the paper): pi is the training policy, mu the rollout policy that sampled y, theta' the weights
at rollout time, theta the weights being updated, A the advantage of a response (constant over its tokens).

    r_t   = pi(y_t|theta) / pi(y_t|theta')      PPO ratio, per token               "new/old"
    rho_t = pi(y_t|theta') / mu(y_t|theta')     mismatch ratio, per token          "old/rollout"
    w_t   = pi(y_t|theta) / mu(y_t|theta')      importance weight, per token       "new/rollout"
    rho = prod_t rho_t,  w = prod_t w_t         the same for a whole response
    P_t   = min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)
    D_t   = divergence of the binary distributions (y_t or not y_t): TV |pi(y_t|theta) - mu(y_t|theta')| or KL(mu || pi)
    sg[.] = stop-gradient,  C = cap,  F = floor,  L = aggregation_length (the response budget unless a task says otherwise)

`anchor` says whose log-probs stand for pi(theta'): "trainer", the trainer's own, computed anew, or "rollout", those of the
sampler, mu (verl calls this bypass mode, the other decoupled mode). So with anchor "rollout" r_t is w_t.

Every objective is maximised; `losses.policy_loss` returns its negative. Rows are plain data, so `suite validate` reads
them without torch. To add an algorithm, add a row here and its formula in tests/test_losses.py.

Sources: [VERL] the authors' VeRL code, [OAT] github.com/sail-sg/Precision-RL oat/main.py, [DAPO] arXiv 2503.14476,
[GSPO] arXiv 2507.18071, [TIS] Yao et al., "Your efficient RL framework secretly brings you off-policy RL training",
[DPPO] arXiv 2602.04879, [M1] arXiv 2506.13585, [verl] verl-project/verl 0.10.0.dev 1dda039b9 verl/trainer/ppo,
[slime] THUDM/slime 624b824a slime, [TRL] huggingface/trl f2cd57710 trl/trainer/grpo_trainer.py,
[prime-rl] PrimeIntellect-ai/prime-rl 0.8.1.dev67 src/prime_rl/trainer/rl/loss.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from suite.errors import TaskError

ADVANTAGES = ("group_mean", "group_mean_std", "reward")
RATIO_LEVELS = ("token", "sequence_mean", "none")
WEIGHTS = ("none", "old/rollout", "new/rollout", "new/old")
CORRECTIONS = ("none", "truncate", "mask", "reject")
CORRECTION_LEVELS = ("none", "token", "sequence", "sequence_mean")
ANCHORS = ("trainer", "rollout")
DIVERGENCES = ("none", "tv", "kl")
AGGREGATIONS = ("sum_over_length", "token_mean_per_sequence", "token_mean")


@dataclass(frozen=True)
class Algorithm:
    """One row of the table; see the module docstring for the symbols.

    A row with ratio_level "none" is a policy gradient: its term is A log pi(y_t|theta) instead of P_t. `weight` is the
    stop-gradient factor in front of the term, taken per `correction_level` ("sequence_mean": the geometric mean over the
    response's tokens); `correction` says what happens above `cap` and below `floor` ("none": nothing, "truncate": the
    weight is set to the bound, "mask": it becomes 0, "reject": 0, and 1 inside). `divergence` is a trust region: a token
    whose D_t has passed the bound of the side to which A pushes it (up for A > 0: divergence_high; down for A < 0:
    divergence_low) has the term 0.
    """

    name: str
    formula: str
    source: str
    advantage: str = "group_mean"
    ratio_level: str = "token"
    clip_low: float | None = 0.2  # [VERL] [OAT]; None where there is no PPO ratio to clip
    clip_high: float | None = 0.28  # [VERL]; the OAT scripts leave it at 0.2
    # For A < 0 the term is at least dual_clip * A; inf switches it off. Stock verl has 3 in its PPO loss; the authors'
    # fork has it commented out, so GRPO has none.
    dual_clip: float | None = None
    weight: str = "none"
    correction: str = "none"
    correction_level: str = "none"
    cap: float | None = None
    floor: float | None = None  # None: no lower bound
    anchor: str | None = "trainer"  # None where nothing of the row is pi(theta')
    divergence: str = "none"
    divergence_low: float | None = None
    divergence_high: float | None = None
    # [VERL] nats; every log-ratio is held below it before exp, so nothing overflows. Stock verl has 10 for GSPO; OAT none.
    log_ratio_limit: float = 20.0
    aggregation: str = "sum_over_length"
    aggregation_length: int | None = None  # tokens; None = the response budget of the rollout

    @property
    def needs_old_trainer_logprobs(self) -> bool:
        """True if the loss uses pi(theta'): one more forward pass per rollout batch (about +25 % training cost)."""
        return self.anchor == "trainer"

    def settings(self) -> dict:
        """Every choice of the row by name, prose left out: what a record stores as the algorithm that ran."""
        described = ("formula", "source")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in described}


_NO_RATIO = {"ratio_level": "none", "clip_low": None, "clip_high": None}
_POLICY_GRADIENT = {**_NO_RATIO, "anchor": None}
_RHO_TOKEN = {"weight": "old/rollout", "correction_level": "token"}
_RHO_SEQUENCE = {"weight": "old/rollout", "correction_level": "sequence"}
_W_SEQUENCE = {"weight": "new/rollout", "correction_level": "sequence"}
_R_TOKEN = {"weight": "new/old", "correction": "truncate", "correction_level": "token"}

_ROWS = (
    Algorithm(
        name="GRPO",
        formula="sum_t P_t / L",
        source='what the paper labels GRPO is Dr.GRPO: VeRL "PPO", OAT drgrpo; L = 8,192 in the sanity test',
    ),
    Algorithm(
        name="GRPO-std",
        formula="1/|y| sum_t P_t, with A divided by the group's standard deviation",
        source="GRPO as first published (arXiv 2402.03300 eq. 3, without KL); OAT critic_type grpo",
        advantage="group_mean_std",
        aggregation="token_mean_per_sequence",
    ),
    Algorithm(
        name="GRPO-Token-TIS",
        formula="sum_t sg[min(rho_t, C)] P_t / L",
        source="[TIS]; VeRL C = 3, OAT C = 2",
        correction="truncate",
        cap=3.0,
        **_RHO_TOKEN,
    ),
    Algorithm(
        name="GRPO-Seq-TIS",
        formula="sg[min(rho, C)] sum_t P_t / L",
        source="VeRL only, C = 3",
        correction="truncate",
        cap=3.0,
        **_RHO_SEQUENCE,
    ),
    Algorithm(
        name="GRPO-Seq-MIS",
        formula="sg[rho 1{rho <= C}] sum_t P_t / L",
        source='Liu, Li et al., "When Speed Kills Stability"; VeRL C = 3, OAT C = 10',
        correction="mask",
        cap=3.0,
        **_RHO_SEQUENCE,
    ),
    Algorithm(
        name="GSPO",
        formula="1/|y| sum_t min(s_t A, clip(s_t, 1 - clip_low, 1 + clip_high) A), "
        "s = exp(mean_t log r_t), s_t = sg[s] pi_t / sg[pi_t]",
        source="[GSPO] eq. 5 and 13; VeRL Vanilla-GSPO; OAT divides A by the group's standard deviation, VeRL does not",
        ratio_level="sequence_mean",
        clip_low=3e-4,
        clip_high=4e-4,
        aggregation="token_mean_per_sequence",
    ),
    Algorithm(
        name="PG-Seq-IS",
        formula="sg[w] A sum_t log pi(y_t|theta) / L",
        source="VeRL PG-Seq-IS (log w held at 20), OAT use_seq_is with cap inf",
        **_W_SEQUENCE,
        **_POLICY_GRADIENT,
    ),
    Algorithm(
        name="PG-Seq-TIS",
        formula="sg[min(w, C)] A sum_t log pi(y_t|theta) / L",
        source='VeRL C = 3; this is also what the OAT scripts named "seq_mis" do (C = 3: they clamp and never mask)',
        correction="truncate",
        cap=3.0,
        **_W_SEQUENCE,
        **_POLICY_GRADIENT,
    ),
    Algorithm(
        name="PG-Seq-MIS",
        formula="sg[w 1{w <= C}] A sum_t log pi(y_t|theta) / L",
        source="VeRL C = 3, where clamping w pi_t/sg[pi_t] at C zeroes the gradient above C",
        correction="mask",
        cap=3.0,
        **_W_SEQUENCE,
        **_POLICY_GRADIENT,
    ),
    Algorithm(
        name="Token-IS-PG",
        formula="sum_t sg[min(w_t, C)] A log pi(y_t|theta) / L",
        source="OAT use_token_is; C = inf is the script's default",
        weight="new/rollout",
        correction="truncate",
        correction_level="token",
        cap=math.inf,
        **_POLICY_GRADIENT,
    ),
    Algorithm(
        name="REINFORCE",
        formula="R sum_t log pi(y_t|theta) / L",
        source="Williams 1992: a control, no baseline, no correction, on-policy only",
        advantage="reward",
        **_POLICY_GRADIENT,
    ),
    Algorithm(
        name="DAPO",
        formula="sum over the mini-batch of P_t / number of its tokens; for A < 0: max(P_t, dual_clip A)",
        source="[DAPO] eq. 8, clip-higher 0.2/0.28; dual clip 10 from the paper's dense-14B table; "
        "dynamic sampling belongs to the loop. The authors' fork ignores the dual clip and takes the token mean per "
        "micro-batch; here it is over the mini-batch, as in the equation",
        advantage="group_mean_std",
        dual_clip=10.0,
        aggregation="token_mean",
    ),
    Algorithm(
        name="DPPO-TV",
        formula="sum_t sg[min(r_t, C)] A log pi(y_t|theta) 1{not outside_t} / L, r_t anchored at mu, outside_t: "
        "A > 0 and pi - mu > divergence_high, or A < 0 and mu - pi > divergence_low (probabilities of y_t)",
        source="[DPPO] Binary-TV; [verl] core_algos.py dppo_tv: 0.15 in its example, C 20 where clip_ratio_c is not set (the "
        "example: 10,000); [prime-rl] default_loss_fn: 0.2, no C, and a squared log-ratio that is not part of this row",
        anchor="rollout",
        divergence="tv",
        divergence_low=0.15,
        divergence_high=0.15,
        cap=20.0,
        **_R_TOKEN,
        **_NO_RATIO,
    ),
    Algorithm(
        name="DPPO-KL",
        formula="the same, outside_t: KL(mu || pi) of (y_t, not y_t) above divergence_high with A > 0 and pi > mu, or above "
        "divergence_low with A < 0 and pi < mu",
        source="[DPPO] Binary-KL; [verl] core_algos.py dppo_kl: 0.05 in its example",
        anchor="rollout",
        divergence="kl",
        divergence_low=0.05,
        divergence_high=0.05,
        cap=20.0,
        **_R_TOKEN,
        **_NO_RATIO,
    ),
    Algorithm(
        name="IcePop",
        formula="sum_t sg[rho_t 1{F <= rho_t <= C}] P_t / L",
        source="Ring-1T, arXiv 2510.18855; [slime] backends/megatron_utils/loss.py icepop_function; F 0.5 and C 5 as in NeMo-RL",
        correction="mask",
        floor=0.5,
        cap=5.0,
        **_RHO_TOKEN,
    ),
    Algorithm(
        name="CISPO",
        formula="sum over the mini-batch of sg[min(r_t, C)] A log pi(y_t|theta) / number of its tokens",
        source="[M1] eq. 4 and 5, which gives no C and no lower bound; C = 5 is what [TRL] recommends; [slime] utils/ppo_utils.py "
        "and [verl] core_algos.py cispo write C = 1 + clip_high, and verl a floor 1 - clip_low",
        advantage="group_mean_std",
        cap=5.0,
        aggregation="token_mean",
        **_R_TOKEN,
        **_NO_RATIO,
    ),
    Algorithm(
        name="GRPO-Geo-RS",
        formula="1{F <= g <= C} sum_t P_t / L, g = exp(mean_t log rho_t)",
        source="[verl] rollout_corr_helper.py seq_mean_k1 (Geo-RS, there bounds of 1/g), 0.999 and 1.001 in decoupled_geo_rs",
        weight="old/rollout",
        correction="reject",
        correction_level="sequence_mean",
        floor=0.999,
        cap=1.001,
    ),
)

ALGORITHMS: dict[str, Algorithm] = {row.name: row for row in _ROWS}

# --- overrides from a task file --------------------------------------------------------------------------------------


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _one_of(*choices: str):
    return "one of " + ", ".join(choices), lambda value: value in choices


_POSITIVE = ("a number above 0 (.inf allowed)", lambda value: _is_number(value) and value > 0)

_DIVERGENCE = (*_POSITIVE, lambda row: row.divergence != "none")

OVERRIDES = {  # key: (what is allowed, in words; the check; does the row have such a thing at all)
    "clip_low": ("a number in (0, 1]", lambda v: _is_number(v) and 0 < v <= 1, lambda row: row.clip_low is not None),
    "clip_high": (*_POSITIVE, lambda row: row.clip_high is not None),
    "dual_clip": (
        "a number above 1 (.inf switches it off)",
        lambda v: _is_number(v) and v > 1,
        lambda row: row.ratio_level == "token",
    ),
    "cap": (*_POSITIVE, lambda row: row.correction != "none"),
    "floor": ("a number above 0, at most the cap", lambda v: _is_number(v) and v > 0, lambda row: row.correction != "none"),
    "anchor": (*_one_of(*ANCHORS), lambda row: row.anchor is not None and row.weight != "old/rollout"),
    "divergence_low": _DIVERGENCE,
    "divergence_high": _DIVERGENCE,
    "log_ratio_limit": (
        "a number in (0, 80], so that its exp fits fp32",
        lambda v: _is_number(v) and 0 < v <= 80,
        lambda row: row.ratio_level != "none" or row.weight != "none",
    ),
    "advantage": (*_one_of(*ADVANTAGES), lambda row: True),
    "aggregation": (*_one_of(*AGGREGATIONS), lambda row: True),
    "aggregation_length": (
        "a whole number of tokens above 0, with aggregation sum_over_length",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0,
        lambda row: row.aggregation == "sum_over_length",
    ),
}


def resolve(name: str, *, file: str = "algorithm settings", **overrides) -> Algorithm:
    """The row called `name`, with a task's overrides put in; an override of None keeps the row's default.

    `file` is only named in errors. Raises TaskError for an unknown name, an unknown key, a value out of range, and for
    a key the row has no use for (a cap on GRPO, a clip on PG-Seq-IS): no argument is accepted and then ignored.
    """
    if name not in ALGORITHMS:
        raise TaskError(file, "algorithm.name", name, "one of " + ", ".join(ALGORITHMS))
    row = ALGORITHMS[name]
    chosen = {key: value for key, value in overrides.items() if value is not None}
    for key, value in chosen.items():
        if key not in OVERRIDES:
            raise TaskError(file, f"algorithm.{key}", value, "one of the keys " + ", ".join(OVERRIDES))
        if not OVERRIDES[key][1](value):
            raise TaskError(file, f"algorithm.{key}", value, OVERRIDES[key][0])
    resolved = replace(row, **chosen)
    for key, value in chosen.items():
        if not OVERRIDES[key][2](resolved if key == "aggregation_length" else row):
            hint = f"{name}: {row.formula}"
            if key == "anchor" and row.weight == "old/rollout":
                hint += "; rho would be 1 for every token and correct nothing: take the row without the correction"
            raise TaskError(file, f"algorithm.{key}", value, f"nothing: {name} has no {key}", hint)
    if resolved.floor is not None and resolved.floor > resolved.cap:
        key = "floor" if "floor" in chosen else "cap"
        allowed = f"a floor that is at most the cap (floor {resolved.floor}, cap {resolved.cap})"
        raise TaskError(file, f"algorithm.{key}", chosen[key], allowed, f"{name}: {row.formula}")
    return resolved
