"""What a design can decide before it runs: P(PASS) if the paper is right and P(FAIL) if there is no effect, claim by
claim. No torch.

Both need the spread between launches, which nobody knows before the first run. PLANNING_SD holds assumptions for
planning, each with its reason, on the scale on which the interval is taken; none is a measurement of this suite, and
no verdict rests on them. With runs at hand, `design_power(task, runs)` uses the spread seen in them instead.
"""

from __future__ import annotations

import math

from suite.grade.contrasts import Levels, is_exact, is_share_of_seeds, shares_of
from suite.grade.judge import Evidence, findings_of, inside, num_pairs, order_form, order_regions
from suite.grade.launches import FINISHED, scale_of
from suite.measure import stats
from suite.spec.plan import resolve_task
from suite.spec.validate import unpinned_inputs

# (estimand, form) -> standard deviation between launches. A ratio is on the log scale, a difference in the
# estimand's own unit.
PLANNING_SD = {
    ("k3_nats_per_token", "ratio"): 0.25,  # one outlier token can carry a fifth of an fp16 total
    ("prob_diff_mean", "ratio"): 0.05,  # light-tailed: bounded by 1 per token
    ("k1_nats_per_token", "ratio"): 0.70,  # relative error at a KL of 4e-5 with 1e5 tokens
    ("seq_kl_k1_nats", "ratio"): 0.70,  # the same estimator, summed over the sequence
    ("reward_mean", "difference"): 0.02,  # repeats of one identical RL recipe differ by up to 2 points
    ("reward_mean", "arm"): 0.15,  # the same 2 points at 0.85, on the logit scale
}
RELATIVE_SD = 0.25  # of the value (identity scale), or in logs, for everything without a line of its own
EVENT_RATE = 0.95  # share of launches that do what an event claim says, if the claim is right
BEYOND = 3.0  # a claim without a number of its own is supposed to lie that many sd from the end of its region
PROMPT_NUM = 100  # an interval over prompts has about as many degrees of freedom as there are prompts


def design_power(task, runs: list | None = None) -> dict[str, dict]:
    """claim id -> what is supposed and what follows from it, for graded claims.

    Keys: num_seeds, scale, sd (between launches, on the scale), sd_source, true_value and null_value (in the claim's
    unit), p_pass_if_true, p_fail_if_null, note. For an equivalence the null is a difference twice as large as its
    margin.
    """
    resolved = resolve_task(task)
    task = resolved.task
    graded = [claim for claim in task.claims if claim.kind != "report" and claim.id in task.grade]
    pinned = not any(unpinned_inputs(one) for one in (resolved, *resolved.needed.values()))
    shares = shares_of(task)
    return {
        claim.id: _claim_power(task, claim, task.grade[claim.id], shares[claim.id], pinned, runs or []) for claim in graded
    }


def _claim_power(task, claim, grade, share: float, pinned: bool, runs: list) -> dict:
    levels = Levels.of(grade.interval.level if grade.interval else 0.90, share, num_pairs(grade))
    num_seeds = len(task.seeds)
    if is_exact(grade):
        row = _row(num_seeds, "identity", 0.0, "exact", None, None, 1.0, 1.0)
    elif is_share_of_seeds(claim.kind, grade):
        row = _event_power(grade, num_seeds, levels)
    else:
        row = _interval_power(task, claim, grade, num_seeds, levels, runs)
    if num_seeds < grade.min_seeds:
        row |= {"p_pass_if_true": 0.0, "note": f"{grade.min_seeds} seeds needed, {num_seeds} planned"}
    weak = grade.tolerance is not None and grade.tolerance.level == "P5"
    if weak or not pinned:
        why = "the tolerance is of level P5" if weak else "an input is not pinned"
        row |= {"p_pass_if_true": 0.0, "p_fail_if_null": 0.0, "note": f"capped at INCONCLUSIVE: {why}"}
    return row


def _event_power(grade, num_seeds: int, levels: Levels) -> dict:
    accept = grade.accept
    right = EVENT_RATE if grade.event.expect == "collapses" else 1 - EVENT_RATE
    passes = stats.p_share_inside(right, num_seeds, accept, levels.stated)
    fails = stats.p_share_disjoint(1 - right, num_seeds, accept, levels.strict)
    return _row(num_seeds, "identity", 0.0, "binomial", right, 1 - right, passes, fails)


def _interval_power(task, claim, grade, num_seeds: int, levels: Levels, runs: list) -> dict:
    ordered = grade.contrast.form == "order"
    form = order_form(grade) if ordered else grade.contrast.form
    scale = _scale(grade, form)
    regions = [grade.accept]
    if ordered:
        num_arms = len(grade.contrast.order)
        if grade.accept:
            regions = [grade.accept] * math.comb(num_arms, 2)
        else:
            regions = order_regions(num_arms, grade.contrast.margin or 0.0, form)
    sd, source = _sd(task, claim, grade, form, regions[0], runs)
    right = _right(claim, regions[0], scale, sd)
    null = 0.0 if ordered and not grade.accept else _null(grade, form, regions[0], scale, sd)
    over_prompts = grade.interval is not None and grade.interval.method == "within_run"
    num, spread = (PROMPT_NUM, sd * math.sqrt(PROMPT_NUM)) if over_prompts else (num_seeds, sd)
    passes, spared = 1.0, 1.0  # pairs of an order are taken as independent
    for region in regions:
        ends = tuple(None if end is None else _to(end, scale) for end in region)
        passes *= stats.p_inside(right, spread, num, ends, levels.stated)
        spared *= 1 - stats.p_disjoint(null, spread, num, ends, levels.strict)
    fails = 1 - spared if num_seeds > 1 else 0.0
    return _row(
        num_seeds, scale, sd, source, stats.from_scale(right, scale), stats.from_scale(null, scale), passes, fails
    )


def _scale(grade, form: str) -> str:
    if form == "ratio":
        return "log"
    if form == "difference" or grade.reducer == "log_ratio":
        return "identity"
    return "log" if grade.reducer == "time_to_event" else scale_of(grade.estimand)


def _to(value: float, scale: str) -> float | None:
    """On the scale; None for an end of the region that lies at the end of the scale (0 in a log, 0 or 1 in a logit):
    an open end.
    """
    found = stats.to_scale([value], scale)
    return None if found is None else float(found[0])


def _sd(task, claim, grade, form: str, region, runs: list) -> tuple[float, str]:
    finished = [run for run in runs if run.status in FINISHED]
    if finished and all(any(run.arm == name for run in finished) for name in grade.contrast.names):
        compared = findings_of(Evidence(task, finished, {}, Levels(0.90, 0.90)), claim, grade)
        spreads = [finding.spread for finding, _ in compared if finding.spread]
        if spreads:
            return max(spreads), "spread between launches in the runs at hand"
    if (grade.estimand, form) in PLANNING_SD:
        return PLANNING_SD[grade.estimand, form], "assumed for planning"
    if _scale(grade, form) in ("log", "logit"):
        return RELATIVE_SD, "assumed for planning"
    size = max(abs(value) for value in (_paper_number(claim), *region, 0.0) if value is not None)
    return RELATIVE_SD * (size or 1.0), "assumed for planning: a quarter of the value"


def _paper_number(claim) -> float | None:
    value = claim.paper.value if claim.paper else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _right(claim, region, scale: str, sd: float) -> float:
    """Where the estimand lies, on the scale, if the paper is right: at its value, else in the middle of the region
    or well inside it.
    """
    value = _paper_number(claim)
    if value is not None and inside((value, value), region) and _to(value, scale) is not None:
        return _to(value, scale)
    low, high = (None if end is None else _to(end, scale) for end in region)
    if low is not None and high is not None:
        return (low + high) / 2
    return low + BEYOND * sd if low is not None else high - BEYOND * sd


def _null(grade, form: str, region, scale: str, sd: float) -> float:
    """Where it lies, on the scale, if there is no effect. Where no effect is the claim itself: twice as far out as
    the margin.
    """
    low, high = (None if end is None else _to(end, scale) for end in region)
    no_effect = 0.0 if form in ("ratio", "difference") or grade.reducer == "log_ratio" or scale == "identity" else None
    if no_effect is not None:
        within = (low is None or no_effect > low) and (high is None or no_effect < high)
        return no_effect if not within else 2 * (high if high is not None else low)
    return low - BEYOND * sd if low is not None else high + BEYOND * sd


def _row(num_seeds, scale, sd, source, right, null, passes, fails) -> dict:
    return {
        "num_seeds": num_seeds,
        "scale": scale,
        "sd": sd,
        "sd_source": source,
        "true_value": _short(right),
        "null_value": _short(null),
        "p_pass_if_true": round(float(passes), 4),
        "p_fail_if_null": round(float(fails), 4),
        "note": "",
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
