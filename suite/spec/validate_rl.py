"""Checks of RL tasks that look across keys: algorithms that resolve, windows that fit into the run, events that could
be seen. No torch.
"""

from __future__ import annotations

from suite.errors import TaskError
from suite.spec.algorithms import ALGORITHMS
from suite.spec.algorithms import resolve as resolve_algorithm
from suite.spec.kinds import kind_of
from suite.spec.learning_rate import SCHEDULES
from suite.spec.perturbations import PERTURBATIONS
from suite.spec.plan import ResolvedTask, arm_names, read_path
from suite.spec.precision import COARSE_FORMATS, DTYPES
from suite.spec.task import Grade, Task

# A series that a run has only where a setting asks for it.
SERIES_OF = dict.fromkeys(
    ("drawn_reward_mean", "sampling_rounds", "sampling_limit_reached", "disagreeing_groups_share"), "schedule.dynamic_sampling"
) | {"eval_reward_mean": "schedule.eval_every"}
NOT_OF_THE_ROW = ("name", "shuffle_rewards", "perturb")  # of the algorithm section, but no override of a row


def rl_errors(resolved: ResolvedTask) -> list[TaskError]:
    """Every error of a task that trains; nothing for other protocols."""
    task = resolved.task
    if not kind_of(task).trains:
        return []
    cells = _cells(resolved)
    checks = (_algorithm, _learning_rate, _batch, _reduction, _held_out, _dynamic_sampling, _coarse, _perturbation)
    found = [error for key, settings in cells for check in checks for error in check(task, key, settings)]
    horizon = min(_steps(resolved), default=0)
    for name, grade in task.grade.items():
        found += _grade(task, f"grade.{name}", grade, horizon)
    found += _series_of_settings(task, cells)
    return list({(error.key, str(error.found)): error for error in found}.values())


def compare_errors(task: Task, needed: list[ResolvedTask]) -> list[TaskError]:
    """Windows and horizons of a comparison, against the shortest RL run among the needed tasks whose arms a claim names."""
    errors = []
    for name, grade in task.grade.items():
        training = [need for need in needed if kind_of(need.task).trains]
        named = [need for need in training if any(arm.startswith(f"{need.task.id}-") for arm in grade.contrast.names)]
        steps = [num for need in named for num in _steps(need)]
        if steps:
            errors += _grade(task, f"grade.{name}", grade, min(steps))
    return errors


def _cells(resolved: ResolvedTask) -> list[tuple[str, dict]]:
    """(key for errors, settings) of every arm and control at each of its grid points."""
    task = resolved.task
    named = [(f"arms.{arm}", arm) for arm in arm_names(task)] + [(f"controls.{one.name}", one.name) for one in task.controls]
    return [(key, settings) for key, name in named for settings in resolved.at_every_point(name)]


def _steps(resolved: ResolvedTask) -> list[int]:
    """The lengths of the runs of the arms."""
    return [settings["schedule"]["steps"] for arm in arm_names(resolved.task) for settings in resolved.at_every_point(arm)]


def _algorithm(task: Task, key: str, settings: dict) -> list[TaskError]:
    """The row that the loop will run, with its overrides put in: what algorithms.resolve says against it."""
    section = settings["algorithm"]
    overrides = {name: value for name, value in section.items() if name not in NOT_OF_THE_ROW}
    try:
        resolve_algorithm(section["name"], file=str(task.file), **overrides)
    except TaskError as error:
        base = task.algorithm is not None and read_path({"algorithm": task.settings["algorithm"]}, error.key, None)
        where = error.key if base == error.found else f"{key}.{error.key}"
        return [TaskError(task.file, where, error.found, error.allowed, error.hint)]
    return []


def _learning_rate(task: Task, key: str, settings: dict) -> list[TaskError]:
    """A schedule has the keys of its kind, all of them and no other."""
    schedule = settings["train"]["optimizer"].get("lr_schedule")
    if not schedule:
        return []
    errors, kind = [], schedule["kind"]
    for name in (name for names in SCHEDULES.values() for name in names):
        found, where = schedule.get(name), f"train.optimizer.lr_schedule.{name}"
        where = where if read_path(task.settings, where, None) == found else f"{key}.{where}"
        if name in SCHEDULES[kind] and found is None:
            errors.append(TaskError(task.file, where, "nothing", f"a value (kind {kind} needs it)"))
        elif name not in SCHEDULES[kind] and found is not None:
            allowed = "nothing: it has " + (", ".join(SCHEDULES[kind]) or "no further key")
            errors.append(TaskError(task.file, where, found, f"with kind {kind} {allowed}"))
    return errors


def _batch(task: Task, key: str, settings: dict) -> list[TaskError]:
    schedule = settings["schedule"]
    if schedule["minibatch_of"] == "responses":
        num = schedule["prompts_per_step"] * settings["rollout"]["samples_per_prompt"]
        allowed = f"at most the {num} responses of a step"
        return [TaskError(task.file, "schedule.minibatches", schedule["minibatches"], allowed)] if schedule["minibatches"] > num else []
    if schedule["minibatches"] > schedule["prompts_per_step"]:
        allowed = f"at most schedule.prompts_per_step, {schedule['prompts_per_step']}: a mini-batch has whole groups"
        return [TaskError(task.file, "schedule.minibatches", schedule["minibatches"], allowed)]
    return []


def _held_out(task: Task, key: str, settings: dict) -> list[TaskError]:
    """Evaluation needs problems and a cadence, and has only generated ones."""
    held_out, every = settings["data"].get("held_out"), settings["schedule"].get("eval_every")
    if bool(held_out) != bool(every):
        named, missing = ("data.held_out", "schedule.eval_every") if held_out else ("schedule.eval_every", "data.held_out")
        return [TaskError(task.file, missing, "nothing", f"a value ({named} is set)")]
    if held_out and settings["data"].get("template") != "desk":
        return [TaskError(task.file, "data.held_out", held_out, "nothing, unless data.template is desk")]
    return []


def _dynamic_sampling(task: Task, key: str, settings: dict) -> list[TaskError]:
    """A group of one response never disagrees."""
    samples = settings["rollout"]["samples_per_prompt"]
    if settings["schedule"].get("dynamic_sampling") and samples < 2:
        return [TaskError(task.file, "rollout.samples_per_prompt", samples, "at least 2 with schedule.dynamic_sampling")]
    return []


def _series_of_settings(task: Task, cells: list[tuple[str, dict]]) -> list[TaskError]:
    """Claims and controls about a series that an arm of theirs does not have."""
    asked = [(f"grade.{name}", grade) for name, grade in task.grade.items()]
    asked += [(f"controls.{control.name}", control) for control in task.controls]
    settings_of = {key.partition(".")[2]: settings for key, settings in cells}
    errors = []
    for key, one in asked:
        path = SERIES_OF.get(one.estimand)
        lacking = [name for name in one.contrast.names if path and name in settings_of and read_path(settings_of[name], path, None) is None]
        if lacking:
            errors.append(TaskError(task.file, f"{key}.estimand", one.estimand, f"only of arms with {path}, which {lacking[0]} has not"))
    return errors


def _coarse(task: Task, key: str, settings: dict) -> list[TaskError]:
    """Merged adapters are formed anew at every sync: what would be rounded is not what the proof of the sync rounds."""
    if settings["precision"]["rollout"] in COARSE_FORMATS and settings["train"].get("lora"):
        allowed = f"{', '.join(DTYPES)} with train.lora"
        return [TaskError(task.file, f"{key}.precision.rollout", settings["precision"]["rollout"], allowed)]
    return []


def _perturbation(task: Task, key: str, settings: dict) -> list[TaskError]:
    """A perturbation says its format iff it has one, and its weight can reach the loss."""
    perturb = settings["algorithm"].get("perturb")
    if not perturb:
        return []
    row, where = PERTURBATIONS[perturb["name"]], f"{key}.algorithm.perturb"
    if row.needs_format != bool(perturb["format"]):
        allowed = f"one of {', '.join(COARSE_FORMATS)}" if row.needs_format else f"nothing: {row.name} rounds nothing"
        return [TaskError(task.file, f"{where}.format", perturb["format"] or "nothing", allowed)]
    algorithm = ALGORITHMS.get(settings["algorithm"]["name"])
    if row.weighs_tokens and algorithm and (algorithm.weight, algorithm.correction_level) != ("old/rollout", "token"):
        allowed = "an algorithm that weighs tokens by old/rollout, such as GRPO-Token-TIS with cap 1.0e+9"
        return [TaskError(task.file, f"{where}.name", f"{row.name} with {algorithm.name}", allowed)]
    return []


def _reduction(task: Task, key: str, settings: dict) -> list[TaskError]:
    """Gradients come in the trainer's dtype; they are summed in it or in fp32."""
    asked, own = settings["precision"]["gradient_reduction"], settings["precision"]["train"]
    if asked in (None, "fp32", own):
        return []
    return [TaskError(task.file, f"{key}.precision.gradient_reduction", asked, f"fp32 or {own}, the trainer's own dtype")]


def _grade(task: Task, key: str, grade: Grade, steps: int) -> list[TaskError]:
    errors, horizon = [], min(grade.until or steps, steps)
    if grade.until is not None and grade.until > steps:
        errors.append(TaskError(task.file, f"{key}.until", grade.until, f"at most schedule.steps, {steps}"))
    if grade.reducer == "epoch_mean" and grade.window is None:
        errors.append(TaskError(task.file, f"{key}.window", "nothing", "the iterations of one full pass"))
    needed = (grade.window or 1) * (2 if grade.reducer == "log_ratio" else 1)
    if needed > horizon:
        errors.append(TaskError(task.file, f"{key}.window", grade.window, f"a window that fits into {horizon} steps"))
    if grade.event is not None and grade.event.window + grade.event.hold > horizon:
        found = f"window {grade.event.window} + hold {grade.event.hold}"
        errors.append(TaskError(task.file, f"{key}.event", found, f"at most the {horizon} steps in which it can show"))
    if grade.reducer == "time_to_event" and (grade.event is None) == (grade.level is None):
        found = "neither" if grade.event is None else "both"
        allowed = "with time_to_event exactly one of event and level"
        errors.append(TaskError(task.file, f"{key}.reducer", found, allowed))
    if grade.level is not None and grade.reducer != "time_to_event":
        errors.append(TaskError(task.file, f"{key}.level", grade.level, "only with reducer time_to_event"))
    return errors
