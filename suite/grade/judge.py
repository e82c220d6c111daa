"""One claim judged: from the runs of its arms to PASS, FAIL or INCONCLUSIVE, with the reason and what would resolve
it. No torch.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from suite.errors import TaskError
from suite.grade import contrasts
from suite.grade.contrasts import Finding, Levels, is_exact, is_share_of_seeds
from suite.grade.events import skipped_share
from suite.grade.launches import FINISHED, SHARES_OF_COUNTS, arm_runs, launches, scale_of, unit_of
from suite.spec.kinds import kind_of

NOT_REPRODUCED = "not_reproduced_on_this_hardware"
MOST_SKIPPED = 0.05  # share of skipped steps after warm-up above which no claim about a run can pass
Region = tuple[float | None, float | None]
Compared = tuple[Finding, Region]


@dataclass(frozen=True)
class Evidence:
    """What a claim is judged from: the runs of the task, and of the tasks it needs, all of one fingerprint."""

    task: object
    runs: list
    other_runs: dict
    levels: Levels
    unpinned: tuple[str, ...] = ()  # revisions and hashes that the task file leaves unknown
    other_tasks: dict = field(default_factory=dict)

    def arm(self, name: str, at: dict) -> list:
        return arm_runs(self.task, self.runs, name, at, self.other_runs)


@dataclass(frozen=True)
class Judgement:
    verdict: str
    reason: str
    resolve: str = ""


def inside(ends: tuple[float, float], region: Region) -> bool:
    return (region[0] is None or ends[0] >= region[0]) and (region[1] is None or ends[1] <= region[1])


def disjoint(ends: tuple[float, float], region: Region) -> bool:
    return (region[0] is not None and ends[1] < region[0]) or (region[1] is not None and ends[0] > region[1])


def findings_of(evidence: Evidence, claim, grade) -> list[Compared]:
    """Every comparison that a claim makes, each with the region that it must lie in: one, except for an order of
    several arms.
    """
    contrast, levels = grade.contrast, evidence.levels
    found = {name: launches(kind_of(evidence.task), evidence.arm(name, grade.at), grade) for name in contrast.names}
    arms = [found[name] for name in contrast.names]
    if contrast.form == "order":
        return _in_order(found, grade, levels)
    label = {"arm": "{0}", "ratio": "{0} / {1}", "difference": "{0} - {1}"}[contrast.form].format(*contrast.names)
    if is_exact(grade):
        return [(contrasts.exact(label, arms[0]), grade.accept)]
    if grade.estimand in SHARES_OF_COUNTS and contrast.form == "arm" and grade.interval and grade.interval.method == "clopper_pearson":
        return [(contrasts.share_of_trials(label, arms[0], grade.estimand, levels), grade.accept)]
    if is_share_of_seeds(claim.kind, grade):
        shares = contrasts.share_of_seeds if contrast.form == "arm" else contrasts.difference_of_shares
        return [(shares(label, *arms, grade.event.expect, levels), grade.accept)]
    if contrast.form == "arm":
        return [(contrasts.level_of(label, arms[0], grade, levels), grade.accept)]
    return [(contrasts.contrast_of(label, contrast.form, *arms, grade, levels), grade.accept)]


def num_pairs(grade) -> int:
    """Comparisons that a claim makes, any of which fails it."""
    if grade.contrast.form != "order":
        return 1
    num = len(grade.contrast.order)
    return math.comb(num, 2) if grade.accept else num - 1


def order_form(grade) -> str:
    """How two arms of an order are compared: by their ratio where levels live on a log scale, else by their
    difference.
    """
    return "ratio" if scale_of(grade.estimand) == "log" or grade.reducer == "time_to_event" else "difference"


def order_regions(num_arms: int, margin: float, form: str) -> list[Region]:
    """The region of each adjacent pair, the later arm against the earlier one.

    Two arms tie if they differ by no more than the margin (a share of the earlier one, or an amount for
    differences). The first and the last of an order are its content: the pairs at both ends must differ by more than
    the margin, so that arms without any difference fail. Neighbours inside may tie.
    """
    apart, tied = (1.0 + margin, 1.0 / (1.0 + margin)) if form == "ratio" else (margin, -margin)
    return [(apart if i in (0, num_arms - 2) else tied, None) for i in range(num_arms - 1)]


def _in_order(found: dict, grade, levels: Levels) -> list[Compared]:
    """Neighbours of an order, later against earlier; every pair where one region holds for all of them (an equivalence)."""
    form, names = order_form(grade), grade.contrast.names
    sign = {"ratio": "/", "difference": "-"}[form]
    pairs = list(itertools.combinations(names, 2) if grade.accept else itertools.pairwise(names))
    regions = [grade.accept] * len(pairs) if grade.accept else order_regions(len(names), grade.contrast.margin or 0.0, form)
    return [
        (contrasts.contrast_of(f"{later} {sign} {earlier}", form, found[later], found[earlier], grade, levels), region)
        for (earlier, later), region in zip(pairs, regions, strict=True)
    ]


def judge(compared: list[Compared], grade, kind: str) -> Judgement:
    """PASS if every interval lies inside its region, FAIL if one is disjoint from it, else INCONCLUSIVE; one
    Judgement for all.
    """
    each = [(finding, _judge_one(finding, region, grade, kind)) for finding, region in compared]
    word = next(word for word in ("FAIL", "INCONCLUSIVE", "PASS") if any(one.verdict == word for _, one in each))
    chosen = [(finding, one) for finding, one in each if one.verdict == word]
    reasons = [f"{finding.label}: {one.reason}" if len(compared) > 1 else one.reason for finding, one in chosen]
    return Judgement(word, "; ".join(reasons), chosen[0][1].resolve)


def _judge_one(finding: Finding, region: Region, grade, kind: str) -> Judgement:
    shown = f"accept {region_text(region)}"
    if finding.interval is None:
        more = "run at least one more seed" if finding.problem == "one seed" else ""
        if finding.problem == "one seed":
            return Judgement(
                "INCONCLUSIVE", "too_few_seeds: one seed says nothing about the spread between launches", more
            )
        if finding.censored:
            return Judgement("INCONCLUSIVE", f"censored: {finding.problem}", "a longer horizon")
        return Judgement("INCONCLUSIVE", f"no_interval: {finding.problem}", more)
    if disjoint(finding.strict, region):
        return _judge_outside(finding, region, grade, kind)
    if not inside(finding.interval, region):
        where = "outside" if disjoint(finding.interval, region) else "straddles"
        text = f"{where}: interval {ends_text(finding.interval)}, {shown}"
        if where == "outside":
            text += f"; with the 5 % split over the task's claims and their pairs, {ends_text(finding.strict)}, it is not disjoint"
        return Judgement("INCONCLUSIVE", text, seeds_needed(finding, region))
    if finding.num_seeds < grade.min_seeds:
        text = f"too_few_seeds: {finding.num_seeds} of the {grade.min_seeds} that a PASS needs"
        return Judgement("INCONCLUSIVE", text, f"run {grade.min_seeds - finding.num_seeds} more")
    if finding.censored and _open_to(finding.censored, region):
        return Judgement(
            "INCONCLUSIVE", "censored: the event had not come by the horizon in at least one launch", "a longer horizon"
        )
    return Judgement("PASS", f"interval {ends_text(finding.interval)} inside {shown}")


def _judge_outside(finding: Finding, region: Region, grade, kind: str) -> Judgement:
    shown = f"interval {ends_text(finding.strict)} disjoint from accept {region_text(region)}"
    if finding.method != "exact" and finding.num_seeds < 2:
        return Judgement("INCONCLUSIVE", f"too_few_seeds: {shown}, but a FAIL needs two seeds", "run one more seed")
    low = region[0] is not None and finding.strict[1] < region[0]
    if (finding.censored in ("high", "both") and low) or (finding.censored in ("low", "both") and not low):
        return Judgement(
            "INCONCLUSIVE", f"censored: {shown}, but the event had not come by the horizon", "a longer horizon"
        )
    if kind == "event" and grade.event.expect == "collapses":
        return Judgement("FAIL", f"{NOT_REPRODUCED}: {shown}")
    return Judgement("FAIL", shown)


def _open_to(censored: str, region: Region) -> bool:
    """Whether what is not known about a censored value could carry it out of the region."""
    return (censored in ("high", "both") and region[1] is not None) or (
        censored in ("low", "both") and region[0] is not None
    )


def seeds_needed(finding: Finding, region: Region) -> str:
    """How many seeds would bring the interval to the near side of the nearest end of the region, at the spread seen
    here.
    """
    if not finding.spread:
        return "more seeds, or more prompts per launch"
    on_scale = {
        "log": lambda v: math.log(v) if v > 0 else -math.inf,
        "logit": lambda v: math.log(v / (1 - v)) if 0 < v < 1 else math.inf,
    }
    place = on_scale.get(finding.scale, float)
    distance = min(abs(place(finding.estimate) - place(end)) for end in region if end is not None)
    if not 0 < distance < math.inf:
        return "the estimate lies at the end of the region: no number of seeds decides this"
    needed = math.ceil((1.645 * finding.spread / distance) ** 2) + 2
    return (
        f"about {needed} seeds at this spread"
        if needed < 1000
        else "over 1,000 seeds at this spread: the estimate lies at the end of the region"
    )


def below_floor(evidence: Evidence, grade) -> str:
    """Why a claim that nothing happened, or that arms are alike, says nothing: the first launch whose level does not reach
    the floor. Its level is its value; of an event, the mean over the event's window at the end.
    """
    if grade.floor is None:
        return ""
    level = grade.model_copy(update={"event": None, "reducer": "last_k_mean", "window": grade.event.window}) if grade.event else grade
    for name in grade.contrast.names:
        for launch in launches(kind_of(evidence.task), evidence.arm(name, grade.at), level):
            if launch.value is None or not launch.value >= grade.floor.at_least:
                shown = launch.problem or f"{launch.arm} seed {launch.seed} ends at {launch.value:.4g}"
                return f"below_floor: {shown}, a floor of {grade.floor.at_least:g} shows that it learned"
    return ""


def too_many_skips(evidence: Evidence, grade) -> str:
    """Why no claim about a trained arm can pass: one of its launches skipped more than 5 % of its steps after warm-up."""
    runs = [run for name in grade.contrast.names for run in evidence.arm(name, grade.at) if run.status in FINISHED]
    worst = max(runs, key=skipped_share, default=None)
    if worst is None or skipped_share(worst) <= MOST_SKIPPED:
        return ""
    return f"skipped_steps: {worst.arm} seed {worst.seed} skipped {skipped_share(worst):.1%} of its steps after warm-up"


def weakest(compared: list[Compared]) -> Compared:
    """The comparison that stands for a claim of several: the one nearest to leaving its region, or the one without a
    value.
    """

    def room(one: Compared) -> float:
        finding, region = one
        if finding.estimate is None:
            return -math.inf
        ends = [finding.estimate - region[0]] if region and region[0] is not None else []
        ends += [region[1] - finding.estimate] if region and region[1] is not None else []
        return min(ends, default=math.inf)

    return min(compared, key=room)


def claim_row(claim, grade, compared: list[Compared], display: tuple[float, float] | None) -> dict:
    """The fields of a claim in verdict.json that do not depend on its verdict."""
    shown, region = weakest(compared)
    form = order_form(grade) if grade.contrast.form == "order" else grade.contrast.form
    event_share = claim.kind == "event" and grade.reducer != "time_to_event"
    band = grade.remark_band
    return {
        "id": claim.id,
        "kind": claim.kind,
        "statement": claim.statement,
        "estimand": grade.estimand,
        "unit": "share of seeds" if event_share else unit_of(grade.estimand, form, grade.reducer),
        "estimator": f"{grade.reducer} of {shown.label}",
        "at": dict(grade.at),
        "paper_value": claim.paper.value if claim.paper else None,
        "paper_source": f"{claim.paper.source} ({claim.paper.level})" if claim.paper else None,
        "estimate": number(shown.estimate),
        "interval": pair(shown.interval),
        "interval_method": shown.method,
        "interval_fail": pair(shown.strict),
        "display_interval": pair(display),
        "accept": list(region) if region else None,
        "num_seeds": shown.num_seeds,
        "per_seed": [_per_seed(row) for row in shown.per_seed],
        "pairs": [
            {
                "label": one.label,
                "estimate": number(one.estimate),
                "interval": pair(one.interval),
                "accept": list(its) if its else None,
                "num_seeds": one.num_seeds,
            }
            for one, its in compared
        ]
        if len(compared) > 1
        else [],
        "remark": remark(shown.estimate, band) if band else None,
        "consistent_with_paper": consistent(compared),
    }


def _per_seed(row: dict) -> dict:
    """A launch's row for JSON: what is not finite is null there, and its `problem` says what it is."""
    values = {"values": [number(value) for value in row["values"]]} if "values" in row else {}
    return row | {"value": number(row["value"])} | values


def event_rule(evidence: Evidence, grade) -> str | None:
    """What counts as the event, in words, with the horizon of these runs; None where a claim has no event."""
    if grade.event is None:
        return None
    runs = [run for name in grade.contrast.names for run in evidence.arm(name, grade.at)]
    steps = [run.record["cell"]["settings"]["schedule"]["steps"] for run in runs]
    horizon = min([grade.until or max(steps), max(steps)]) if steps else grade.until
    return f"event: {grade.event.rule}" + (f", within {horizon} iterations" if horizon else "")


def consistent(compared: list[Compared]) -> bool | None:
    """Whether every estimate lies in its accept region, whatever the intervals say; None without an estimate or a
    region.
    """
    if any(region is None or finding.estimate is None for finding, region in compared):
        return None
    return all(inside((finding.estimate, finding.estimate), region) for finding, region in compared)


def remark(estimate: float | None, band: Region) -> str | None:
    """A band that is printed and cannot fail."""
    if estimate is None:
        return None
    return f"{'inside' if inside((estimate, estimate), band) else 'outside'} the remark band {region_text(band)}"


def display_interval(evidence: Evidence, claim, grade) -> tuple[float, float] | None:
    """For the table and the figure: the interval over prompts within all launches together, at the stated level."""
    if grade.contrast.form == "order" or claim.kind in ("event", "count"):
        return None
    arms = [launches(kind_of(evidence.task), evidence.arm(name, grade.at), grade) for name in grade.contrast.names]
    found = contrasts.within(grade.estimand, grade.contrast.form, arms, evidence.levels.stated)
    return (found.lo, found.hi) if found else None


def require_grade(task, claim):
    if claim.id not in task.grade:
        raise TaskError(task.file, f"grade.{claim.id}", "nothing", f"a grade (kind {claim.kind} is graded)")
    return task.grade[claim.id]


def number(value) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def pair(ends) -> list | None:
    """[lo, hi] for JSON; an infinite end is null, which everywhere means open."""
    return None if ends is None else [number(ends[0]), number(ends[1])]


def ends_text(ends) -> str:
    return f"[{short(ends[0])}, {short(ends[1])}]"


def region_text(region: Region) -> str:
    low, high = (
        ("-inf" if region[0] is None else short(region[0])),
        ("inf" if region[1] is None else short(region[1])),
    )
    return f"[{low}, {high}]"


def short(value: float) -> str:
    """Four significant digits; a count in full."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"
