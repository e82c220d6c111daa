"""`suite rehearse TASK`: every arm and control of a task once, for two steps, with an embedded model and its problems.

The code, the precisions, the algorithm, adapters and stop strings are the task's; model, data, lengths and batch sizes are
cut down to what a laptop does in seconds. It shows that a task will start and that its engines run in the dtypes that it
asks for; it says nothing about the paper: nothing of it is graded, and its records are thrown away. No torch.
"""

from __future__ import annotations

import dataclasses
import re

from suite.errors import UserError
from suite.spec.kinds import kind_of
from suite.spec.plan import Cell, ResolvedTask, resolve_task
from suite.spec.task import Task

STEPS = 2
# The embedded model of a family; every other family is rehearsed on the Qwen2.
EMBEDDED = {"llama": "llama-1m", "qwen3_moe": "qwen3-moe-2m"}
MAX_TOKENS, MAX_MODEL_LEN = 192, 256
NUM_TERMS = (12, 16)  # half of the answers are wrong: groups disagree, and there is a gradient
PROMPTS, SAMPLES, BATCH = 4, 4, 4


def rehearsal(task: Task | ResolvedTask) -> list[Cell]:
    """The first seed of every arm, grid point and control, cut down. Raises UserError for a task without engines."""
    resolved = resolve_task(task)
    task = resolved.task
    if not kind_of(task).has_engines:
        raise UserError(f"found {task.id} (protocol {task.protocol}), allowed: a task that runs an engine")
    first: dict[tuple, Cell] = {}
    for cell in resolved.cells:
        first.setdefault((cell.arm, str(cell.point)), cell)
    return [dataclasses.replace(cell, settings=cut_down(cell.settings), defaults=()) for cell in first.values()]


def cut_down(settings: dict) -> dict:
    """Resolved settings of a cell, with model, data and sizes of a rehearsal."""
    family = settings["model"]["family"] if settings["model"]["family"] in EMBEDDED else "qwen2"
    name = EMBEDDED.get(family, "qwen2-1m")
    model = {"id": f"desk/{name}", "path": f"baselines/desk/{name}", "family": family}
    data = {"id": "desk/sum-mod-100", "template": "desk", "num_prompts": PROMPTS, "num_terms": list(NUM_TERMS)}
    if settings["data"].get("keep_accuracy"):
        data["keep_accuracy"] = settings["data"]["keep_accuracy"]
    return settings | {
        "model": model,
        "data": data,
        "rollout": _rollout(settings["rollout"]),
        "train": _train(settings.get("train")),
        "schedule": _schedule(settings.get("schedule")),
    }


def _rollout(rollout: dict) -> dict:
    small = {
        "samples_per_prompt": min(SAMPLES, rollout["samples_per_prompt"]), "max_tokens": MAX_TOKENS,
        "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 8, "prompts_per_batch": PROMPTS // STEPS, "kv_cache_gib": 1.0,
        "max_num_batched_tokens": 8 * MAX_MODEL_LEN, "gpu_memory_utilization": None, "enforce_eager": True,
        "chunked_prefill": False, "cascade_attention": False,
    }  # fmt: skip
    return rollout | small


def _train(train: dict | None) -> dict | None:
    if train is None:
        return None
    small = {"score_batch_size": BATCH, "micro_batch_size": SAMPLES, "parallel": None, "head_chunk_tokens": 64}
    if perturb := train.get("perturb"):  # the embedded model has no layer 14
        small["perturb"] = perturb | {"parameter": re.sub(r"layers\.\d+", "layers.2", perturb["parameter"])}
    return train | small


def _schedule(schedule: dict | None) -> dict | None:
    if schedule is None:
        return None
    return schedule | {
        "steps": STEPS, "prompts_per_step": PROMPTS, "minibatches": min(2, schedule["minibatches"]), "checkpoint_every": 1,
    }  # fmt: skip
