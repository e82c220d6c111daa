"""What a trainer cannot do, seen in the settings of its cells. No torch."""

from __future__ import annotations

from suite.errors import TaskError
from suite.spec.kinds import KINDS, kind_of
from suite.spec.shapes import shape_of
from suite.spec.task import Task

MOE_FAMILIES = ("qwen3_moe",)  # that the moe trainer holds a table of names for
OF_TRAINING = ("train.lora", "data.max_prompt_tokens", "schedule.minibatch_of", "schedule.dynamic_sampling",
               "schedule.whole_rows_per_step", "precision.gradient_reduction")  # fmt: skip


def trainer_errors(task: Task, cells: list) -> dict[str, TaskError]:
    """One error per key, of the first cell that has it."""
    found: dict[str, TaskError] = {}
    for cell in cells:
        engine = cell.get("train.engine", None) if cell.settings.get("train") else "none"
        rules = [] if engine == "none" else (_of_moe(cell) if engine == "moe" else _of_dense(cell)) + _of_ranks(task, cell)
        for key, value, allowed in [*_of_training(task, cell), *rules]:
            found.setdefault(key, TaskError(task.file, key, value, allowed))
    return found


def _of_training(task: Task, cell) -> list[tuple]:
    """What acts on training alone. Fresh adapters are the model they sit on: without training nothing is to be seen of
    them."""
    given = {key: cell.get(key, None) for key in OF_TRAINING if not kind_of(task).trains}
    shown = {key: f"rank {value['rank']}" if key == "train.lora" else value for key, value in given.items() if value is not None}
    allowed = f"nothing, outside protocol {' or '.join(kind.name for kind in KINDS.values() if kind.trains)}"
    return [(key, value, allowed) for key, value in shown.items()]


def _of_moe(cell) -> list[tuple]:
    family, attention, lora = (cell.get(path, None) for path in ("model.family", "train.attention", "train.lora"))
    rules = [
        (family in MOE_FAMILIES, "model.family", family, f"{', '.join(MOE_FAMILIES)} with train.engine moe"),
        (attention in (None, "sdpa"), "train.attention", attention, "sdpa with train.engine moe"),
        (not lora, "train.lora", f"rank {lora['rank']}" if lora else None, "nothing with train.engine moe"),
    ]
    return [rule[1:] for rule in rules if not rule[0]]


def _of_dense(cell) -> list[tuple]:
    experts = cell.get("train.parallel.expert", None) or 1
    replayed = cell.get("train.routing_replay", None)
    rules = [("train.parallel.expert", experts, "1 with train.engine dense")] if experts > 1 else []
    return rules + ([("train.routing_replay", replayed, "nothing with train.engine dense")] if replayed else [])


def _of_ranks(task: Task, cell) -> list[tuple]:
    """Experts are spread over the ranks that share the data; heads and layers are dealt out whole; every GPU has a rank."""
    ways = {way: cell.get(f"train.parallel.{way}", None) or 1 for way in ("data", "tensor", "pipeline", "expert")}
    ranks, gpus = ways["data"] * ways["tensor"] * ways["pipeline"], task.resources.gpus * task.resources.nodes
    rules = [(ways["data"] % ways["expert"] == 0, "expert", f"a divisor of train.parallel.data, {ways['data']}")]
    if kind_of(task).trains and gpus and not task.resources.cpu_ok:
        rules.append((ranks == gpus, "data", f"{gpus // (ways['tensor'] * ways['pipeline'])}: resources has {gpus} GPUs, one for each rank"))
    if shape := shape_of(cell.settings["model"]):
        counts = {"expert": ("experts", shape.experts), "tensor": ("key-value heads", shape.kv_heads), "pipeline": ("layers", shape.layers)}
        rules += [(num % ways[way] == 0, way, f"a divisor of the {num} {what} of the model") for way, (what, num) in counts.items() if num]
    return [(f"train.parallel.{way}", ways[way], allowed) for fits, way, allowed in rules if not fits]
