"""Protocol `filter`: which problems can the starting model learn from? Sample each many times, keep the middle band.

    for each batch of problems        sample n responses of each -> reward -> record
    at the end                        accuracy per problem; keep those in data.keep_accuracy; write kept.json

Nothing is trained and nothing is scored: the evidence holds the sampler's log-probs and no others. kept.json in the
run folder is the set that RL tasks name in `data.kept`, once it is copied into baselines/ with its hash. Where the task
names a `data.reference`, the run also counts how many of its problems were kept again.
"""

from __future__ import annotations

import time

import numpy as np

from suite.errors import DataError, NotRunnable
from suite.measure.mismatch import estimates
from suite.problems.data import Prompt, load_prompts
from suite.problems.kept import KeptProblem, in_band, problem_texts, write_kept
from suite.protocols.engine_pool import Engines, run_one_by_one
from suite.protocols.evidence import evidence_table
from suite.protocols.offline import DEFAULT_PROMPTS_PER_BATCH
from suite.protocols.session import Session
from suite.record.evidence import summarise
from suite.record.run import read_evidence
from suite.record.writer import RunWriter
from suite.spec.plan import Cell

KEPT_NAME = "kept.json"


def run(cells: list[Cell], session: Session) -> None:
    run_one_by_one(cells, session, "filter", _run_cell)


def _run_cell(cell: Cell, writer: RunWriter, engines: Engines, session: Session) -> None:
    prompts = load_prompts(cell.settings["data"], cell.seed)[: session.limit]
    sample_all(cell, prompts, writer, engines, session)
    finish(cell, prompts, writer)


def sample_all(cell: Cell, prompts: list[Prompt], writer: RunWriter, engines: Engines, session: Session) -> None:
    """One part of the record per batch of problems; parts that are there already are left alone."""
    size = cell.get("rollout.prompts_per_batch") or DEFAULT_PROMPTS_PER_BATCH
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    for index, batch in list(enumerate(batches))[writer.parts_done :]:
        started = time.perf_counter()
        rollouts = engines.sampler.sample(engines.requests(batch, cell.seed))
        seconds = round(time.perf_counter() - started, 4)
        rewards = engines.reward(rollouts, batch)
        evidence = evidence_table(rollouts, None, index, rewards)
        row = {"step": index, "num_rollouts": len(rollouts), "t_sample_s": seconds}
        row["num_response_tokens"] = sum(rollout.num_response_tokens for rollout in rollouts)
        writer.append(row | estimates(summarise(evidence)), evidence)
        writer.note_executed(engines.executed())
        writer.note_weights(engines.weights)
        session.progress(cell.name, index + 1, len(batches), f"accuracy {np.mean(rewards):.3f}")


def finish(cell: Cell, prompts: list[Prompt], writer: RunWriter) -> None:
    """The kept set and the run's summary, from the evidence on disk."""
    sums = summarise(read_evidence(writer.folder))
    correct = dict(zip(sums["prompt_id"], np.rint(sums["sum_reward"]).astype(int), strict=True))
    num_samples, band = cell.get("rollout.samples_per_prompt"), cell.get("data.keep_accuracy")
    kept = [
        KeptProblem(prompt.prompt_id, prompt.meta["problem"], prompt.gold, int(correct[prompt.prompt_id]))
        for prompt in prompts
        if in_band(correct[prompt.prompt_id], num_samples, band)
    ]
    pool = {name: cell.get(f"data.{name}", None) for name in ("id", "revision", "num_terms", "num_prompts", "seed")}
    origin = {"task": cell.task_id, "cell": cell.name, "data": pool}
    write_kept(writer.folder / KEPT_NAME, kept, samples_per_prompt=num_samples, keep_accuracy=list(band), **origin)
    series = estimates(sums) | filter_counts(kept, len(prompts), num_samples)
    series |= _overlap(cell, kept, writer)
    counts = {
        "num_prompts": len(prompts),
        "num_rollouts": int(np.sum(sums["num_rollouts"])),
        "num_response_tokens": int(np.sum(sums["num_response_tokens"])),
    }
    writer.finish("success", summary=sums, counts=counts, series_summary=series)


def filter_counts(kept: list[KeptProblem], num_problems: int, num_samples: int) -> dict[str, float]:
    """Counts of estimands.FILTER_ESTIMANDS; no accuracy of an empty set."""
    values = {"num_problems": num_problems, "num_kept": len(kept), "kept_share": len(kept) / num_problems}
    if kept:
        values["accuracy_of_kept"] = sum(problem.num_correct for problem in kept) / (num_samples * len(kept))
    return values


def _overlap(cell: Cell, kept: list[KeptProblem], writer: RunWriter) -> dict[str, float]:
    """How much of the reference was kept again; where the reference cannot be had, the record says why instead."""
    reference = cell.get("data.reference", None)
    if reference is None:
        return {}
    try:
        wanted = set(problem_texts(reference))
    except (DataError, NotRunnable) as reason:
        writer.update(reference_missing=str(reason))
        return {}
    num = len(wanted & {problem.problem for problem in kept})
    return {"num_reference": len(wanted), "num_overlap": num, "overlap_share": num / len(wanted)}
