"""The cells that a command names, whether this machine can run them, and the processes that do."""

import os

from suite.errors import NotRunnable, UserError
from suite.spec.kinds import Kind, kind_of
from suite.spec.plan import Cell, ResolvedTask, resolve_task
from suite.spec.task import Task


def select(task: Task | ResolvedTask, seeds: list[int] | None = None, arms: list[str] | None = None,
           names: list[str] | None = None) -> list[Cell]:
    """The planned cells, narrowed to some seeds, arms and names. Controls keep their own seeds and stay unless arms are
    named.

    Raises UserError for a seed, arm or cell that the task does not have: seeds are fixed in the task file, or adding some
    until it passes would be a way to a false pass.
    """
    resolved = resolve_task(task)
    task, cells = resolved.task, resolved.cells
    unknown = sorted(set(seeds or ()) - set(task.seeds))
    if unknown:
        raise UserError(f"--seeds: {task.id} has no seed {unknown[0]}; it has {', '.join(map(str, task.seeds))}")
    for flag, asked, have in (("arm", arms, [cell.arm for cell in cells]), ("cell", names, [cell.name for cell in cells])):
        for name in asked or ():
            if name not in have:
                raise UserError(f"--{flag}: {task.id} has no {flag} {name!r}; it has {', '.join(dict.fromkeys(have))}")
    chosen = [cell for cell in cells if (arms is None or cell.arm in arms) and (names is None or cell.name in names)]
    return [cell for cell in chosen if seeds is None or cell.is_control or cell.seed in seeds]


def check_machine(resolved: ResolvedTask, args) -> None:
    """Raises NotRunnable. A launcher's workers look at the machines that they are put on themselves; one of ours has one GPU
    of those that the task needs, and whoever started it has looked."""
    from suite.machine import environment
    from suite.machine.doctor import can_run
    from suite.machine.processes import WORKER_VARIABLE

    if args.launcher or WORKER_VARIABLE in os.environ:
        return
    reason = can_run(resolved, environment.collect(args.runs_dir))
    if reason:
        raise NotRunnable(reason)


def run_cells(args, task: Task, cells: list[Cell]) -> None:
    from suite.machine import environment
    from suite.machine.processes import WORKER_VARIABLE, take_place

    size = int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        _check_ranks(args, task, size)
    elif WORKER_VARIABLE not in os.environ:
        ranks = _ranks_per_cell(cells)
        if ranks > 1 or args.nproc > 1 or args.launcher:
            if args.log:
                raise UserError(f"--log: found {args.log}, allowed: with one process; `suite export` has the metrics of any run")
            return _deal_cells(args, kind_of(task), cells, ranks)
    take_place(environment.gpu_names)
    from suite.cli.metrics_log import MetricsLog, logger
    from suite.cli.progress import Progress
    from suite.engines.world import join
    from suite.protocols.run import run_task

    send = logger(args.log, task.id, args.runs_dir) if args.log else None
    with Progress(len(cells)) as progress:
        progress = MetricsLog(progress, args.runs_dir / task.id, send) if send and is_first_rank() else progress
        run_task(task, cells, runs_dir=args.runs_dir, limit=args.limit, fresh=args.fresh, progress=progress, world=join())


def _check_ranks(args, task: Task, size: int) -> None:
    """Raises UserError for what ranks that torchrun has started cannot do together."""
    if not kind_of(task).trains:
        raise UserError(f"torchrun: found {size} processes, allowed: 1 with protocol {task.protocol}; --nproc deals out its cells")
    for flag, given in (("--nproc", args.nproc > 1 and args.nproc), ("--launcher", args.launcher)):
        if given:
            raise UserError(f"{flag}: found {given!r}, allowed: nothing in processes that torchrun has started")


def is_first_rank() -> bool:
    """Whether this is the one process that reports, of those that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


def _ranks_per_cell(cells: list[Cell]) -> int:
    """How many processes run each of these cells together."""
    sizes = sorted({cell.get("train.parallel.data", None) or 1 for cell in cells})
    if len(sizes) > 1:
        raise NotRunnable(f"train.parallel.data: found {', '.join(map(str, sizes))} in one task; choose cells with --arm or --cell")
    return sizes[0]


def _deal_cells(args, kind: Kind, cells: list[Cell], ranks: int) -> None:
    """Run the cells in several processes (suite/machine/processes.py), `ranks` of them together."""
    from suite.machine import environment
    from suite.machine.processes import Place, deal, places, run_workers

    num = max(args.nproc, ranks)
    if num % ranks:
        raise UserError(f"--nproc: found {num}, allowed: a multiple of {ranks} (train.parallel.data)")
    blocks = deal(cells, num // ranks, kind)
    if args.launcher:
        where = [Place()] * len(blocks)
    else:
        where = places(num // ranks, environment.gpu_names(), sorted(os.sched_getaffinity(0)), ranks)[: len(blocks)]
    arguments = [args.task, "--out", str(args.runs_dir)]
    arguments += ["--limit", str(args.limit)] if args.limit else []
    arguments += ["--fresh"] if args.fresh else []
    run_workers(blocks, where, arguments, ranks=ranks, launcher=args.launcher)
