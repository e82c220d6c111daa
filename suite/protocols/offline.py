"""Protocols `offline_mismatch` and `offline_accuracy`: sample with one engine, re-score with the other, change no weight.

    for each sampler precision                one engine load serves all its cells
        for each batch of prompts             of every launch (seed, problems) at once: engines like full batches
            sample -> reward                  cells that differ only in the trainer share their launch's rollouts
            score in every cell's precision -> append evidence and metrics

The launch's seed draws desk problems and all sampling noise; arms with the same seed therefore see the same problems and
the same noise, and are compared pair by pair.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice

import numpy as np

from suite.engines.batch import Rollout
from suite.measure.bins import full_vocabulary_kl
from suite.measure.mismatch import estimates, token_statistics
from suite.measure.routing import replay, routing_disagreement
from suite.problems.data import Prompt, load_prompts
from suite.protocols.engine_pool import SAMPLER_SETTINGS, Engines, group_cells
from suite.protocols.evidence import evidence_table
from suite.protocols.session import Session
from suite.record.evidence import flat, num_response_tokens, summarise
from suite.record.run import Run, read_evidence
from suite.record.writer import RunWriter
from suite.spec.defaults import default
from suite.spec.kinds import kind_of
from suite.spec.plan import Cell

DEFAULT_PROMPTS_PER_BATCH = default("rollout.prompts_per_batch")
NUM_FULL_SEQUENCES, LARGEST_FULL_VOCABULARY = 4, 4096


@dataclass(frozen=True)
class Launch:
    """The unfinished cells of one seed and one set of problems, and the problems in batches."""

    seed: int
    writers: list[tuple[Cell, RunWriter]]
    batches: list[list[Prompt]]

    def behind(self, index: int) -> list[tuple[Cell, RunWriter]]:
        """The cells that lack batch `index`."""
        if index >= len(self.batches):
            return []
        return [(cell, writer) for cell, writer in self.writers if writer.parts_done <= index]


def run(cells: list[Cell], session: Session) -> None:
    for group in group_cells(cells, SAMPLER_SETTINGS):
        writers, engines = [], Engines(group[0])
        try:
            launches = [_open_launch(launch, session, writers) for launch in group_cells(group, ("seed", "data"))]
            for index in range(max(len(launch.batches) for launch in launches)):
                _run_batch(index, [launch for launch in launches if launch.behind(index)], engines, session)
            for launch in launches:
                for _cell, writer in launch.writers:
                    _finish(writer, scored=kind_of(session.task).has_trainer)
        except BaseException as error:
            for writer in writers:
                if writer.is_open:
                    writer.fail("offline", error)
            raise
        finally:
            engines.close()


def _open_launch(cells: list[Cell], session: Session, opened: list[RunWriter]) -> Launch:
    """Every writer is put into `opened` too, as soon as it exists: whoever opened it must close it."""
    writers = []
    for cell in cells:
        writer = session.open_cell(cell)
        if isinstance(writer, Run):
            session.progress(cell.name, 1, 1, "complete already")
        else:
            opened.append(writer)
            writers.append((cell, writer))
    cell = cells[0]
    prompts = load_prompts(cell.settings["data"], cell.seed)[: session.limit] if writers else []
    size = cell.get("rollout.prompts_per_batch") or DEFAULT_PROMPTS_PER_BATCH
    return Launch(cell.seed, writers, [prompts[start : start + size] for start in range(0, len(prompts), size)])


def _run_batch(index: int, launches: list[Launch], engines: Engines, session: Session) -> None:
    """Sample batch `index` of the launches together; then reward, score and append, launch by launch."""
    if not launches:
        return
    requests = [engines.requests(launch.batches[index], launch.seed) for launch in launches]
    started = time.perf_counter()
    rollouts = iter(engines.sampler.sample([request for part in requests for request in part]))
    seconds = (time.perf_counter() - started) / len(launches)
    for launch, part in zip(launches, requests, strict=True):
        scored = kind_of(session.task).has_trainer
        _score_and_append(index, launch, list(islice(rollouts, len(part))), seconds, engines, scored)
        for cell, writer in launch.writers:
            k3 = writer.metrics[index].get("k3_nats_per_token")
            session.progress(cell.name, index + 1, len(launch.batches), "" if k3 is None else f"k3 {k3:.2e}")


def _score_and_append(index: int, launch: Launch, rollouts: list[Rollout], sample_seconds: float, engines: Engines,
                      scored: bool) -> None:
    rewards = engines.reward(rollouts, launch.batches[index])
    sequences = [(rollout.token_ids, len(rollout.request.prompt_token_ids)) for rollout in rollouts]
    told = engines.scorable(rollouts)
    chosen = engines.sampler.expert_choices(told) if scored else None
    for cell, writer in launch.behind(index):
        trainer, started = (engines.trainer(cell) if scored else None), time.perf_counter()
        if trainer:
            replay(cell.settings["train"], told, chosen, trainer)
        logprobs, entropies = trainer.score_and_entropy(sequences) if trainer else (None, None)
        seconds = {"t_sample_s": round(sample_seconds, 4), "t_score_s": round(time.perf_counter() - started, 4)}
        evidence = evidence_table(rollouts, logprobs, step=index, rewards=rewards, trainer_entropies=entropies)
        row = _metrics(index, evidence)
        if trainer and index == 0:
            row |= _full_vocabulary(engines.scorable(rollouts[:NUM_FULL_SEQUENCES]), engines, trainer)
        if trainer:
            row |= routing_disagreement(told, chosen, trainer)
            replay(cell.settings["train"], [], [], trainer)
        writer.append(row | seconds, evidence)
        writer.note_executed(engines.executed(trainer))
        writer.note_weights(engines.weights)


def _full_vocabulary(sequences: list, engines: Engines, trainer) -> dict:
    """KL(mu || pi) over the whole vocabulary, exact where k1 and k3 are estimates; teacher-forced, a few sequences, small
    vocabularies only."""
    if engines.vocabulary_size > LARGEST_FULL_VOCABULARY:
        return {}
    mu = np.concatenate(engines.sampler.distributions(sequences))
    pi = np.concatenate(trainer.distributions(sequences))
    kl = full_vocabulary_kl(mu, pi)
    return {"full_vocab_kl_nats_per_token": float(kl.mean()) if kl.size else None}


def _metrics(index: int, evidence) -> dict:
    """One line of metrics.jsonl. entropy_nats is the mean of -log mu over the sampled tokens."""
    values = estimates(summarise(evidence))
    logprobs = flat(evidence, "rollout_logprobs")
    counts = {"step": index, "num_rollouts": evidence.num_rows, "num_response_tokens": int(logprobs.size)}
    return counts | values | {"entropy_nats": float(-logprobs.mean()) if logprobs.size else None}


def _routing(metrics: list[dict]) -> dict[str, float]:
    """The batches' share of other choices, weighted by their response tokens; nothing of a model without experts."""
    told = [(row["routing_disagreement"], row["num_response_tokens"]) for row in metrics if row.get("routing_disagreement") is not None]
    if not told:
        return {}
    shares, weights = zip(*told)
    return {"routing_disagreement": float(np.average(shares, weights=weights))}


def _finish(writer: RunWriter, scored: bool) -> None:
    """The run's summary, from the evidence on disk: what is graded is what was written."""
    evidence = read_evidence(writer.folder)
    sums = summarise(evidence)
    series = estimates(sums)
    if scored:
        rollout, trainer = flat(evidence, "rollout_logprobs"), flat(evidence, "trainer_logprobs")
        series |= token_statistics(rollout, trainer, num_response_tokens(evidence))
        series |= _routing(writer.metrics)
        series["full_vocab_kl_nats_per_token"] = writer.metrics[0].get("full_vocab_kl_nats_per_token")
    counts = {
        "num_prompts": len(sums["prompt_id"]),
        "num_rollouts": evidence.num_rows,
        "num_response_tokens": int(np.sum(sums["num_response_tokens"])),
    }
    writer.finish("success", summary=sums, counts=counts, series_summary=series)
