"""Tasks and runs made by hand for the tests of grading: small, and with an outcome that is known beforehand."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from suite.measure.mismatch import prompt_sums
from suite.record.run import Run
from suite.record.schema import new_record
from suite.spec.plan import plan
from suite.spec.precision import ALWAYS_FP32, CONTRACT, Precision
from suite.spec.reading import load_task
from suite.spec.task import Task

FINGERPRINT = "cpu-test_none-0_torch-0"
CURVES = Path(__file__).parents[1] / "baselines" / "curves"

OFFLINE = """\
schema: 1
id: {id}
version: 1
grade_version: 1
tier: desk
title: A task for tests
protocol: offline_mismatch
model: {{id: tiny, revision: "1", sha256: "{sha}", family: qwen2, dtype_on_disk: bf16}}
data: {{id: running-sums, revision: "1", sha256: "{sha}", template: desk, num_prompts: 6}}
rollout: {{engine: hf, samples_per_prompt: 2, temperature: 1.0, top_p: 1.0, max_tokens: 64}}
train: {{engine: dense, score_batch_size: 4}}
arms:
  bf16: {{precision: {{rollout: bf16, train: bf16}}}}
  fp16: {{precision: {{rollout: fp16, train: fp16}}}}
vary: [precision.rollout, precision.train]
seeds: {seeds}
resources: {{gpus: 0, gpu_mem_gib: 0.0, disk_gib: 1.0, cpu_ok: true}}
"""
RL = """\
schema: 1
id: {id}
version: 1
grade_version: 1
tier: desk
title: A task for tests
protocol: rl
model: {{id: tiny, revision: "1", sha256: "{sha}", family: qwen2, dtype_on_disk: bf16}}
data: {{id: running-sums, revision: "1", sha256: "{sha}", template: desk, num_prompts: 6}}
rollout: {{engine: hf, samples_per_prompt: 8, temperature: 1.0, top_p: 1.0, max_tokens: 64}}
train:
  engine: dense
  score_batch_size: 4
  optimizer: {{name: adamw, lr: 1.0e-6, betas: [0.9, 0.95], eps: 1.0e-15, weight_decay: 0.0, warmup_steps: 0}}
algorithm: {{name: GRPO}}
schedule: {{steps: {steps}, prompts_per_step: 64, minibatches: 1}}
arms:
  bf16: {{precision: {{rollout: bf16, train: bf16}}}}
  fp16: {{precision: {{rollout: fp16, train: fp16}}}}
vary: [precision.rollout, precision.train]
seeds: {seeds}
resources: {{gpus: 0, gpu_mem_gib: 0.0, disk_gib: 1.0, cpu_ok: true}}
"""
COMPARE = """\
schema: 1
id: {id}
version: 1
grade_version: 1
tier: desk
title: A task for tests
protocol: compare
needs: {needs}
seeds: {seeds}
resources: {{gpus: 0, gpu_mem_gib: 0.0, disk_gib: 1.0, cpu_ok: true}}
"""


def task_of(
    folder: Path, text: str, rest: str, *, name: str = "tiny", seeds=(0, 1, 2), needs=(), sha: str = "a" * 64, steps: int = 100
) -> Task:
    """The task that this text describes; `rest` holds claims, grade and controls."""
    path = folder / f"{name}.yaml"
    path.write_text(text.format(id=name, seeds=list(seeds), needs=list(needs), sha=sha, steps=steps) + rest)
    return load_task(path)


def claim(kind: str, grade: str, *, name: str = "C1-x", paper: str = "") -> str:
    """One claim with its grade block, in flow style."""
    return f"claims:\n  - {{id: {name}, about: C1, kind: {kind}, statement: s{paper}}}\ngrade:\n  {name}: {{{grade}}}\n"


_PLANNED: dict[int, tuple] = {}  # id -> (task, cells); the task is kept, so that its id stays its own


def cells_of(task: Task) -> list:
    """The cells of a task, planned once: planning is slow next to grading."""
    if id(task) not in _PLANNED:
        _PLANNED[id(task)] = (task, plan(task))
    return _PLANNED[id(task)][1]


def executed_as(asked: dict) -> dict:
    """What engines record that ran as their arm asks."""
    precision = Precision.of(asked)
    return {point: getattr(precision, name) for point, name in CONTRACT.items()} | dict.fromkeys(ALWAYS_FP32, "fp32")


def run_of(
    task: Task, arm: str, seed: int, *, metrics=(), summary=None, status="success", point=None, **changes
) -> Run:
    """A finished run of a cell of the task. `changes` replace whole entries of its record."""
    cells = [cell for cell in cells_of(task) if cell.arm == arm and (point is None or dict(cell.point) == point)]
    cell = next((cell for cell in cells if cell.seed == seed), cells[0])
    asked = dict(cell.settings["precision"])
    ran = executed_as(asked)
    where = {
        "name": f"{arm}.s{seed}",
        "arm": arm,
        "point": dict(cell.point),
        "seed": seed,
        "is_control": cell.is_control,
    }
    where |= {"settings": cell.settings, "defaults": dict(cell.defaults)}
    known = {"status": status, "precision_executed": ran, "started_utc": "2026-01-01T00:00:00Z"}
    record = new_record(task, where, cell.run_key(), environment={"os": "test"}, fingerprint=FINGERPRINT, **known)
    return Run(Path("nowhere"), record | changes, list(metrics), summary)


def series_run(task: Task, arm: str, seed: int, values, name: str = "reward_mean", cut: bool = False, **more) -> Run:
    """An RL run with one series, a value per step, from step 0 as the loop counts; `more` may hold further series as
    arrays or fields of run_of. It goes on to the end of the task's schedule with its last values, unless it is `cut`.
    """
    extra = {key: more.pop(key) for key in list(more) if isinstance(more[key], (list, np.ndarray))}
    num = len(values) if cut else max(len(values), task.schedule.steps)
    columns = {key: held(column, num) for key, column in {name: values, **extra}.items()}
    rows = [{"step": i} | {key: float(column[i]) for key, column in columns.items()} for i in range(num)]
    return run_of(task, arm, seed, metrics=rows, **more)


def held(values, num: int) -> np.ndarray:
    """A series of `num` values that stays where it was at its end."""
    return np.pad(np.asarray(values, dtype=float), (0, max(0, num - len(values))), mode="edge")


def prompt_table(noise: float, seed: int, num_prompts: int = 6, tokens: int = 400) -> dict[str, np.ndarray]:
    """Sums of prompts whose log-ratio per token is normal with standard deviation `noise`: k3 is about noise^2 /
    2.
    """
    rng = np.random.default_rng([seed, int(1 / noise)])
    ids = [f"p{i}" for i in range(num_prompts) for _ in range(2)]
    log_mu = np.log(rng.uniform(0.2, 0.9, tokens * len(ids)))
    lengths = [tokens + 10 * (i % 2) - 5 for i in range(len(ids))]
    return prompt_sums(
        ids,
        lengths,
        log_mu,
        log_mu + noise * rng.standard_normal(log_mu.size),
        np.ones(len(ids)),
        np.zeros(len(ids), bool),
    )


def offline_run(task: Task, arm: str, seed: int, noise: float, **changes) -> Run:
    return run_of(task, arm, seed, summary=prompt_table(noise, 1000 * len(arm) + 10 * ord(arm[0]) + seed), **changes)


def curve(
    panel: str,
    precision: str,
    last: int | None = None,
    figure: str = "fig1_train_smoothed",
    column: str = "reward_smoothed",
):
    """A digitised curve of the paper, interpolated to every iteration from 1 to its end (or to `last`)."""
    (path,) = CURVES.glob(f"{figure}_{panel}_*.csv")
    with open(path, newline="") as file:
        points = [
            (float(row["step"]), float(row[column])) for row in csv.DictReader(file) if row["precision"] == precision
        ]
    steps, values = np.array(points).T
    return np.interp(np.arange(1, int(min(steps[-1], last or np.inf)) + 1), steps, values)


def jittered(values: np.ndarray, seed: int, offset: float = 0.004) -> np.ndarray:
    """Another seed of the same curve, as far as noise goes: late by up to 7 steps, and up or down by `offset` (one
    sd).
    """
    rng = np.random.default_rng(seed)
    late = int(rng.integers(0, 8))
    return np.clip(np.concatenate([values[:1].repeat(late), values])[: len(values)] + offset * rng.standard_normal(), 0.002, 0.998)


def only(verdict: dict) -> dict:
    """The one claim of a verdict."""
    (row,) = verdict["claims"]
    return row


def block(
    estimand: str, contrast: str, accept: str = "", more: str = "", method: str = "student_t", level: str = "P4"
) -> str:
    """A grade block in flow style, for `claim`."""
    parts = [f"estimand: {estimand}", f"contrast: {{{contrast}}}", f"interval: {{method: {method}}}"]
    parts += [f"accept: {accept}"] if accept else []
    parts += [more] if more else []
    return ", ".join([*parts, f'tolerance: {{level: {level}, derivation: test, date: "2026-01-01"}}'])


def event_grade(arm: str, expect: str, drop: float = 0.10, hold: int = 10, window: int = 1) -> str:
    """The grade block of a claim that an arm collapses, or that it does not."""
    event = f"event: {{drop: {drop}, window: {window}, hold: {hold}, expect: {expect}}}"
    accept = "[0.5, 1.0]" if expect == "collapses" else "[0.0, 0.5]"
    return block(
        "reward_mean", f"arm: {arm}", accept, f"reducer: fraction_of_seeds, min_seeds: 5, {event}", "clopper_pearson"
    )


def time_grade(contrast: str, accept: str, drop: float = 0.10, hold: int = 10, min_seeds: int = 3) -> str:
    """The grade block of a claim about when arms collapse."""
    event = f"event: {{drop: {drop}, window: 1, hold: {hold}, expect: collapses}}"
    return block("reward_mean", contrast, accept, f"reducer: time_to_event, min_seeds: {min_seeds}, {event}")
