"""What each verb of the command line does: one function each, from parsed arguments to an exit code.

Anything that needs an engine is imported inside the verb that runs one, so that list, show, validate, plan, grade,
report and verify work on a machine without torch.
"""

import json
import sys
import tempfile
from pathlib import Path

from suite.cli.cells import check_machine, is_first_rank, run_cells, select
from suite.errors import EXIT_NOT_RUN, EXIT_NOTHING, EXIT_USAGE, NotRunnable, TaskError, UserError
from suite.files import write_atomic
from suite.spec.checkout import find_repo, task_files
from suite.spec.json_schema import json_schema
from suite.spec.kinds import kind_of
from suite.spec.lock import regrading_errors, stray_locks, write_lock
from suite.spec.plan import ResolvedTask, resolve_task
from suite.spec.reading import load_readable, load_task
from suite.spec.strict_yaml import TaskErrors
from suite.spec.task import Task
from suite.spec.validate import check_unlocked, require_valid, validate_file


def list_tasks(args) -> int:
    from suite.cli import show as rendering

    tasks, errors = _readable()
    tasks = [one for one in tasks.values() if args.tier in (None, one.task.tier)]
    if args.json:
        print(json.dumps([rendering.summary(one) for one in tasks], indent=1))
    else:
        rendering.print_list(tasks)
    return _with_errors(errors, 0 if tasks else EXIT_NOTHING)


def _readable() -> tuple[dict[str, ResolvedTask], list[TaskError]]:
    """The tasks of the checkout whose cells can be told, and what is wrong with the others."""
    tasks, errors = load_readable()
    resolved = {}
    for name, task in tasks.items():
        try:
            resolved[name] = resolve_task(task)
        except TaskErrors as found:
            errors += found.errors
    return resolved, errors


def _with_errors(errors: list[TaskError], code: int) -> int:
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return EXIT_USAGE if errors else code


def show_one(args) -> int:
    from suite.cli import show as rendering

    if rendering.is_claim(args.name):
        tasks, errors = _readable()
        rendering.print_claim(args.name.split("-")[0].upper(), tasks, find_repo())
        return _with_errors(errors, 0)
    task = load_task(args.name)
    rendering.print_task(resolve_task(task))
    rendering.print_falls(task, find_repo() / "results")
    return 0


def validate(args) -> int:
    names = args.names or [str(path) for path in task_files().values()]
    errors, warnings = [] if args.names else _strays(), []
    for name in names:
        found, remarks = validate_file(name)
        errors += found
        warnings += remarks
    for remark in warnings:
        print(f"warning: {remark}")
    _with_errors(errors, 0)
    print(f"{len(names)} task files: {len(errors)} errors, {len(warnings)} warnings")
    return EXIT_USAGE if errors else 0 if names else EXIT_NOTHING


def _strays() -> list[TaskError]:
    paths = stray_locks(find_repo() / "tasks", set(task_files()))
    return [TaskError(path, "(file)", path.name, "the lock of a task; run: suite lock") for path in paths]


def lock(args) -> int:
    """Write out the named tasks, or all of them and tasks/schema.json; other files in tasks/_resolved go. What is wrong with
    one task holds up no other."""
    files, changed, errors = task_files(), [], []
    if unknown := [name for name in args.tasks if name not in files]:
        raise UserError(f"no task {unknown[0]!r}; there are: {', '.join(files)}")
    for name in args.tasks or files:
        try:
            changed += [f"{name}: written out"] if _write_lock(files[name]) else []
        except TaskErrors as found:
            errors += found.errors
    if not args.tasks:
        changed += _tidy_resolved(find_repo() / "tasks", set(files))
    print("\n".join(changed) or "no lock changed")
    return _with_errors(errors, 0)


def _write_lock(path: Path) -> bool:
    task = load_task(path)
    errors, _ = check_unlocked(task)
    if errors := errors or regrading_errors(task):
        raise TaskErrors(errors)
    return write_lock(task)


def _tidy_resolved(folder: Path, ids: set[str]) -> list[str]:
    """Remove the locks of no task and write schema.json; what was removed, a line each."""
    strays = stray_locks(folder, ids)
    for path in strays:
        path.unlink()
    write_atomic(folder / "schema.json", json_schema(folder).encode())
    return [f"{path.name}: removed, there is no such task" for path in strays]


def doctor(args) -> int:
    from suite.cli import show as rendering
    from suite.machine import environment
    from suite.machine.doctor import can_run, findings

    task = resolve_task(load_task(args.task)) if args.task else None
    machine = environment.collect()
    rendering.print_findings(findings(task, machine), environment.fingerprint(machine))
    reason = can_run(task, machine) if task else None
    if reason:
        raise NotRunnable(reason)
    return 0


def show_plan(args) -> int:
    from suite.cli import show as rendering

    resolved = require_valid(load_task(args.task))
    rendering.print_plan(resolved, _design_power(resolved))
    return 0


def run(args) -> int:
    resolved = require_valid(load_task(args.task))
    task, cells = resolved.task, select(resolved, args.seeds, args.arm, args.cell)
    if not cells:
        print(f"{task.id}: " + (f"{_sources(task)}; it runs nothing itself" if task.needs else "nothing selected"))
        return EXIT_NOTHING
    check_machine(resolved, args)
    run_cells(args, task, cells)
    if is_first_rank():
        print(f"{task.id}: {len(cells)} cells complete below {args.runs_dir / task.id}")
    return 0


def watch(args) -> int:
    from suite.cli.live import watch as follow

    return follow(args.runs_dir, args.task, once=args.once)


def export(args) -> int:
    from suite.record.run import find_runs
    from suite.report.exporting import metric_rows, write_export

    task = load_task(args.task)
    rows = metric_rows(find_runs(args.runs_dir, task.id))
    if not rows:
        print(_nothing_recorded(task, args.runs_dir))
        return EXIT_NOTHING
    out = args.out or Path(f"{task.id}.{args.format}")
    write_export(rows, args.format, out)
    print(f"{len(rows)} rows, {len(rows[0])} columns: {out}")
    return 0


def grade(args) -> int:
    from suite.cli import show as rendering

    resolved = require_valid(load_task(args.task))
    task = resolved.task
    if not args.framework and (args.arm is not None or args.seed is not None) or args.framework and not args.evidence:
        raise UserError("--from needs --evidence, and --arm and --seed need --from: they say what a framework's files do not")
    if args.evidence:
        from suite.dumps.dump import grade_evidence

        verdict, path = grade_evidence(task, args.evidence, _source(args)), None
    else:
        verdict, path = _grade_records(resolved, args.runs_dir)
    if verdict is None:
        print(_nothing_recorded(task, args.runs_dir))
        return EXIT_NOTHING
    rendering.print_verdict(verdict)
    for note in verdict.get("notes", []):
        print(f"note: {note}")
    return _last_line(verdict, path)


def _source(args):
    from suite.dumps.readers.sources import Source

    return None if args.framework is None else Source(args.framework, args.arm, args.seed)


def reproduce(args) -> int:
    from suite.cli import show as rendering

    resolved = require_valid(load_task(args.task))
    task, cells = resolved.task, select(resolved, args.seeds, args.arm, args.cell)
    rendering.print_heading(task, len(cells))
    check_machine(resolved, args)
    if cells:
        run_cells(args, task, cells)
    if not is_first_rank():
        return 0
    verdict, path = (None, None) if args.limit else _grade_records(resolved, args.runs_dir)
    if verdict is None:
        print("a run with --limit is never graded" if args.limit else _nothing_recorded(task, args.runs_dir))
        print(line_without_grading(task.id, "NOT_RUN"))
        return EXIT_NOT_RUN if args.limit else EXIT_NOTHING
    rendering.print_verdict(verdict)
    return _last_line(verdict, path)


def check(args) -> int:
    from suite.check.verb import check as check_model
    from suite.cli.progress import Progress

    return check_model(args, Progress)


def rehearse(args) -> int:
    from suite.cli import show as rendering
    from suite.cli.progress import Progress
    from suite.machine import environment
    from suite.machine.doctor import can_rehearse
    from suite.protocols.rehearse import rehearsal
    from suite.protocols.run import run_task
    from suite.record.run import find_runs
    from suite.spec.precision import breaches_of

    resolved = require_valid(load_task(args.task))
    task, cells = resolved.task, rehearsal(resolved)
    if reason := can_rehearse(task, cells, environment.collect()):
        raise NotRunnable(reason)
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder, Progress(len(cells)) as progress:
        run_task(task, cells, runs_dir=Path(folder), progress=progress)
        runs = {run.record["cell"]["name"]: run for run in find_runs(Path(folder), task.id)}
    breaches = {
        name: breaches_of(kind_of(task).must_say, run.record["precision_asked"], run.record["precision_executed"])
        for name, run in runs.items()
    }
    rendering.print_rehearsal(task, [runs[cell.name] for cell in cells], breaches)
    return 1 if any(breaches.values()) else 0


def publish(args) -> int:
    from suite.report.verbs import publish as publish_task

    task = require_valid(load_task(args.task)).task
    if task.id not in task_files():
        raise UserError(f"publish: found {args.task!r}, allowed: a task of tasks/, since results/ is checked against them")
    return publish_task(task.id, args.runs_dir, find_repo() / "results")


def report(args) -> int:
    from suite.report.verbs import report as write_report

    return write_report(find_repo() / "results", check=args.check)


def verify(args) -> int:
    from suite.report.verbs import verify as verify_results

    return verify_results(args.target, find_repo() / "results")


def bundle(args) -> int:
    from suite.archive.bundling import bundle_task

    task = require_valid(load_task(args.task)).task
    out = args.out or Path(f"{task.id}.tar.gz")
    held = bundle_task(task, args.runs_dir, None if args.dry_run else out)
    if not held.folders:
        print(_nothing_recorded(task, args.runs_dir))
        return EXIT_NOTHING
    for folder in held.folders:
        inside = [size for name, size in held.files.items() if name.startswith(f"{folder}/")]
        print(f"{folder}: {len(inside)} files, {sum(inside)} bytes")
    print("\n".join(["besides numbers and the task's text it tells:", *(f"  {line}" for line in held.tells)]))
    print("nothing written: --dry-run" if args.dry_run else f"written: {out}; whoever gets it: suite verify {out.name}")
    return 0


def compare(args) -> int:
    from suite.cli import show as rendering
    from suite.report.side_by_side import side_by_side

    rendering.print_sections(side_by_side(args.a, args.b))
    return _worse(args.a, args.b) if args.fail_on == "worse" else 0


def _worse(a: Path, b: Path) -> int:
    from suite.report.worse import what_is_worse

    lines = what_is_worse(a, b)
    print("\n".join(f"worse: {line}" for line in lines) or "nothing is worse in B")
    return 1 if lines else 0


def bench(args) -> int:
    from suite.bench.verbs import BENCHES, run

    for flag, given, name in (("--sizes", args.sizes, "rl"), ("--vocab", args.vocab, "scoring")):
        if given and args.name not in (name, "all"):
            raise UserError(f"bench {args.name}: found {flag}, allowed: with bench {name}")
    names = list(BENCHES) if args.name == "all" else [args.name]
    return run(names, vocabularies=args.vocab, sizes=args.sizes, out=args.out or find_repo() / "results" / "bench")


def desk(args) -> int:
    from suite.desk.build import run as build

    return build(size=args.size, out=args.out, check=args.check)


VERBS = {
    "list": list_tasks,
    "show": show_one,
    "validate": validate,
    "lock": lock,
    "doctor": doctor,
    "plan": show_plan,
    "run": run,
    "grade": grade,
    "reproduce": reproduce,
    "check": check,
    "watch": watch,
    "export": export,
    "rehearse": rehearse,
    "publish": publish,
    "report": report,
    "verify": verify,
    "bundle": bundle,
    "compare": compare,
    "bench": bench,
    "desk": desk,
}


def line_without_grading(task_id: str, verdict: str) -> str:
    """The VERDICT line of a task that has no verdict file: it could not run, or broke off."""
    try:
        task = load_task(task_id)
        name, num_graded = task.id, sum(claim.kind != "report" for claim in task.claims)
    except (TaskErrors, UserError):
        name, num_graded = task_id, 0
    return f"VERDICT task={name} verdict={verdict} claims=0/{num_graded} verdict_file=-"


def _nothing_recorded(task: Task, runs_dir: Path) -> str:
    return f"{task.id}: nothing recorded below {runs_dir}; " + (_sources(task) if task.needs else f"run it with: suite run {task.id}")


def _sources(task: Task) -> str:
    return f"it is graded from the records of {', '.join(task.needs)}"


def _grade_records(resolved: ResolvedTask, runs_dir: Path):
    """(verdict, its file) of the newest fingerprint recorded; every fingerprint gets its own verdict. (None, None)
    without records.
    """
    from suite.grade.verdict import grade_by_fingerprint, with_needed, write_verdict
    from suite.record.run import find_runs

    runs = find_runs(runs_dir, resolved.task.id)
    needed = with_needed(resolved, lambda name: find_runs(runs_dir, name))
    everything = runs or [run for need in needed.values() for run in need.runs]
    if not everything:
        return None, None
    verdicts = grade_by_fingerprint(resolved, runs, needed)
    newest = max(everything, key=lambda run: str(run.record.get("started_utc")))
    for fingerprint, other in verdicts.items():
        if fingerprint != newest.fingerprint:
            print(f"also recorded on {fingerprint}: {other['verdict']}; shown below is {newest.fingerprint}")
    verdict = verdicts[newest.fingerprint]
    return verdict, write_verdict(verdict, runs_dir)


def _design_power(resolved: ResolvedTask) -> dict:
    from suite.grade.verdict import design_power

    return design_power(resolved)


def _last_line(verdict: dict, path: Path | None) -> int:
    from suite.grade.verdict import EXIT_CODES, verdict_line

    print(verdict_line(verdict, path or "-"), flush=True)
    return EXIT_CODES[verdict["verdict"]]
