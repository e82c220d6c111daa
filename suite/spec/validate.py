"""What can only be judged across the keys of a task, or against the rest of the checkout. Every error at once;
warnings beside them.

An error makes the task unusable. A warning says what a verdict of this task cannot be: too few seeds, an input nobody
pinned yet, a tolerance that is only judgement. No torch.
"""

import math
import re
from collections import Counter
from pathlib import Path

from suite.errors import TaskError
from suite.spec.checkout import task_path
from suite.spec.claims import Form, as_written, written_key
from suite.spec.kinds import kind_of
from suite.spec.lock import lock_errors
from suite.spec.plan import ResolvedTask, arm_names, one_factor_errors, read_path, resolve_task, tasks_beside
from suite.spec.precision import CACHE_FORMATS, COARSE_FORMATS, DTYPES, FORMATS, ROUNDED_WHERE
from suite.spec.reading import read_task
from suite.spec.settings import SECTIONS
from suite.spec.strict_yaml import TaskErrors
from suite.spec.task import Claim, Contrast, Control, Grade, Task, axis_label
from suite.spec.validate_controls import guard_errors, unguarded
from suite.spec.validate_paper import paper_errors
from suite.spec.validate_rl import compare_errors, rl_errors
from suite.spec.validate_trainer import trainer_errors

# The contrast that each kind of claim speaks about.
FORMS = {
    "ratio": ("ratio",),
    "threshold": ("arm", "ratio", "difference"),
    "event": ("arm", "difference"),
    "ordering": ("order",),
    "equivalence": ("difference", "ratio", "order"),
    "count": ("arm",),
    "report": ("arm", "ratio", "difference", "order"),
}
MAX_CELL_NAME = 200
ARM_NAME = re.compile(rf"^({'|'.join(DTYPES)})(?:-({'|'.join(FORMATS)}))?(?:-[A-Za-z0-9_-]+)?$")


def validate_file(path_or_id: str | Path) -> tuple[list[TaskError], list[str]]:
    """(errors, warnings) of one task file: what `load_task` finds, and everything below."""
    task, errors, left_out = read_task(task_path(path_or_id))
    if task is None:
        return errors, []
    more, warnings = check(task)
    if left_out:  # an error about a key that was taken out would only echo the first one
        more = [error for error in more if not _echoes(error.key, left_out)]
    return errors + more, warnings


def check(task: Task | ResolvedTask) -> tuple[list[TaskError], list[str]]:
    """(errors, warnings) of a task that is well-formed by itself, its lock included."""
    resolved, errors, warnings = _checked(task)
    return errors or lock_errors(resolved.task), warnings


def check_unlocked(task: Task | ResolvedTask) -> tuple[list[TaskError], list[str]]:
    """(errors, warnings) of a task whatever its lock says."""
    _, errors, warnings = _checked(task)
    return errors, warnings


def require_valid(task: Task | ResolvedTask) -> ResolvedTask:
    """The task resolved, or TaskErrors: what every verb that runs or grades calls first."""
    resolved, errors, _ = _checked(task)
    if errors := errors or lock_errors(resolved.task):
        raise TaskErrors(errors)
    return resolved


def _checked(task: Task | ResolvedTask) -> tuple[ResolvedTask | None, list[TaskError], list[str]]:
    """(the task resolved, or None with errors where it does not resolve; errors but those of its lock; warnings)."""
    resolved, errors = None, []
    try:
        resolved = resolve_task(task)
        task, needed = resolved.task, list(resolved.needed.values())
    except TaskErrors as found:
        errors, needed = found.errors, []
    if resolved is not None:
        errors = _cell_errors(resolved)
    if resolved is not None and not errors:
        errors += one_factor_errors(resolved) + _arm_precision_errors(resolved) + rl_errors(resolved)
    known = [f"{need.task.id}-{arm}" for need in needed for arm in need.task.arms] if kind_of(task).compares else _own_names(task)
    if kind_of(task).compares:
        errors += compare_errors(task, needed)
    errors += _name_errors(task) + _claim_errors(task, known) + _control_errors(task, known) + _needs_errors(task, resolved)
    errors += [] if errors else guard_errors(task)  # of a task that says what it means
    return resolved, [as_written(error, _form(task)) for error in errors], _warnings(task, resolved, needed)


def _form(task: Task) -> Form | None:
    return task.source.form if task.source else None


def allowed_estimands(task: Task) -> dict[str, tuple[float, float]]:
    """Estimand names that this task's protocol can give, each with the range its level can take."""
    return {name: estimand.range for name, estimand in kind_of(task).estimands.items()}


def contrast_range(level: tuple[float, float], contrast: Contrast, reducer: str = "mean") -> tuple[float, float]:
    """What a contrast of an estimand with this range of levels can come to."""
    low, high = level
    if reducer == "log_ratio":
        return (-math.inf, math.inf)
    if reducer == "fraction_of_seeds":
        return (0.0, 1.0)
    if reducer == "time_to_event":
        return (0.0, math.inf)
    if contrast.form == "ratio":
        return (0.0, math.inf) if low >= 0 else (-math.inf, math.inf)
    return (low - high, high - low) if contrast.form in ("difference", "order") else (low, high)


def _echoes(key: str, left_out: list[str]) -> bool:
    related = (key == gone or key.startswith(gone + ".") or gone.startswith(key + ".") for gone in left_out)
    return any(related) or any(
        key.endswith("." + gone) for gone in left_out
    )  # a section's key, seen again in every arm


def _cell_errors(resolved: ResolvedTask) -> list[TaskError]:
    """Names that a folder cannot have or that come twice, and settings that no engine would keep; said once per key."""
    task, cells, errors = resolved.task, resolved.cells, {}
    names = [cell.name for cell in cells]
    for name, cell in zip(names, cells, strict=True):
        if len(name) > MAX_CELL_NAME:
            found = f"{name[:60]}... of {len(name)} letters"
            allowed = f"arm, grid values and seed of at most {MAX_CELL_NAME} letters together: it is a folder's name"
            errors["grid"] = TaskError(task.file, "grid" if cell.point else f"arms.{cell.arm}", found, allowed)
    for name, num in Counter(names).items():
        if num > 1:
            errors[name] = TaskError(task.file, "seeds/grid", f"cell {name} more than once", "each cell once")
    errors |= _sampling_errors(task, cells) | trainer_errors(task, cells) | _grader_errors(task, cells) | _rounding_errors(task, cells)
    errors |= _cache_errors(task, cells) | _answer_errors(task, cells)
    return list(errors.values())


def _sampling_errors(task: Task, cells: list) -> dict[str, TaskError]:
    """The mismatch compares two distributions over the whole vocabulary, at temperature 1: the samplers teacher-force at
    no other, and a trainer does not know what top-p and top-k cut off."""
    if not kind_of(task).has_trainer:
        return {}
    found = {}
    for cell in cells:
        for name, neutral in (("temperature", (1.0,)), ("top_p", (1.0,)), ("top_k", (None, 0, -1))):
            value, key = cell.get(f"rollout.{name}", None), f"rollout.{name}"
            if value not in neutral:
                allowed = f"{neutral[0] or 0} in protocol {task.protocol}, which compares whole distributions"
                found[key] = TaskError(task.file, key, value, allowed)
    return found


def _rounding_errors(task: Task, cells: list) -> dict[str, TaskError]:
    """A coarse format says where it acts; a dtype acts everywhere."""
    found, key = {}, "precision.rollout_rounded"
    for cell in cells:
        format, rounded = cell.get("precision.rollout", None), cell.get(key, None)
        if format in COARSE_FORMATS and rounded is None:
            allowed = f"{' or '.join(ROUNDED_WHERE)} (precision.rollout is {format})"
            found[key] = TaskError(task.file, f"{cell.arm}: {key}", "nothing", allowed)
        elif format not in COARSE_FORMATS and rounded is not None:
            allowed = f"nothing, unless precision.rollout is one of {COARSE_FORMATS[0]} to {COARSE_FORMATS[-1]}"
            found[key] = TaskError(task.file, f"{cell.arm}: {key}", rounded, allowed)
    return found


def _cache_errors(task: Task, cells: list) -> dict[str, TaskError]:
    """Of the two samplers vLLM alone keeps keys and values in 8 bits."""
    found, key = {}, "precision.kv_cache"
    for cell in cells:
        value, engine = cell.get(key, None), cell.get("rollout.engine", None)
        if value in CACHE_FORMATS and engine != "vllm":
            allowed = f"nothing with rollout.engine {engine}; {', '.join(CACHE_FORMATS)} with vllm"
            found[key] = TaskError(task.file, f"{cell.arm}: {key}", value, allowed)
    return found


def _grader_errors(task: Task, cells: list) -> dict[str, TaskError]:
    """Desk problems have one check, an integer; a grader beside it would be ignored."""
    found = [cell.get("data.grader", None) for cell in cells if cell.get("data.template", None) == "desk"]
    allowed = "nothing with data.template desk, whose answers are integers compared as such"
    return {"data.grader": TaskError(task.file, "data.grader", one, allowed) for one in found if one is not None}  # noqa: B035  one entry


def _answer_errors(task: Task, cells: list) -> dict[str, TaskError]:
    """Prompts of template `tokens` have no answers: no reward can be taken."""
    found = [cell for cell in cells if cell.get("data.template", None) == "tokens"]
    if not found or kind_of(task).trainer == "scores":
        return {}
    return {"data.template": TaskError(task.file, "data.template", "tokens", f"another one: its prompts have no answers, which {task.protocol} needs")}


def _name_errors(task: Task) -> list[TaskError]:
    errors = []
    for arm in task.arms:
        if not ARM_NAME.match(arm) and kind_of(task).has_arms:
            allowed = "a name that begins with fp32, bf16, fp16 or a train-rollout pair such as bf16-fp32 or fp32-m3"
            errors.append(TaskError(task.file, f"arms.{arm}", arm, allowed))
    if not task.arms and kind_of(task).has_arms:
        errors.append(TaskError(task.file, "arms", "nothing", "at least one arm"))
    for path in task.vary:
        if path.split(".")[0] not in SECTIONS:
            errors.append(TaskError(task.file, "vary", path, f"dotted paths that begin with {', '.join(SECTIONS)}"))
    known = kind_of(task).estimands
    for name in task.metrics:
        if name not in known:
            errors.append(TaskError(task.file, "metrics", name, ", ".join(sorted(known))))
    return errors


def _arm_precision_errors(resolved: ResolvedTask) -> list[TaskError]:
    """`bf16` means both sides in bf16; `bf16-fp32` means train in bf16, rollout in fp32. A name that says otherwise
    misleads.
    """
    task, errors = resolved.task, []
    for arm in task.arms:
        match = ARM_NAME.match(arm)
        if match is None:
            continue
        train, rollout = match.group(1), match.group(2) or match.group(1)
        settings = resolved.at_every_point(arm)[0]
        for path, expected in (("precision.train", train), ("precision.rollout", rollout)):
            found = read_path(settings, path, None)
            if found is not None and found != expected:
                errors.append(TaskError(task.file, f"arms.{arm}.{path}", found, f"{expected} (the arm's name says so)"))
    return errors


def _claim_errors(task: Task, known: list[str]) -> list[TaskError]:
    errors, ids = [], [claim.id for claim in task.claims]
    for claim_id in sorted({name for name in ids if ids.count(name) > 1}):
        errors.append(TaskError(task.file, "claims", f"{claim_id} twice", "each claim id once"))
    for name in sorted(set(task.grade) - set(ids)):
        errors.append(TaskError(task.file, f"grade.{name}", name, f"one of the claims: {', '.join(ids)}"))
    for claim in task.claims:
        if claim.paper is not None:
            errors += paper_errors(task, claim)
        grade = task.grade.get(claim.id)
        if grade is not None:
            errors += _grade_errors(task, claim, grade, known)
        elif claim.kind != "report":
            errors.append(
                TaskError(task.file, f"grade.{claim.id}", "nothing", f"a grade (kind {claim.kind} is graded)")
            )
    return errors


def _grade_errors(task: Task, claim: Claim, grade: Grade, known: list[str]) -> list[TaskError]:
    key = f"grade.{claim.id}"
    errors = _contrast_errors(task, key, grade.contrast, known) + _point_errors(task, key, grade.at, whole=True)
    errors += _estimand_errors(task, key, grade.estimand)
    if grade.contrast.form not in FORMS[claim.kind]:
        allowed = f"{' or '.join(FORMS[claim.kind])} (kind {claim.kind})"
        errors.append(TaskError(task.file, f"{key}.contrast", grade.contrast.form, allowed))
    if claim.kind == "report":
        return errors
    needed = (
        ["interval", "tolerance"]
        + (["event"] if claim.kind == "event" else [])
        + (["accept"] if claim.kind != "ordering" else [])
    )
    for name in needed:
        if getattr(grade, name) is None:
            errors.append(TaskError(task.file, f"{key}.{name}", "nothing", f"a value (kind {claim.kind} is graded)"))
    if claim.kind == "ordering" and grade.contrast.margin is None:
        errors.append(TaskError(task.file, f"{key}.contrast.margin", "nothing", "a share, such as 0.10"))
    return errors + _accept_errors(task, key, grade.estimand, grade.contrast, grade.accept, grade.reducer)


def _contrast_errors(task: Task, key: str, contrast: Contrast, known: list[str]) -> list[TaskError]:
    """`known`: arms and controls, or of a compare task `<task>-<arm>` of the tasks in `needs`; a missing one of those is
    reported by itself."""
    forms = [form for form in ("arm", "ratio", "difference", "order") if getattr(contrast, form) is not None]
    if len(forms) != 1:
        found = ", ".join(forms) or "nothing"
        return [TaskError(task.file, f"{key}.contrast", found, "exactly one of arm, ratio, difference, order")]
    return [
        TaskError(task.file, f"{key}.contrast.{forms[0]}", name, f"an arm or control: {', '.join(known)}")
        for name in contrast.names
        if name not in known
    ]


def _own_names(task: Task) -> list[str]:
    return [*arm_names(task), *(control.name for control in task.controls)]


def _point_errors(task: Task, key: str, at: dict, whole: bool) -> list[TaskError]:
    """`at` must name grid values that exist; for a grade, one on each axis that has several."""
    errors = []
    for axis, value in at.items():
        if axis not in task.grid:
            errors.append(
                TaskError(
                    task.file, f"{key}.at.{axis}", axis, f"an axis of the grid: {', '.join(task.grid) or '(none)'}"
                )
            )
        elif value not in task.grid[axis]:
            labels = ", ".join(axis_label(point) for point in task.grid[axis])
            errors.append(TaskError(task.file, f"{key}.at.{axis}", value, f"a value of the grid: {labels}"))
    for axis, values in task.grid.items() if whole else ():
        if axis not in at and len(values) > 1:
            labels = ", ".join(axis_label(point) for point in values)
            errors.append(TaskError(task.file, f"{key}.at.{axis}", "nothing", f"one of: {labels}"))
    return errors


def _estimand_errors(task: Task, key: str, name: str) -> list[TaskError]:
    allowed = allowed_estimands(task)
    return [] if name in allowed else [TaskError(task.file, f"{key}.estimand", name, ", ".join(sorted(allowed)))]


def _accept_errors(task: Task, key: str, estimand: str, contrast: Contrast, accept, reducer: str) -> list[TaskError]:
    levels = allowed_estimands(task)
    if accept is None or estimand not in levels:
        return []
    low, high = (-math.inf if accept[0] is None else accept[0]), (math.inf if accept[1] is None else accept[1])
    shown, (range_low, range_high) = list(accept), contrast_range(levels[estimand], contrast, reducer)
    where = f"the {contrast.form} of {estimand} ranges over [{range_low:g}, {range_high:g}]"
    if low > high:
        return [TaskError(task.file, f"{key}.accept", shown, "[low, high] with low <= high")]
    if low <= range_low and high >= range_high:
        return [TaskError(task.file, f"{key}.accept", shown, "a region that some outcome can miss", where)]
    if high < range_low or low > range_high:
        return [TaskError(task.file, f"{key}.accept", shown, "a region that some outcome can meet", where)]
    return []


def _control_errors(task: Task, known: list[str]) -> list[TaskError]:
    errors, names = [], [control.name for control in task.controls]
    for control in task.controls:
        key = f"controls.{control.name}"
        if not control.name.startswith("control-"):
            errors.append(TaskError(task.file, f"{key}.name", control.name, "a name that begins with control-"))
        if names.count(control.name) > 1:
            errors.append(TaskError(task.file, f"{key}.name", f"{control.name} twice", "each control once"))
        if control.like not in task.arms:
            errors.append(TaskError(task.file, f"{key}.like", control.like, f"an arm: {', '.join(task.arms)}"))
        else:
            errors += _aa_errors(task, control, key)
        errors += _point_errors(task, key, control.at, whole=False)
        for check in control.checks:
            key = f"controls.{check.name}"
            errors += _contrast_errors(task, key, check.contrast, known) + _estimand_errors(task, key, check.estimand)
            reducer = "log_ratio" if check.kind == "null_drift" and kind_of(task).trains else check.reducer
            errors += _accept_errors(task, key, check.estimand, check.contrast, check.accept, reducer)
    return errors


def _aa_errors(task: Task, control: Control, key: str) -> list[TaskError]:
    """An A/A control is its arm again: same settings, and no seed in common, or it would compare a run with itself."""
    if control.kind != "aa":
        return []
    errors = []
    if control.set:
        errors.append(
            TaskError(task.file, f"{key}.set", sorted(control.set), "nothing: an A/A control differs in seeds only")
        )
    if shared := sorted(set(control.seeds) & set(task.seeds)):
        errors.append(TaskError(task.file, f"{key}.seeds", shared, "seeds that the arms do not use"))
    return errors


def _needs_errors(task: Task, resolved: ResolvedTask | None) -> list[TaskError]:
    if not task.needs and not kind_of(task).compares:
        return []
    there = tasks_beside(task)
    errors = [
        TaskError(task.file, "needs", name, f"a task: {', '.join(there)}") for name in task.needs if name not in there
    ]
    if kind_of(task).compares and not task.needs:
        errors.append(TaskError(task.file, "needs", "nothing", "the tasks whose records it compares"))
    lost = [name for name in task.needs if name in there and resolved is not None and name not in resolved.needed]
    return errors + [TaskError(task.file, "needs", name, "a task without errors", f"suite validate {name}") for name in lost]


def unpinned_inputs(task: Task | ResolvedTask) -> list[str]:
    """Dotted paths of revisions and hashes that are still written `unknown`: they cap every verdict of the task."""
    return sorted({path for settings in resolve_task(task).settings.values() for path in _unknown(settings)})


def _unknown(value, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [inner for name, part in value.items() for inner in _unknown(part, f"{path}.{name}" if path else name)]
    if isinstance(value, list):
        return [inner for part in value for inner in _unknown(part, path)]
    return [path] if value == "unknown" and path.rsplit(".", 1)[-1] in ("revision", "sha256") else []


def _warnings(task: Task, resolved: ResolvedTask | None, needed: list[ResolvedTask]) -> list[str]:
    unpinned = unpinned_inputs(resolved) if resolved is not None else []
    warnings = [
        f"{task.file}: {path}: unknown; verdicts are capped at INCONCLUSIVE until it is pinned"
        for path in [*unpinned, *(f"{need.task.id}: {path}" for need in needed for path in unpinned_inputs(need))]
    ]
    warnings += [f"{task.file}: {line}" for line in unguarded(task, [need.task for need in needed])]
    for name, grade in task.grade.items():
        key, seeds = f"{task.file}: {written_key(f'grade.{name}', _form(task))}", len(task.seeds)
        exact = grade.interval is not None and grade.interval.method == "exact"  # its interval is the value itself
        if not exact and seeds < grade.min_seeds:
            warnings.append(f"{key}.min_seeds: {grade.min_seeds} asked, {seeds} planned: it cannot reach PASS")
        if not exact and seeds < 2 and grade.accept is not None:
            warnings.append(f"{key}: one seed planned: it cannot reach FAIL")
        if grade.tolerance is not None and grade.tolerance.level == "P5":
            warnings.append(f"{key}.tolerance.level: P5 (judgement); the verdict is capped at INCONCLUSIVE")
    return warnings
