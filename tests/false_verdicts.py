"""How often each published task would pass or fail by mistake, by simulation: `python tests/false_verdicts.py [repeats]`
from the top of the checkout, about two minutes. A claim is fed launches whose truth lies exactly at an end of its region, where
every PASS and every FAIL is a mistake, with the spread between launches that its published runs have.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np

from suite.archive.publishing import compute_verdict
from suite.grade import contrasts
from suite.grade.contrasts import Levels, in_sequence, is_exact, is_share_of_seeds, shares_of
from suite.grade.judge import disjoint, judge, num_pairs, order_form, order_regions
from suite.grade.launches import SHARES_OF_COUNTS, Launch, scale_of
from suite.measure import stats
from suite.spec.reading import load_task

TRIALS = {"num_kept": 512, "overlap_share": 48}
UNKNOWN_SD = 0.1  # on the scale of the interval, where the published runs have no spread


def ends_of(grade) -> list[float]:
    """Truths at which nothing is right or wrong: the ends of the region that lie inside the estimand's range."""
    if grade.contrast.form == "order" and not grade.accept:
        return [order_regions(len(grade.contrast.order), grade.contrast.margin or 0.0, order_form(grade))[0][0]]
    low, high = grade.accept
    ends = [end for end in (low, high) if end is not None]
    is_share = grade.contrast.form == "arm" and scale_of(grade.estimand) == "logit" and grade.reducer != "log_ratio"
    top = {"num_kept": 512}.get(grade.estimand, 1.0)
    return [end for end in ends if not (is_share or grade.estimand in SHARES_OF_COUNTS or grade.event) or 0 < end < top]


def no_effect_of(grade) -> float | None:
    form = order_form(grade) if grade.contrast.form == "order" else grade.contrast.form
    return {"ratio": 1.0, "difference": 0.0}.get(form)


def findings(claim, grade, truth: float, sd: float, num: int, levels: Levels, rng) -> list:
    """The comparisons of a claim over `num` launches that are drawn around `truth`."""
    seeds, contrast = range(num), grade.contrast
    if is_share_of_seeds(claim.kind, grade):
        launches = [Launch(seed, float(rng.random() < truth)) for seed in seeds]
        return [(contrasts.share_of_seeds("x", launches, grade.event.expect, levels), grade.accept)]
    if grade.estimand in SHARES_OF_COUNTS:
        trials = TRIALS[grade.estimand]
        rate = truth / trials if grade.estimand.startswith("num_") else truth
        hits = rng.binomial(trials, rate, num)
        values = hits if grade.estimand.startswith("num_") else hits / trials
        return [(contrasts.share_of_trials("x", [Launch(s, float(v), trials) for s, v in zip(seeds, values)], grade.estimand, levels), grade.accept)]
    if contrast.form == "arm":
        scale = {"log_ratio": "identity", "time_to_event": "log"}.get(grade.reducer, scale_of(grade.estimand))
        centre = float(stats.to_scale([truth], scale)[0])
        values = [stats.from_scale(centre + sd * z, scale) for z in rng.standard_normal(num)]
        return [(contrasts.level_of("x", [Launch(s, v) for s, v in zip(seeds, values)], grade, levels), grade.accept)]
    form = order_form(grade) if contrast.form == "order" else contrast.form
    if contrast.form != "order":
        steps, regions = [0.0, math.log(truth) if form == "ratio" else truth], [grade.accept]
    else:  # of arms that must be alike half stand at the far end, so that most pairs are at the margin; others one step apart each
        width, arms = (math.log(truth) if form == "ratio" else truth), len(contrast.order)
        steps = [width * (i % 2) for i in range(arms)] if grade.accept else [width * i for i in range(arms)]
        regions = [grade.accept] * num_pairs(grade) if grade.accept else order_regions(arms, contrast.margin or 0.0, form)
    noise = sd / math.sqrt(2) * rng.standard_normal((len(steps), num))
    levels_of = [[math.exp(step + z) if form == "ratio" else 0.5 + step + z for z in row] for step, row in zip(steps, noise)]
    arms = [[Launch(s, v) for s, v in zip(seeds, row)] for row in levels_of]
    pairs = [(0, 1)] if len(arms) == 2 else [(i, j) for i in range(len(arms)) for j in range(i + 1, len(arms)) if grade.accept or j == i + 1]
    return [(contrasts.contrast_of("x", form, arms[j], arms[i], grade, levels), region) for (i, j), region in zip(pairs, regions, strict=True)]


def words(task, truths: dict[str, float], sds: dict[str, float], num: int, rng) -> dict[str, str]:
    """claim id -> PASS, FAIL or INCONCLUSIVE of one simulated set of `num` launches, in the sequence of grading."""
    found, failed = {}, ()
    for claim in in_sequence(task):
        if claim.id in truths:
            grade = task.grade[claim.id]
            levels = Levels.of(grade.interval.level, shares_of(task, failed)[claim.id], num_pairs(grade))
            compared = findings(claim, grade, truths[claim.id], sds[claim.id], num, levels, rng)
            found[claim.id] = judge(compared, grade, claim.kind).verdict
            if all(finding.strict is not None for finding, _ in compared) and any(disjoint(f.strict, r) for f, r in compared):
                failed += (claim.id,)
    return found


def noisy_claims(task) -> list:
    return [claim for claim in task.claims if claim.kind != "report" and not is_exact(task.grade[claim.id])]


def published_sds(task, results: Path) -> dict[str, float]:
    """claim id -> spread between launches on the scale of its interval, from the widths of the published intervals."""
    folder = next(iter(sorted((results / task.id).glob("*/verdict.json")))).parent
    rows = {row["id"]: row for row in compute_verdict(task, folder.name, results)["claims"]}
    return {claim.id: _sd(rows[claim.id], task.grade[claim.id]) for claim in noisy_claims(task)}


def _sd(row: dict, grade) -> float:
    form = order_form(grade) if grade.contrast.form == "order" else grade.contrast.form
    scale = "log" if form == "ratio" else "identity" if form == "difference" or grade.reducer == "log_ratio" else scale_of(grade.estimand)
    ends = None if row["interval"] is None or None in row["interval"] else stats.to_scale(row["interval"], scale)
    if ends is None or row["num_seeds"] < 2 or ends[1] <= ends[0]:
        return UNKNOWN_SD
    return float(ends[1] - ends[0]) / 2 / stats._t_quantile(row["num_seeds"], 0.90) * math.sqrt(row["num_seeds"])


def rates(task, sds: dict[str, float], repeats: int, seed: int = 0) -> dict:
    """Of one task: the largest share of false PASSes of a claim at an end of its region, the same without an effect, the
    largest share where somebody looks at 3, 4, ... launches and stops at the first PASS (counted, and not counted before
    all planned launches are there), and the share of false FAILs of the task with every claim at an end.
    """
    rng, num, claims = np.random.default_rng(seed), len(task.seeds), noisy_claims(task)
    at_end, none, looked = [], [], []
    for claim in claims:
        grade, one = task.grade[claim.id], Levels.of(0.90, 1.0)
        draw = lambda truth, n: judge(findings(claim, grade, truth, sds[claim.id], n, one, rng), grade, claim.kind).verdict == "PASS"  # noqa: E731, B023
        at_end += [np.mean([draw(end, num) for _ in range(repeats)]) for end in ends_of(grade)]
        null, region = no_effect_of(grade), grade.accept or order_regions(2, grade.contrast.margin or 0.0, order_form(grade))[0]
        if null is not None and disjoint((null, null), region):
            none.append(np.mean([draw(null, num) for _ in range(repeats)]))
        if num >= 5 and grade.min_seeds <= 3 and ends_of(grade):
            looked.append(np.mean([any(draw_prefix(claim, grade, ends_of(grade)[0], sds[claim.id], num, one, rng)) for _ in range(repeats)]))
    truths = {claim.id: ends_of(task.grade[claim.id])[0] for claim in claims if ends_of(task.grade[claim.id])}
    fails = np.mean(["FAIL" in words(task, truths, sds, num, rng).values() for _ in range(repeats)])
    return {"seeds": num, "claims": len(claims), "end": max(at_end, default=0.0), "none": max(none, default=0.0),
            "looks": max(looked, default=None, key=float), "task_fail": fails}  # fmt: skip


def draw_prefix(claim, grade, truth, sd, num, levels, rng) -> list[bool]:
    """PASS or not after 3, 4, ... `num` of the same launches, as if those that are missing did not matter."""
    state = rng.integers(2**32)
    return [judge(_first(claim, grade, truth, sd, num, n, levels, state), grade, claim.kind).verdict == "PASS" for n in range(3, num + 1)]


def _first(claim, grade, truth, sd, num, n, levels, state) -> list:
    """The findings over the first n of num launches."""

    class Prefix:
        def __init__(self):
            self._rng = np.random.default_rng(state)

        def standard_normal(self, size):
            shape = (*size[:-1], num) if isinstance(size, tuple) else num
            return self._rng.standard_normal(shape)[..., :n]

        def random(self):
            return self._rng.random()

        def binomial(self, trials, rate, size):
            return self._rng.binomial(trials, rate, num)[:size]

    return findings(claim, grade, truth, sd, n, levels, Prefix())


def main(repeats: int) -> None:
    results = Path("results")
    print("| task | seeds | claims | false PASS, end of region | false PASS, no effect | stop at the first PASS of 3, 4, 5 | false FAIL of the task |")
    print("|---|---|---|---|---|---|---|")
    for folder in sorted(results.glob("*/")):
        task = load_task(folder.name) if list(folder.glob("*/verdict.json")) else None
        if task is not None and noisy_claims(task):
            found = rates(task, published_sds(task, results), repeats)
            looks = "-" if found["looks"] is None else f"{found['looks']:.1%}, not counted before 5"
            print(f"| {task.id} | {found['seeds']} | {found['claims']} | {found['end']:.1%} | {found['none']:.1%} | {looks} | {found['task_fail']:.1%} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
