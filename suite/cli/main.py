"""The command line. Arguments are parsed before anything heavy is imported: `suite --help` needs argparse and nothing
else.

Exit codes: 0 PASS or success, 1 FAIL (or a difference found), 2 bad usage or task file, 10 INCONCLUSIVE, 11 ERROR, 12
NOT_RUN, 13 INVALID, 14 nothing selected or recorded yet, 130 interrupted (143 by SIGTERM, 129 by SIGHUP), 141 nobody
reads the output. The last line of
`reproduce` is the VERDICT line, except on exit 2. What each verb does is in verbs.py.
"""

import argparse
import contextlib
import errno
import os
import signal
import sys
import traceback
from pathlib import Path

from suite import signals
from suite.errors import EXIT_BROKEN_PIPE, EXIT_ERROR, EXIT_NOT_RUN, EXIT_USAGE, NotRunnable, UserError, WorkersFailed

WORKER_CODES = {EXIT_USAGE: (EXIT_USAGE, None), EXIT_NOT_RUN: (EXIT_NOT_RUN, "NOT_RUN")}  # others are errors
# What a full disk, a read-only folder and a missing right look like.
_WRITE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.EEXIST,
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit code. Only here are errors turned into messages; a bug keeps its traceback and
    exits 11.
    """
    _fill_closed_streams()
    args = build_parser().parse_args(argv)
    with signals.listening():
        try:
            code = _call(args)
            sys.stdout.flush()  # here, where a reader that has gone is told from an error
            return code
        except BaseException as problem:
            return _ended_by(args, problem)


def _fill_closed_streams() -> None:
    """Where a caller closed a standard stream, the next file would be opened in its place and get what is printed."""
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(free)
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))


def _ended_by(args: argparse.Namespace, problem: BaseException) -> int:
    """Say what ended the verb, and give its exit code."""
    number = signals.heard() or (signal.SIGINT if isinstance(problem, KeyboardInterrupt) else None)
    if number is not None:  # whatever a library made of it
        _say(f"suite {args.verb}: interrupted; the same command, without --fresh, goes on from here")
        return _end(args, 128 + number, "ERROR")
    left = isinstance(problem, SystemExit) and isinstance(problem.__context__, BrokenPipeError)  # so rich puts it
    if left or isinstance(problem, BrokenPipeError):
        _print_nowhere()  # a reader such as `head` has gone
        return EXIT_BROKEN_PIPE
    if isinstance(problem, UserError):
        _say(f"suite {args.verb}: {problem}")
        return _end(args, EXIT_USAGE)
    if isinstance(problem, NotRunnable):
        _say(f"suite {args.verb}: NOT_RUN: {problem}")
        return _end(args, EXIT_NOT_RUN, "NOT_RUN")
    if isinstance(problem, WorkersFailed):
        _say(f"suite {args.verb}: {problem}")
        return _end(args, *WORKER_CODES.get(problem.code, (EXIT_ERROR, "ERROR")))
    if not isinstance(problem, Exception):
        raise problem
    if words := _of_a_disk(problem):
        _say(f"suite {args.verb}: {words}")
    else:
        traceback.print_exception(problem)
    return _end(args, EXIT_ERROR, "ERROR")


def _print_nowhere() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _output_is_broken() -> bool:
    """Whether what was printed cannot be written, as on a full disk."""
    try:
        print(flush=True)  # what could not be written before is gone by now, so a flush alone may succeed
    except OSError:
        _print_nowhere()
        return True
    return False


def _of_a_disk(problem: Exception) -> str | None:
    """What to say of a disk that is full or read-only, a missing right, or a folder that went away; None of other errors,
    whose traceback is wanted."""
    if not isinstance(problem, OSError):
        return None
    if problem.filename is None and _output_is_broken():
        return f"cannot write to the standard output: {problem.strerror or problem}"
    notes = "".join(f"; {note}" for note in getattr(problem, "__notes__", ()))
    if problem.errno == errno.ENOENT and problem.filename and not Path(problem.filename).parent.exists():
        return f"cannot use {problem.filename}: its folder has gone{notes}"
    if problem.errno not in _WRITE_ERRORS:
        return None
    if problem.filename is None:
        traceback.print_exception(problem)  # where, since nothing says what
        return f"cannot use a file: {problem.strerror}; {_scratch_folders()}; what was recorded before is intact{notes}"
    return f"cannot use {problem.filename}: {problem.strerror}; what was recorded before is intact{notes}"


def _scratch_folders() -> str:
    """The places that libraries write to without saying so, with the room they have left."""
    import tempfile

    found = []
    for folder in ("/dev/shm", tempfile.gettempdir()):
        try:
            about = os.statvfs(folder)
        except OSError as problem:
            found.append(f"{folder}: {problem.strerror}")
            continue
        room = "read-only" if about.f_flag & os.ST_RDONLY else f"{about.f_bavail * about.f_frsize / 2**20:.0f} MiB free"
        found.append(f"{folder}: {room}")
    return ", ".join(found)


def build_parser() -> argparse.ArgumentParser:
    """Every verb and flag of the command line."""
    parser = argparse.ArgumentParser(
        prog="suite", description="Re-run and grade the claims of arXiv 2510.26788 on your own machine."
    )
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    add = _adder(verbs)
    verb = add("list", "what there is")
    verb.add_argument("--tier", choices=("desk", "node", "paper"), help="only this tier")
    verb.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    add("show", "a task resolved, or a claim with the paper's value and our results").add_argument(
        "name", metavar="TASK|CLAIM"
    )
    verb = add("validate", "check task files: every error at once")
    verb.add_argument("names", nargs="*", metavar="TASK|FILE", help="default: all tasks")
    verb = add("lock", "write tasks out in full into tasks/_resolved, which validate checks")
    verb.add_argument("tasks", nargs="*", metavar="TASK", help="default: all tasks, and tasks/schema.json")
    verb = add("doctor", "what this machine can run, and why not")
    verb.add_argument("task", nargs="?", metavar="TASK")
    add("plan", "cells, memory, time, and what the design can decide").add_argument("task", metavar="TASK")

    _run_flags(add("run", "run the missing cells of a task; the same command again resumes"))
    verb = add("watch", "what runs are doing: reward, k3, |pi - mu|, gradient norm and time left, live")
    verb.add_argument("task", nargs="?", metavar="TASK", help="default: the one that began last")
    verb.add_argument("--once", action="store_true", help="show it once; so does an output that is no terminal")
    _records_flag(verb)
    verb = add("export", "the metrics of every run in one table, for a notebook")
    verb.add_argument("task", metavar="TASK")
    verb.add_argument("--format", choices=("csv", "parquet"), default="csv", help="default: %(default)s")
    verb.add_argument("--out", type=Path, metavar="FILE", help="default: TASK.csv or TASK.parquet")
    _records_flag(verb)
    verb = add("grade", "verdict from records; needs no engine")
    verb.add_argument("task", metavar="TASK")
    _records_flag(verb)
    verb.add_argument(
        "--evidence", type=Path, metavar="FILE", nargs="+", action="extend",
        help="grade rollouts that another framework wrote (parquet or JSONL; files, or a folder of them)"
    )
    verb.add_argument("--from", dest="framework", metavar="FRAMEWORK", help="whose own files these are: verl, trl, prime-rl, ...")
    verb.add_argument("--arm", help="with --from: the arm of files in no folder arm=...")
    verb.add_argument("--seed", type=int, help="with --from: the seed of files in no folder seed=...")
    _run_flags(add("reproduce", "doctor, run, grade and a readable summary"))

    _check_flags(add("check", "the mismatch of your own model, or of rollouts you have; exit 1 if a bar of --bar is missed"))
    verb = add("rehearse", "a task for two steps with an embedded model and its problems; never graded")
    verb.add_argument("task", metavar="TASK")

    verb = add("publish", "copy finished runs into results/ and regenerate tables and figures")
    verb.add_argument("task", metavar="TASK")
    _records_flag(verb)
    verb = add("report", "regenerate what is generated in results/")
    verb.add_argument("--check", action="store_true", help="change nothing; exit 1 if anything would change")
    verb = add("verify", "recompute every published verdict")
    verb.add_argument("target", nargs="?", metavar="TASK|BUNDLE")
    verb = add("bundle", "what one would publish, in one file to send; `verify` checks it")
    verb.add_argument("--dry-run", action="store_true", help="show what it would hold and tell, and write nothing")
    verb.add_argument("task", metavar="TASK")
    verb.add_argument("--out", type=Path, metavar="FILE", help="default: TASK.tar.gz")
    _records_flag(verb)
    verb = add("compare", "two runs, or two verdicts, side by side")
    verb.add_argument("a", type=Path, metavar="A", help="a folder with record.json or verdict.json")
    verb.add_argument("b", type=Path, metavar="B")
    verb.add_argument("--fail-on", choices=("worse",), help="exit 1 if verdict B is worse than verdict A beyond its intervals")

    verb = add("bench", "speed and memory beside what people use otherwise; exit 1 if a target is missed")
    verb.add_argument("name", nargs="?", choices=("scoring", "rl", "moe", "all"), default="all")
    verb.add_argument("--sizes", type=_names, metavar="1m,5m", help="desk recipes that `rl` takes")
    verb.add_argument("--vocab", type=_numbers, metavar="64,8192", help="vocabularies that `scoring` takes")
    verb.add_argument("--out", type=Path, metavar="DIR", help="default: results/bench of the checkout")
    verb = add("desk", "make the embedded models from their recipe")
    verb.add_argument("action", choices=("build",))
    verb.add_argument("--size", default="1m", help="which recipe (default: %(default)s)")
    verb.add_argument("--out", type=Path, metavar="DIR", help="write there instead of baselines/desk")
    verb.add_argument(
        "--check", action="store_true", help="re-make the model and compare its behaviour with the shipped one"
    )
    return parser


def _adder(verbs):
    def add(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

    return add


def _records_flag(verb: argparse.ArgumentParser) -> None:
    where = "where run folders are (default: RUNS_DIR or runs)"
    verb.add_argument("--runs", "--runs-dir", dest="runs_dir", type=Path, metavar="DIR", default=_runs_dir(), help=where)


def _run_flags(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("task", metavar="TASK")
    verb.add_argument(
        "--seeds", type=_numbers, metavar="0,1", help="only these of the task's seeds (controls keep theirs)"
    )
    verb.add_argument("--arm", type=_names, metavar="A,B", help="only these arms or controls")
    verb.add_argument("--cell", type=_names, metavar="A,B", help="only these cells, by the names that `plan` shows")
    verb.add_argument(
        "--limit", type=_positive, metavar="N", help="RL steps or prompts per cell; such runs are never graded"
    )
    verb.add_argument(
        "--fresh", action="store_true", help="a new attempt for finished cells; earlier ones stay and are graded too"
    )
    verb.add_argument(
        "--out",
        "--runs-dir",
        dest="runs_dir",
        type=Path,
        metavar="DIR",
        default=_runs_dir(),
        help="where run folders go (default: RUNS_DIR or runs)",
    )
    verb.add_argument(
        "--nproc", type=_positive, metavar="N", default=1,
        help="deal the cells out to N processes, each with its own GPU or its share of the cores",
    )
    verb.add_argument("--log", choices=("tensorboard", "wandb"), help="send the metrics there too, as they come (a package of yours)")
    verb.add_argument(
        "--launcher", metavar="COMMAND", help="start each of the processes with this, such as 'srun -n 1 -G 1'"
    )


def _check_flags(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", nargs="?", metavar="MODEL", help="a folder of a checkpoint, or a hub id")
    verb.add_argument("--precision", type=_names, metavar="A,B", default=["bf16", "fp16"], help="of both engines (default: bf16,fp16)")
    verb.add_argument("--trainer-dtype", metavar="DTYPE", help="of the trainer, where it is not that of the sampler")
    verb.add_argument("--prompts", default="builtin", metavar="FILE", help=".txt, .jsonl or .parquet (default: builtin)")
    verb.add_argument("--samples", type=_positive, metavar="N", default=4, help="responses per prompt (default: %(default)s)")
    verb.add_argument("--max-tokens", type=_positive, metavar="N", default=256, help="per response (default: %(default)s)")
    verb.add_argument("--seeds", type=_numbers, metavar="0,1", default=[0, 1, 2], help="launches (default: 0,1,2)")
    verb.add_argument("--sampler", choices=("vllm", "hf", "auto"), default="auto", help="default: vllm where it is installed")
    verb.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="of the trainer (default: %(default)s)")
    verb.add_argument("--bar", type=_names, metavar="A,B", default=[], help="published bars that must not be missed, such as nemo-rl")
    verb.add_argument("--html", type=Path, metavar="FILE", help="where the page goes (default: beside the task)")
    verb.add_argument("--evidence", type=Path, metavar="FILE", nargs="+", action="extend", help="rollouts that exist, in place of MODEL")
    verb.add_argument("--from", dest="framework", metavar="FRAMEWORK", help="with --evidence: whose own files these are")
    verb.add_argument("--arm", help="with --evidence: the arm of files that do not say")
    verb.add_argument("--seed", type=int, help="with --evidence: the seed of files that do not say")
    verb.add_argument("--out", "--runs-dir", dest="runs_dir", type=Path, metavar="DIR", default=_runs_dir(),
                      help="where run folders go (default: RUNS_DIR or runs)")  # fmt: skip


def _call(args: argparse.Namespace) -> int:
    from suite.cli.verbs import VERBS

    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder no longer exists; change into a checkout and call again") from None
    return VERBS[args.verb](args)


def _end(args: argparse.Namespace, code: int, verdict: str | None = None) -> int:
    """The VERDICT line of a `reproduce` that got no verdict from grading."""
    if args.verb == "reproduce" and verdict is not None:
        from suite.cli.verbs import line_without_grading

        with contextlib.suppress(OSError):
            print(line_without_grading(args.task, verdict), flush=True)
    return code


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # after SIGHUP there is no terminal any more
        print(message, file=sys.stderr, flush=True)


def _version() -> str:
    from suite import __version__

    return f"fp16-mismatch-suite {__version__}"


def _runs_dir() -> Path:
    return Path(os.environ.get("RUNS_DIR") or "runs")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 0,1,2") from None


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    sys.exit(main())
