"""The engines of a group of cells, loaded when first needed, and the small steps around them that protocols share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from suite.engines.arithmetic import matmul_flags
from suite.engines.batch import Request, Rollout, request_seed
from suite.engines.models import load_tokenizer, model_folder, model_record, model_vocabulary, stop_token_ids
from suite.engines.samplers.load import load_sampler
from suite.engines.trainers.load import load_trainer
from suite.engines.world import World
from suite.problems.data import Prompt, token_ids
from suite.problems.rewards import FORMAT_OF_TEMPLATE, RewardPool
from suite.protocols.session import Session
from suite.spec.plan import Cell

MIN_WORKERS = 2  # that judge answers
# Cells that agree on these can share one sampler.
SAMPLER_SETTINGS = ("model", "rollout", "precision.rollout", "precision.rollout_rounded", "precision.kv_cache",
                    "precision.rollout_logits")  # fmt: skip


class Engines:
    """The sampler of a group and the trainers its cells ask for, each loaded when first needed."""

    def __init__(self, cell: Cell, world: World = World()):
        self._cell, self.world = cell, world
        self._sampler, self._trainers, self._folder, self._tokenizer = None, {}, None, None
        self.rewards = reward_pool(cell.settings["data"], world.size)

    @property
    def folder(self) -> Path:
        self._folder = self._folder or model_folder(self._cell.settings["model"])
        return self._folder

    @property
    def weights(self) -> dict:
        """What a record says of the checkpoint (models.model_record)."""
        return model_record(self.folder)

    @property
    def tokenizer(self):
        self._tokenizer = self._tokenizer or load_tokenizer(self.folder)
        return self._tokenizer

    @property
    def vocabulary_size(self) -> int:
        """As the model's config says it."""
        return model_vocabulary(self.folder)

    @property
    def sampler(self):
        if self._sampler is None:
            rollout, dtype = self._cell.settings["rollout"], self._cell.get("precision.rollout")
            cache, head = (self._cell.get(f"precision.{point}", None) for point in ("kv_cache", "rollout_logits"))
            self._sampler = load_sampler(self.folder, rollout, dtype, stop_token_ids(self.folder), cache, head)
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

    def new_trainer(self, cell: Cell):
        """A trainer at the checkpoint's weights, for a run that will change them; the one before is closed, so that two
        never share the memory."""
        if "changing" in self._trainers:
            self._trainers.pop("changing").close()
        train, precision = cell.settings["train"], cell.settings["precision"]
        trainer = load_trainer(self.folder, train, precision, cell.get("rollout.temperature"), cell.seed, self.world)
        self._trainers["changing"] = trainer
        return trainer

    def scorable(self, rollouts: list[Rollout]) -> list[tuple[list[int], int]]:
        """(token_ids, num_prompt_tokens) of what a sampler can score of these rollouts: vLLM wants room for one more token."""
        room = (self._cell.get("rollout.max_model_len", None) or 10**9) - 1
        cut = [(rollout.token_ids[:room], len(rollout.request.prompt_token_ids)) for rollout in rollouts]
        return [(tokens, num_prompt) for tokens, num_prompt in cut if len(tokens) > num_prompt]

    @property
    def samples_per_prompt(self) -> int:
        return self._cell.get("rollout.samples_per_prompt")

    def requests(self, prompts: list[Prompt], *seed_parts) -> list[Request]:
        """One request per prompt and sample; its seed is made of `seed_parts`, the prompt and the sample."""
        samples = range(self.samples_per_prompt)
        tokens = [tuple(self._ids(prompt)) for prompt in prompts]
        return [
            Request(prompt.prompt_id, sample, ids, request_seed(*seed_parts, prompt.prompt_id, sample))
            for prompt, ids in zip(prompts, tokens, strict=True)
            for sample in samples
        ]

    def _ids(self, prompt: Prompt) -> list[int]:
        """Without a tokenizer for a prompt that is ids already: not every checkpoint has one."""
        return token_ids(prompt, None if prompt.token_ids is not None else self.tokenizer)

    def within(self, prompts: list[Prompt], num_tokens: int | None) -> list[Prompt]:
        """The prompts of at most so many tokens; all without a limit."""
        return [prompt for prompt in prompts if num_tokens is None or len(self._ids(prompt)) <= num_tokens]

    def reward(self, rollouts: list[Rollout], prompts: list[Prompt]) -> list[float]:
        """1.0 or 0.0 per rollout; nan where the problems have no answers."""
        if not any(prompt.gold for prompt in prompts):
            return [float("nan")] * len(rollouts)
        responses = [rollout.response_token_ids for rollout in rollouts]
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        gold_of = {prompt.prompt_id: prompt.gold for prompt in prompts}
        golds = [gold_of[rollout.request.prompt_id] for rollout in rollouts]
        truncated = [rollout.finish_reason == "length" for rollout in rollouts]
        return [reward.value for reward in self.rewards.score(texts, golds, truncated)]

    def executed(self, trainer=None) -> dict[str, str]:
        """What the sampler, and the trainer of a cell, say that they ran in, and torch's flags for both."""
        return self.sampler.executed() | (trainer.executed() if trainer else {}) | matmul_flags()

    def close(self) -> None:
        for engine in (self._sampler, *self._trainers.values(), self.rewards):
            if engine is not None:
                engine.close()


def run_one_by_one(cells: list[Cell], session: Session, stage: str, run_cell: Callable[..., None]) -> None:
    """Every cell that has no finished record, in groups that share a sampler. `run_cell(cell, writer, engines, session)`
    ends with the record finished (Session.run_cell says what becomes of an error)."""
    for group in group_cells(cells, SAMPLER_SETTINGS):
        engines = Engines(group[0], session.world)
        try:
            for cell in group:
                session.run_cell(cell, stage, lambda writer, cell=cell, pool=engines: run_cell(cell, writer, pool, session))
        finally:
            engines.close()


def reward_pool(data: dict, num_ranks: int = 1) -> RewardPool:
    """The rewards of a data section: format, grader, the time for one answer, and what a truncated response is worth; judged by
    this rank's share of the cores, and by two processes at least."""
    num_workers = max(MIN_WORKERS, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) // num_ranks)
    seconds = {"timeout_seconds": data["reward_timeout_s"]} if data.get("reward_timeout_s") else {}
    format = FORMAT_OF_TEMPLATE.get(data.get("template") or "none", "desk")  # of `tokens` nothing is ever judged
    return RewardPool(format, zero_truncated=bool(data.get("zero_truncated")), grader=data.get("grader"), num_workers=num_workers, **seconds)


def group_cells(cells: list[Cell], paths: tuple[str, ...]) -> list[list[Cell]]:
    """Cells with equal values at the given settings, in order of first appearance."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        values = [cell.seed if path == "seed" else cell.get(path, None) for path in paths]
        groups.setdefault(json.dumps(values, sort_keys=True), []).append(cell)
    return list(groups.values())
