"""The task of a check: an ordinary one, which `suite run`, `grade` and everything else take. No torch."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from suite.check.checkpoint import Checkpoint
from suite.spec.plan import canonical_json

# statistic -> what it is about in the paper; the numbers that a check reports
STATISTICS = {
    "k1_nats_per_token": "C1",
    "k3_nats_per_token": "C1",
    "prob_diff_mean": "C3",
    "mult_prob_error": "C1",
    "out_of_band_share": "C1",
}
RATIOS = ("k3_nats_per_token", "prob_diff_mean")
HEAD = """\
# Written by `suite check`. It is a task like any other: change it, give it another id (and file name), and
#     suite run {file} --out {runs}
#     suite grade {file} --runs {runs}
# run and grade it again.
"""
DTYPES_ON_DISK = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
PROMPTS = "prompts.parquet"
SCORE_BATCH = 8
MAX_NUM_SEQS = 64


@dataclass(frozen=True)
class Options:
    """What the user chose. precisions: of both engines, unless `trainer` names the trainer's."""

    precisions: tuple[str, ...]
    trainer: str | None
    samples: int
    max_tokens: int
    seeds: tuple[int, ...]
    sampler: str
    attention: str

    @property
    def arms(self) -> dict[str, tuple[str, str]]:
        """Name of each arm -> (rollout, train), in the order that was asked for."""
        pairs = [(rollout, self.trainer or rollout) for rollout in self.precisions]
        return {rollout if rollout == train else f"{train}-{rollout}": (rollout, train) for rollout, train in pairs}


def context_of(model: Checkpoint, longest_prompt: int, max_tokens: int) -> int:
    """Positions that both engines keep room for: prompt and response, no more than the model was made for."""
    wanted = longest_prompt + max_tokens
    return wanted if model.context is None else min(wanted, model.context)


def task_of(model: Checkpoint, options: Options, prompts_sha256: str, prompts: list[list[int]], hashes: dict[str, str | None],
            runs_dir: Path, on_gpu: bool) -> dict:
    """The task as plain data, its id made of model and settings: another check of the same model is another task, in a folder
    of its own, with its prompts in PROMPTS."""
    content = _content(model, options, prompts_sha256, prompts, hashes, on_gpu)
    keyed = {name: value for name, value in content.items() if name not in ("model", "title")}
    name = f"check-{slug(model.shown)}-{hashlib.sha256(canonical_json([keyed, hashes]).encode()).hexdigest()[:8]}"
    content["data"]["path"] = str(runs_dir / name / PROMPTS)
    return {"schema": 1, "id": name, **content}


def slug(shown: str) -> str:
    name = Path(shown).expanduser().resolve().name if Path(shown).expanduser().is_dir() else shown
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()[:40] or "model"


def as_text(task: dict, file: Path, runs: Path) -> str:
    return HEAD.format(file=file, runs=runs) + yaml.safe_dump(task, sort_keys=False, allow_unicode=True, width=120)


def _content(model, options, prompts_sha256, prompts, hashes, on_gpu) -> dict:
    context, num_prompts = context_of(model, max(map(len, prompts)), options.max_tokens), len(prompts)
    named = {"id": model.hub_id, "revision": model.folder.name} if model.hub_id else {"id": model.folder.name, "path": str(model.folder)}
    return {
        "version": 1, "grade_version": 1, "tier": "node" if on_gpu else "desk",
        "title": f"The mismatch between sampler and trainer of {model.shown}", "tags": ["check"], "protocol": "offline_mismatch",
        "model": named | hashes | {"family": model.family, "dtype_on_disk": _on_disk(model)},
        "data": {"id": "check/prompts", "path": None, "sha256": prompts_sha256, "rows": num_prompts, "template": "tokens"},
        "rollout": {
            "engine": options.sampler, "samples_per_prompt": options.samples, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
            "max_tokens": options.max_tokens, "max_model_len": context, "max_num_seqs": MAX_NUM_SEQS, "prompts_per_batch": num_prompts,
            "enforce_eager": True, "prefix_caching": False, "chunked_prefill": False, "cascade_attention": False,
            "max_num_batched_tokens": max(context, 8192), "kv_cache_gib": 4.0 if on_gpu else 1.0,
        },
        "train": {"engine": "dense", "attention": options.attention, "score_batch_size": SCORE_BATCH},
        "arms": {arm: {"precision": {"rollout": rollout, "train": train}} for arm, (rollout, train) in options.arms.items()},
        "vary": ["precision.rollout", "precision.train"],
        "seeds": list(options.seeds),
        "metrics": [*STATISTICS, "k2_nats_per_token", "logprob_diff_mean", "prob_diff_max", "seq_kl_k1_nats", "effective_sample_size"],
        **_claims(options),
        "resources": {"gpus": 1 if on_gpu else 0, "gpu_mem_gib": 0, "nodes": 1, "disk_gib": 1, "cpu_ok": True},
    }  # fmt: skip


def _claims(options: Options) -> dict:
    """Everything is reported and nothing graded: nobody fixed beforehand what a model of the user's should show."""
    claims, grade = [], {}
    for arm in options.arms:
        for name, about in STATISTICS.items():
            _add(claims, grade, f"{arm}-{name}", about, f"{name} in {arm}.", name, {"arm": arm})
    for first, second in pairs_of(options.arms):
        for name in RATIOS:
            _add(claims, grade, f"{first}-over-{second}-{name}", STATISTICS[name], f"{name}, {first} / {second}.", name, {"ratio": [first, second]})
    return {"claims": claims, "grade": grade}


def pairs_of(arms) -> list[tuple[str, str]]:
    """The ratios that are taken: of neighbours, in the order that was asked for."""
    names = list(arms)
    return list(zip(names, names[1:]))


def _add(claims: list, grade: dict, claim_id: str, about: str, statement: str, estimand: str, contrast: dict) -> None:
    claims.append({"id": claim_id, "about": about, "statement": statement, "kind": "report"})
    grade[claim_id] = {"estimand": estimand, "contrast": contrast, "interval": {"method": "student_t", "level": 0.9, "unit": "seed"}}


def _on_disk(model: Checkpoint) -> str:
    largest = max(model.sizes, key=model.sizes.get)
    return DTYPES_ON_DISK.get(largest, "unknown")

