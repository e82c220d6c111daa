"""The same rollouts seen three times: lines of metrics, sums per prompt, the record's summary and counts. No torch.

A run tells of its rollouts in metrics.jsonl (one line per part), in evidence_summary.parquet (sums per prompt) and in
record.json (`series_summary`, `counts`), and draws them from plot_points.parquet. Each follows from the same log-probs;
where two of them overlap they must agree, since a verdict may rest on either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from suite.measure.mismatch import estimates, is_scored, totals_of
from suite.problems.kept import in_band
from suite.record.run import FINISHED, Run
from suite.spec.estimands import SAMPLER_ESTIMANDS, SCORING_ESTIMANDS
from suite.spec.kinds import Kind

# Sums in float64, added in another order: published records agree to 1e-12.
TOLERANCE = 1e-8
# metric of a line -> (column of the sums, what a line weighs)
ADDITIVE = {
    "k1_nats_per_token": ("sum_k1", "num_response_tokens"),
    "k2_nats_per_token": ("sum_k2", "num_response_tokens"),
    "k3_nats_per_token": ("sum_k3", "num_response_tokens"),
    "reverse_k3_nats_per_token": ("sum_reverse_k3", "num_response_tokens"),
    "prob_diff_mean": ("sum_abs_prob_diff", "num_response_tokens"),
    "logprob_diff_mean": ("sum_abs_logprob_diff", "num_response_tokens"),
    "mult_prob_error": ("sum_mult_prob_error", "num_response_tokens"),
    "out_of_band_share": ("num_out_of_band", "num_response_tokens"),
    "seq_kl_k1_nats": ("sum_k1", "num_rollouts"),
    "response_tokens_mean": ("num_response_tokens", "num_rollouts"),
    "truncated_share": ("num_truncated", "num_rollouts"),
    "reward_mean": ("sum_reward", "num_rollouts"),
}
PI_ALONE = SCORING_ESTIMANDS.keys() - SAMPLER_ESTIMANDS.keys()  # what only a trainer gives
EXTREMES = {"prob_diff_max": max, "prob_diff_min": min, "seq_log_ratio_max": max, "seq_log_ratio_min": min,
            "seq_mult_prob_error_max": max}  # fmt: skip


def contradictions(run: Run, kind: Kind, points: Mapping | None = None) -> list[str]:
    """Where the views of one finished run disagree, one sentence each.

    points: what points.read_points returns of its plot_points.parquet; None where there is none.
    """
    if run.status not in FINISHED:
        return []
    if kind.evidence == "none":
        return list(_dataset(run)) if "num_unique" in kind.estimands else []
    if run.summary is None:
        return ["no evidence_summary.parquet, which every finished run of this protocol has"]
    if kind.evidence == "scored" and not is_scored(run.summary):
        return ["evidence_summary.parquet: sums of rollouts that no trainer scored, in a protocol whose trainer does"]
    parts = (_impossible(run.summary), _lines(run), _series(run, kind), _counts(run), _amounts(run, kind))
    found = [line for part in parts for line in part]
    if points is None and not is_scored(run.summary):  # without pi there is nothing to draw
        return found
    if points is None:
        return [*found, "no plot_points.parquet, which every finished run with evidence has"]
    keeps_all = not (run.record["cell"]["settings"].get("schedule") or {}).get("whole_rows_per_step")
    return found + list(_points(run.summary, points, keeps_all))


def _differ(what: str, one, of_one: str, other, of_other: str) -> Iterator[str]:
    if not _same(one, other):
        yield f"{what}: {of_one} {_shown(one)}, {of_other} {_shown(other)}"


def _same(one, other) -> bool:
    if not all(isinstance(x, (int, float, np.number)) and not isinstance(x, bool) for x in (one, other)):
        return type(one) is type(other) and one == other
    return one == other or math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-14) or (one != one and other != other)


def _shown(value) -> str:
    return f"{value:.10g}" if isinstance(value, (float, np.floating)) else str(value)


def _impossible(sums: Mapping[str, np.ndarray]) -> Iterator[str]:
    """What no rollouts can add up to."""
    totals = totals_of(sums)
    rollouts, tokens = totals["num_rollouts"], totals["num_response_tokens"]
    for top, most in (("num_rewarded", rollouts), ("num_truncated", rollouts), ("num_out_of_band", tokens), ("sum_abs_prob_diff", tokens)):
        if top in totals and not 0 <= totals[top] <= most:
            yield f"evidence sums: {top} is {_shown(totals[top])}, allowed: 0 to {_shown(most)}"
    for name in ("sum_k2", "sum_k3", "sum_reverse_k3", "sum_reward2"):
        if name in sums and not (np.asarray(sums[name]) >= 0).all():
            yield f"evidence sums: {name} is negative for a prompt"
    if len(set(sums["prompt_id"])) != len(sums["prompt_id"]):
        yield "evidence sums: a prompt has two rows"
    if is_scored(sums):
        yield from _differ("evidence sums", totals["sum_k1"], "sum_k1", -totals["sum_seq_log_ratio"], "minus sum_seq_log_ratio")
    yield from _differ("evidence sums", totals["sum_len_k"], "sum_len_k", tokens / 1000, "thousands of tokens")
    yield from _differ("evidence sums", totals["sum_reward"], "sum_reward", totals["sum_reward2"], "its squares (a reward is 0 or 1)")


def _lines(run: Run) -> Iterator[str]:
    """The lines of metrics added up against the sums."""
    totals, lines = totals_of(run.summary), run.metrics
    for place, line in enumerate(lines):
        yield from _differ(f"metrics line {place + 1}: step", line.get("step"), "found", place, "its place is")
    weights = {}
    for name in ("num_rollouts", "num_response_tokens"):
        weights[name] = [line.get(name) for line in lines]
        if not all(isinstance(value, int) and value >= 0 for value in weights[name]):
            yield f"metrics: {name} is not a count in every line"
            return
        yield from _differ(name, sum(weights[name]), "metrics add up to", int(totals[name]), "evidence sums to")
    for name, (column, weight) in ADDITIVE.items():
        values = [line.get(name) for line in lines]
        if name == "reward_mean" and totals["num_rewarded"] != totals["num_rollouts"] or not any(name in line for line in lines):
            continue
        if column not in totals:
            yield f"{name}: in metrics, of rollouts that no trainer scored"
            continue
        pairs = [(value, count) for value, count in zip(values, weights[weight]) if count]
        if not all(_number(value) for value, _ in pairs):
            yield f"metrics: {name} is no number in a line with rollouts"
            continue
        added = math.fsum(value * count for value, count in pairs)
        scale = max(abs(added), abs(float(totals[column])), math.fsum(abs(value * count) for value, count in pairs))
        if not _same(added, float(totals[column])) and not abs(added - float(totals[column])) <= TOLERANCE * scale:
            yield f"{name}: metrics add up to {_shown(added)}, evidence sums ({column}) to {_shown(float(totals[column]))}"


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _series(run: Run, kind: Kind) -> Iterator[str]:
    """The record's summary against the sums, and its extremes against those of the lines."""
    series, computed = run.record["series_summary"], estimates(run.summary)
    for name, value in computed.items():
        if name in series:
            yield from _differ(name, series[name], "series_summary says", value, "evidence sums give")
        elif kind.has_trainer:
            yield f"{name}: not in series_summary"
    if not is_scored(run.summary) and (unfounded := sorted(PI_ALONE & series.keys())):
        yield f"{', '.join(unfounded)}: in series_summary, of rollouts that no trainer scored"
    for name, extreme in EXTREMES.items():
        values = [line.get(name) for line in run.metrics]
        if name in series and values and all(map(_number, values)):
            yield from _differ(name, series[name], "series_summary says", extreme(values), "metrics give")
    if "num_kept" in kind.estimands:
        yield from _filter(run, series)


def _filter(run: Run, series: Mapping) -> Iterator[str]:
    """Counts of kept problems, from the rewards of each."""
    settings, sums = run.record["cell"]["settings"], run.summary
    samples, band = settings["rollout"]["samples_per_prompt"], settings["data"]["keep_accuracy"]
    correct = np.rint(sums["sum_reward"]).astype(int)
    kept = [int(number) for number in correct if in_band(number, samples, band)]
    wanted = {"num_problems": len(correct), "num_kept": len(kept), "kept_share": len(kept) / max(len(correct), 1)}
    wanted |= {"accuracy_of_kept": sum(kept) / (samples * len(kept))} if kept else {}
    for name, value in wanted.items():
        yield from _differ(name, series.get(name), "series_summary says", value, "evidence sums give")


def _counts(run: Run) -> Iterator[str]:
    totals = totals_of(run.summary)
    wanted = {"num_prompts": len(run.summary["prompt_id"]), "num_rollouts": int(totals["num_rollouts"]),
              "num_response_tokens": int(totals["num_response_tokens"])}  # fmt: skip
    if "num_steps" in run.record["counts"]:
        wanted |= {"num_steps": len(run.metrics), "num_skipped_steps": sum(line.get("step_skipped", 0) for line in run.metrics)}
    for name, value in wanted.items():
        yield from _differ(name, run.record["counts"].get(name), "counts say", value, "the run has")


def _amounts(run: Run, kind: Kind) -> Iterator[str]:
    """As many steps, prompts and samples as the settings ask for."""
    settings, samples = run.record["cell"]["settings"], run.record["cell"]["settings"]["rollout"]["samples_per_prompt"]
    tokens, rollouts = run.summary["num_response_tokens"], run.summary["num_rollouts"]
    if (tokens > rollouts * settings["rollout"]["max_tokens"]).any():
        yield f"num_response_tokens: more than rollout.max_tokens ({settings['rollout']['max_tokens']}) a rollout"
    if kind.trains:
        schedule = settings["schedule"]
        if run.status == "success":
            yield from _differ("steps", len(run.metrics), "metrics have", schedule["steps"], "schedule.steps is")
        found = sorted({line.get("num_rollouts") for line in run.metrics}, key=str)
        each = schedule["prompts_per_step"] * samples
        yield from (line for n in found for line in _differ("rollouts of a step", n, "metrics have", each, "the settings ask for"))
    else:
        for n in sorted(set(rollouts.tolist())):
            yield from _differ("rollouts of a prompt", n, "evidence has", samples, "rollout.samples_per_prompt is")
        if (asked := settings["data"].get("num_prompts")) is not None:
            yield from _differ("prompts", len(rollouts), "evidence has", asked, "data.num_prompts is")


def _points(sums: Mapping[str, np.ndarray], points: Mapping, keeps_all: bool = True) -> Iterator[str]:
    """The bins that figures are drawn from hold the same tokens; no more than these, where a run keeps those of a sample."""
    totals = totals_of(sums)
    columns = {"count": "num_response_tokens", "sum_k3": "sum_k3", "sum_abs_prob_diff": "sum_abs_prob_diff"}
    for kind in (kind for kind in points if kind.startswith("by_")):
        for name, column in columns.items():
            held, whole = float(np.sum(points[kind][name])), float(totals[column])
            if keeps_all or held > whole:
                yield from _differ(f"plot_points, {kind}", held, name, whole, f"evidence {column}")


def _dataset(run: Run) -> Iterator[str]:
    if len(run.metrics) != 1:
        yield f"metrics: {len(run.metrics)} lines, a count of a data set has 1"
        return
    for name in sorted(run.metrics[0].keys() | run.record["series_summary"].keys()):
        yield from _differ(name, run.record["series_summary"].get(name), "series_summary says", run.metrics[0].get(name), "metrics say")
    yield from _differ("num_prompts", run.record["counts"].get("num_prompts"), "counts say", run.metrics[0].get("num_unique"), "metrics say")

