"""Which launches count: the task is the law, a record is a claim about it. No torch.

A verdict rests on the planned launches, all of them. Looking after three launches, after four and after five, and
stopping where it fits, passes a truth at the end of a region in 9 % of cases where 5 % are stated; a launch that was
stopped because it looked bad is the same thing. So a PASS and a FAIL both need every planned launch of their arms, and
whatever is missing is named. A record that the task does not plan is not counted, and its row says so.
"""

from __future__ import annotations

from suite.grade.launches import FINISHED, arm_runs, need_of
from suite.spec.defaults import as_it_ran
from suite.spec.kinds import Kind, kind_of
from suite.spec.plan import Cell, ResolvedTask, arm_names, canonical_json, grid_points
from suite.spec.task import axis_label

OPEN = ("running", "killed")  # an attempt that was begun and never ended


def cell_key(arm: str, point, seed: int) -> str:
    return canonical_json([arm, dict(point), seed])


def places(task) -> dict[str, tuple[str, dict, int]]:
    """(arm or control, grid point, seed) of every cell of the task, by `cell_key`; no setting is looked at."""
    points = [dict(point) for point in grid_points(task)]
    found = [(arm, point, seed) for arm in arm_names(task) for point in points for seed in task.seeds]
    for control in task.controls:
        its = [point for point in points if all(point.get(axis) == value for axis, value in control.at.items())]
        found += [(control.name, point, seed) for point in its for seed in control.seeds]
    return {cell_key(*place): place for place in found}


def key_of(run) -> str:
    return cell_key(run.arm, run.point, run.seed)


def split_by_plan(task, runs: list) -> tuple[list, list]:
    """(runs of cells that the task plans, the others)."""
    there = places(task)
    return [run for run in runs if key_of(run) in there], [run for run in runs if key_of(run) not in there]


def missing_launches(task, runs: list, other_tasks: dict, other_runs: dict, grade) -> list[str]:
    """`fp16.s3 (killed)` for every planned launch of the claim's arms that has no finished run, or an attempt that was
    begun and never ended: of several attempts, leaving one out would be choosing.
    """
    found = []
    for name in grade.contrast.names:
        need = need_of(task, name) if kind_of(task).compares else None
        owner, arm = (other_tasks[need], name[len(need) + 1 :]) if need else (task, name)
        there = arm_runs(task, runs, name, grade.at, other_runs)
        for key, (its_arm, point, seed) in places(owner).items():
            if its_arm == arm and all(point.get(axis) == value for axis, value in grade.at.items()):
                missing = _missing([run for run in there if key_of(run) == key])
                found += [f"{need + '-' if need else ''}{_name(arm, point, seed)} ({missing})"] if missing else []
    return list(dict.fromkeys(found))


def _name(arm: str, point: dict, seed: int) -> str:
    return ".".join([arm, *(f"{path.rsplit('.', 1)[-1]}={axis_label(value)}" for path, value in point.items()), f"s{seed}"])


def _missing(attempts: list) -> str:
    """What became of a launch; "" if it is there."""
    stopped = next((run.status for run in attempts if run.status in OPEN), None)
    if stopped is None and any(run.status in FINISHED for run in attempts):
        return ""
    return stopped or (attempts[-1].status if attempts else "not run")


def not_of_the_task(resolved: ResolvedTask, runs: list) -> list[tuple[str, str]]:
    """(arm, sentence) for finished runs of planned cells whose settings, run key or precision are not those that the task
    gives the cell.
    """
    cells, found = {cell_key(cell.arm, cell.point, cell.seed): cell for cell in resolved.cells}, []
    for run in runs:
        if run.status in FINISHED and key_of(run) in cells:
            found += [(run.arm, f"{run.record['cell']['name']}: {line}") for line in _departures(run, cells[key_of(run)])]
    return found


def _departures(run, cell: Cell) -> list[str]:
    recorded, key = run.record["cell"], cell.run_key()
    settings, defaults = recorded["settings"], recorded.get("defaults")
    said = Cell(cell.task_id, cell.task_version, cell.arm, cell.point, cell.seed, settings, cell.is_control, tuple((defaults or {}).items()))
    found = []
    if said.run_key() != key:
        ran, planned = as_it_ran(settings, defaults), as_it_ran(cell.settings, dict(cell.defaults))
        found = [f"{path} is {_at(ran, path)!r}, the task says {_at(planned, path)!r}" for path in _differing(ran, planned)[:3]]
    elif run.record["run_key"] != key:
        found = [f"run_key {run.record['run_key'][:12]}, its settings give {key[:12]}"]
    asked = {name: value for name, value in (run.record.get("precision_asked") or {}).items() if value is not None}
    wanted = {name: value for name, value in (cell.settings.get("precision") or {}).items() if value is not None}
    return found + ([f"precision_asked is {asked}, the arm asks for {wanted}"] if asked != wanted else [])


def _differing(found, wanted, prefix: str = "") -> list[str]:
    """Dotted paths at which two settings differ; a setting that one of them lacks is as good as null."""
    if isinstance(found, dict) or isinstance(wanted, dict):
        found, wanted = found or {}, wanted or {}
        if not (isinstance(found, dict) and isinstance(wanted, dict)):
            return [prefix.rstrip(".")]
        return [path for name in sorted({*found, *wanted}) for path in _differing(found.get(name), wanted.get(name), f"{prefix}{name}.")]
    return [] if found == wanted or prefix.endswith("path.") else [prefix.rstrip(".")]


def _at(settings: dict, path: str):
    for name in path.split("."):
        settings = (settings or {}).get(name)
    return settings


def short_of_plan(task, runs: list) -> list[tuple[str, str]]:
    """(arm, sentence) for finished runs with another number of problems or samples than the task plans."""
    return [(run.arm, f"{run.record['cell']['name']}: {line}") for run in runs if run.status in FINISHED for line in _shortfall(kind_of(task), run)]


def _shortfall(kind: Kind, run) -> list[str]:
    settings = run.record["cell"]["settings"]
    samples = (settings.get("rollout") or {}).get("samples_per_prompt")
    if kind.trains:
        planned = settings["schedule"]["prompts_per_step"] * samples
        bad = next((row for row in run.metrics if row.get("num_rollouts") not in (None, planned)), None)
        return [] if bad is None else [f"{bad['num_rollouts']} rollouts at iteration {bad['step']}, {planned} planned"]
    if run.summary is None or samples is None:
        return []
    num, planned = len(run.summary["prompt_id"]), (settings.get("data") or {}).get("num_prompts")
    uneven = sorted({int(n) for n in run.summary["num_rollouts"]} - {samples})
    found = [f"{num} problems, {planned} planned"] if planned not in (None, num) else []
    return found + ([f"a problem has {uneven[0]} rollouts, {samples} planned"] if uneven else [])


def unpaired(runs: list) -> list[tuple[str, str]]:
    """(arm, sentence) where launches of one seed at one point, which are compared with each other, saw other problems."""
    first, found = {}, []
    for run in runs:
        if run.status not in FINISHED or run.summary is None:
            continue
        data = run.record["cell"]["settings"].get("data")
        place = canonical_json([dict(run.point), run.seed, data, len(run.metrics)])
        other = first.setdefault(place, run)
        mine, theirs = set(map(str, run.summary["prompt_id"])), set(map(str, other.summary["prompt_id"]))
        if mine != theirs:
            odd = sorted(mine ^ theirs)[0]
            line = f"{other.record['cell']['name']} and {run.record['cell']['name']} saw other problems: {len(mine & theirs)} in common, {odd} in one of them only"
            found += [(other.arm, line), (run.arm, line)]
    return found
