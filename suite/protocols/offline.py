"""Protocols `offline_mismatch` and `offline_accuracy`: sample with one engine, re-score with the other, change no weight.

    for each sampler precision            one engine load serves all its cells
        for each launch (seed, problems)  cells that differ only in the trainer share the launch's rollouts
            for each batch of prompts
                sample -> reward -> score in every cell's trainer precision -> append evidence and metrics

The launch's seed draws desk problems and all sampling noise; arms with the same seed therefore see the same problems and
the same noise, and are compared pair by pair.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from suite.batch import Request, Rollout, evidence_table, request_seed
from suite.data import load_prompts, token_ids
from suite.mismatch import estimates, prompt_sums, token_statistics
from suite.models import load_tokenizer, model_folder, stop_token_ids
from suite.plan import Cell
from suite.protocols import Session
from suite.record import Run, RunWriter, read_evidence
from suite.rewards import FORMAT_OF_TEMPLATE, RewardPool
from suite.rollouts import load_sampler
from suite.trainers import load_trainer

DEFAULT_PROMPTS_PER_BATCH = 32
SAMPLER_SETTINGS = ("model", "rollout", "precision.rollout", "precision.kv_cache", "precision.rollout_logits")


def run(cells: list[Cell], session: Session) -> None:
    for group in _groups(cells, SAMPLER_SETTINGS):
        engines = Engines(group[0])
        try:
            for launch in _groups(group, ("seed", "data")):
                _run_launch(launch, engines, session)
        finally:
            engines.close()


class Engines:
    """The sampler of a group and the trainers its cells ask for, each loaded when first needed."""

    def __init__(self, cell: Cell):
        self._cell = cell
        self._sampler, self._trainers, self._folder, self._tokenizer = None, {}, None, None
        self.rewards = RewardPool(FORMAT_OF_TEMPLATE[cell.get("data.template", "none")])

    @property
    def folder(self) -> Path:
        self._folder = self._folder or model_folder(self._cell.settings["model"])
        return self._folder

    @property
    def tokenizer(self):
        self._tokenizer = self._tokenizer or load_tokenizer(self.folder)
        return self._tokenizer

    @property
    def sampler(self):
        if self._sampler is None:
            rollout, dtype = self._cell.settings["rollout"], self._cell.get("precision.rollout")
            self._sampler = load_sampler(self.folder, rollout, dtype, stop_token_ids(self.folder))
        return self._sampler

    def trainer(self, cell: Cell):
        """The trainer of a cell, or None if its protocol has no trainer."""
        train, precision = cell.settings.get("train"), cell.settings["precision"]
        if train is None:
            return None
        key = json.dumps([train, precision], sort_keys=True)
        if key not in self._trainers:
            temperature = cell.get("rollout.temperature")
            self._trainers[key] = load_trainer(self.folder, train, precision, temperature)
        return self._trainers[key]

    def close(self) -> None:
        for engine in (self._sampler, *self._trainers.values(), self.rewards):
            if engine is not None:
                engine.close()


def _run_launch(cells: list[Cell], engines: Engines, session: Session) -> None:
    """All cells of one seed and one set of problems: they share every rollout."""
    writers: list[tuple[Cell, RunWriter]] = []
    for cell in cells:
        opened = session.open_cell(cell)
        if isinstance(opened, Run):
            session.progress(cell.name, 1, 1, "complete already")
        else:
            writers.append((cell, opened))
    try:
        if writers:
            _run_batches(writers, engines, session)
    except BaseException as error:
        for _, writer in writers:
            if writer.is_open:
                writer.fail("offline", error)
        raise


def _run_batches(writers: list[tuple[Cell, RunWriter]], engines: Engines, session: Session) -> None:
    cell = writers[0][0]
    prompts = load_prompts(cell.settings["data"], cell.seed)[: session.limit]
    size = cell.get("rollout.prompts_per_batch") or DEFAULT_PROMPTS_PER_BATCH
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    for index, batch in enumerate(batches):
        behind = [(cell, writer) for cell, writer in writers if writer.parts_done <= index]
        if behind:
            _run_batch(index, batch, behind, engines)
        for cell, writer in writers:
            k3 = writer.metrics[index].get("k3_nats_per_token")
            session.progress(cell.name, index + 1, len(batches), "" if k3 is None else f"k3 {k3:.2e}")
    for cell, writer in writers:
        _finish(cell, writer)


def _run_batch(index: int, prompts: list, writers: list[tuple[Cell, RunWriter]], engines: Engines) -> None:
    """Sample one batch of prompts, reward it, score it for every cell that lacks it, and append the part."""
    any_cell, _ = writers[0]
    requests = [
        Request(prompt.prompt_id, sample, tuple(token_ids(prompt, engines.tokenizer)),
                request_seed(any_cell.seed, prompt.prompt_id, sample))
        for prompt in prompts
        for sample in range(any_cell.get("rollout.samples_per_prompt"))
    ]  # fmt: skip
    started = time.perf_counter()
    rollouts = engines.sampler.sample(requests)
    sample_seconds = time.perf_counter() - started
    rewards = _rewards(rollouts, prompts, engines)
    sequences = [(rollout.token_ids, len(rollout.request.prompt_token_ids)) for rollout in rollouts]
    for cell, writer in writers:
        trainer, started = engines.trainer(cell), time.perf_counter()
        # without a trainer there is no pi: its log-probs are set to those of mu, and no mismatch metric is reported
        logprobs = trainer.score(sequences) if trainer else [rollout.rollout_logprobs for rollout in rollouts]
        seconds = {"t_sample_s": round(sample_seconds, 4), "t_score_s": round(time.perf_counter() - started, 4)}
        evidence = evidence_table(rollouts, logprobs, step=index, rewards=rewards)
        writer.append(_metrics(index, evidence, has_trainer=trainer is not None) | seconds, evidence)
        executed = engines.sampler.executed() | (trainer.executed() if trainer else {})
        if executed != writer.record["precision_executed"]:
            writer.update(precision_executed=executed)


def _rewards(rollouts: list[Rollout], prompts: list, engines: Engines) -> list[float]:
    responses = [rollout.response_token_ids for rollout in rollouts]
    texts = engines.tokenizer.batch_decode(responses, skip_special_tokens=True)
    gold_of = {prompt.prompt_id: prompt.gold for prompt in prompts}
    golds = [gold_of[rollout.request.prompt_id] for rollout in rollouts]
    truncated = [rollout.finish_reason == "length" for rollout in rollouts]
    return [reward.value for reward in engines.rewards.score(texts, golds, truncated)]


def flat(evidence, column: str) -> np.ndarray:
    """All values of a list column, one after the other, in float64."""
    return np.asarray(evidence[column].combine_chunks().flatten().to_numpy(zero_copy_only=False), np.float64)


def num_response_tokens(evidence) -> np.ndarray:
    return evidence["rollout_logprobs"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)


def summarise(evidence) -> dict[str, np.ndarray]:
    """Per-prompt sums (mismatch.PROMPT_SUM_COLUMNS) of an evidence table."""
    rewards = evidence["reward"].to_numpy().astype(np.float64)
    truncated = np.array([reason == "length" for reason in evidence["finish_reason"].to_pylist()])
    prompts = evidence["prompt_id"].to_pylist()
    logprobs = flat(evidence, "rollout_logprobs"), flat(evidence, "trainer_logprobs")
    return prompt_sums(prompts, num_response_tokens(evidence), *logprobs, rewards, truncated)


WITHOUT_TRAINER = ("response_tokens_mean", "reward_mean", "truncated_share")


def _metrics(index: int, evidence, has_trainer: bool) -> dict:
    """One line of metrics.jsonl. entropy_nats is the mean of -log mu over the sampled tokens."""
    values = estimates(summarise(evidence))
    values = values if has_trainer else {name: values[name] for name in WITHOUT_TRAINER}
    logprobs = flat(evidence, "rollout_logprobs")
    counts = {"step": index, "num_rollouts": evidence.num_rows, "num_response_tokens": int(logprobs.size)}
    return counts | values | {"entropy_nats": float(-logprobs.mean()) if logprobs.size else None}


def _finish(cell: Cell, writer: RunWriter) -> None:
    """The run's summary, from the evidence on disk: what is graded is what was written."""
    evidence = read_evidence(writer.folder)
    sums = summarise(evidence)
    series = estimates(sums)
    if cell.settings.get("train") is None:
        series = {name: series[name] for name in WITHOUT_TRAINER}
    else:
        rollout, trainer = flat(evidence, "rollout_logprobs"), flat(evidence, "trainer_logprobs")
        series |= token_statistics(rollout, trainer, num_response_tokens(evidence))
    counts = {
        "num_prompts": len(sums["prompt_id"]),
        "num_rollouts": evidence.num_rows,
        "num_response_tokens": int(np.sum(sums["num_response_tokens"])),
    }
    writer.finish("success", summary=sums, counts=counts, series_summary=series)


def _groups(cells: list[Cell], paths: tuple[str, ...]) -> list[list[Cell]]:
    """Cells with equal values at the given settings, in order of first appearance."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        values = [cell.seed if path == "seed" else cell.get(path, None) for path in paths]
        groups.setdefault(json.dumps(values, sort_keys=True), []).append(cell)
    return list(groups.values())
