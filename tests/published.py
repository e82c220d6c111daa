"""A checkout in miniature for the tests of report, verify and the pytest plugin: one small task, and runs made by hand.

The log-probabilities are drawn so that the outcome is known: log pi - log mu is normal with standard deviation 2^-5
(bf16) and 2^-8 (fp16) per token, so that k3 is about its square over 2 and the ratio of the two arms is 64.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from fakes import executed_as

from suite.files import write_json
from suite.machine import environment
from suite.measure.mismatch import estimates, prompt_sums
from suite.record import run as record
from suite.record.manifest import write_manifest
from suite.record.writer import open_run
from suite.spec.plan import plan
from suite.spec.reading import load_task

MACHINE = {"os": "test", "cpu": {"class": "test", "num_cores": 1}, "gpus": [], "torch_build": None, "packages": {}}
FINGERPRINT = environment.fingerprint(MACHINE)
NOISE = {"bf16": 2.0**-5, "fp16": 2.0**-8, "fp32": 2.0**-20}
TASK = """\
schema: 1
id: desk-tiny
version: 1
grade_version: 1
tier: desk
title: A task for tests
protocol: offline_mismatch
claims:
  - {id: C1-k3-ratio, about: C1, kind: ratio, statement: "k3 in bf16 is 16 to 128 times that in fp16."}
  - {id: C2-seq, about: C2, kind: report, statement: "Sequence-level KL | as the paper prints it."}
model: {id: tiny, revision: "1", sha256: "SHA", family: qwen2, dtype_on_disk: bf16}
data: {id: running-sums, revision: "1", sha256: "SHA", template: desk, num_prompts: 6}
rollout: {engine: hf, samples_per_prompt: 8, temperature: 1.0, top_p: 1.0, max_tokens: 400, max_model_len: 512,
          prompts_per_batch: 6, max_num_seqs: 8}
train: {engine: dense, score_batch_size: 4, attention: eager}
arms:
  bf16: {precision: {rollout: bf16, train: bf16}}
  fp16: {precision: {rollout: fp16, train: fp16}}
vary: [precision.rollout, precision.train]
seeds: [0, 1, 2]
metrics: [k3_nats_per_token]
grade:
  C1-k3-ratio:
    estimand: k3_nats_per_token
    contrast: {ratio: [bf16, fp16]}
    reducer: mean
    interval: {method: student_t, level: 0.90, unit: seed}
    accept: [16.0, 128.0]
    min_seeds: 3
    tolerance: {level: P4, derivation: "three more mantissa bits: 2^6", date: "2026-01-01"}
  C2-seq:
    estimand: seq_kl_k1_nats
    contrast: {arm: bf16}
    reducer: mean
    interval: {method: student_t, level: 0.90, unit: seed}
resources: {gpus: 0, gpu_mem_gib: 0.0, nodes: 1, disk_gib: 1.0, cpu_ok: true}
budget: {minutes: 1.0}
""".replace("SHA", "a" * 64)
MATRIX_ARMS = {f"{r}-rollout-{t}": (r, t) for r in ("bf16", "fp16", "fp32") for t in ("bf16", "fp16", "fp32")}


def checkout(root: Path, text: str = TASK, name: str = "desk-tiny") -> Path:
    """A folder that find_repo accepts, with one task in it."""
    (root / "tasks" / "desk").mkdir(parents=True, exist_ok=True)
    (root / "tasks" / "_base").mkdir(exist_ok=True)
    (root / "pyproject.toml").write_text('[project]\nname = "fp16-mismatch-suite"\n')
    (root / "tasks" / "desk" / f"{name}.yaml").write_text(text)
    return root


def evidence(noise: float, seed: int, num_prompts: int = 6, samples: int = 8) -> pa.Table:
    rng = np.random.default_rng([seed, int(1 / noise)])
    rows = []
    for prompt in range(num_prompts):
        for sample in range(samples):
            length = int(rng.integers(20, 400))
            log_mu = np.log(rng.beta(0.6, 0.25, length).clip(1e-4, 0.9999))
            log_pi = np.minimum(log_mu + noise * rng.standard_normal(length), -1e-6)
            rows.append({
                "prompt_id": f"p{prompt}", "sample_id": sample, "step": 0, "token_ids": [1, 2] + [3] * length,
                "num_prompt_tokens": 2, "rollout_logprobs": log_mu.astype(np.float32),
                "trainer_logprobs": log_pi.astype(np.float32), "finish_reason": "stop", "reward": 1.0,
            })  # fmt: skip
    return pa.Table.from_pylist(rows, schema=record.EVIDENCE_SCHEMA)


def sums_of(table: pa.Table) -> dict[str, np.ndarray]:
    lengths = [len(row) for row in table["rollout_logprobs"].to_pylist()]
    flat = [
        np.concatenate([np.asarray(x, np.float64) for x in table[c].to_pylist()])
        for c in ("rollout_logprobs", "trainer_logprobs")
    ]
    return prompt_sums(
        table["prompt_id"].to_pylist(), lengths, *flat, np.ones(table.num_rows), np.zeros(table.num_rows, bool)
    )


def make_runs(
    repo: Path, machine: dict | None = None, fresh: bool = False, noise: dict = NOISE, task: str = "desk-tiny"
) -> list:
    """Every cell of the task as a finished run below repo/runs, written by the real writer."""
    task = load_task(repo / "tasks" / "desk" / f"{task}.yaml")
    return [_make_run(repo / "runs", task, cell, MACHINE | (machine or {}), fresh, noise) for cell in plan(task)]


def _make_run(runs_root: Path, task, cell, machine: dict, fresh: bool, noise: dict):
    writer = open_run(runs_root, task, cell, machine, FINGERPRINT, fresh=fresh)
    if isinstance(writer, record.Run):
        return writer
    pair = cell.get("precision.rollout"), cell.get("precision.train")
    table = evidence(max(noise[name] for name in pair), cell.seed + 100 * fresh)
    sums = sums_of(table)
    now = {name: float(value) for name, value in estimates(sums).items()}
    counts = {"num_rollouts": table.num_rows, "num_response_tokens": int(sums["num_response_tokens"].sum())}
    writer.append({"step": 0, **counts, **now}, table)
    counts |= {"num_prompts": 6}
    executed = executed_as(cell.settings["precision"])
    weights = {"sha256": "a" * 64, "revision": "1"}
    return writer.finish("success", summary=sums, counts=counts, series_summary=now, precision_executed=executed, weights=weights)


def rewrite_record(path: Path, **changes) -> None:
    """Another record.json in a run folder, with the hashes that the writer would give it."""
    write_json(path, sealed_record(path, changes))
    if record.read_record(path.parent)[0]["status"] in record.FINISHED:
        write_manifest(path.parent, besides=record.BESIDES)
    else:
        (path.parent / record.MANIFEST).unlink(missing_ok=True)


def sealed_record(path: Path, changes: dict) -> dict:
    content = record.read_record(path.parent)[0] | changes
    return content | {record.SEAL: record.record_seal(content)}
