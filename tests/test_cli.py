"""The command line: quick help, work without engines, exit codes, and the VERDICT line at the end of `reproduce`."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console
from test_task import GOOD, checkout  # noqa: F401  (a fixture)

from suite.cli import main as cli
from suite.cli import verbs
from suite.errors import DataError, NotRunnable, UserError
from suite.record.run import find_runs
from suite.spec.plan import plan
from suite.spec.reading import load_task

REPO = Path(__file__).resolve().parents[1]
VERDICT = {
    "task": "tiny",
    "task_version": 1,
    "grade_version": 1,
    "tier": "desk",
    "environment": {},
    "verdict": "FAIL",
    "reason": "one claim fails",
    "fingerprint": "cpu-test",
    "controls": [],
    "claims": [
        {
            "id": "C1-k3",
            "kind": "ratio",
            "statement": "It is smaller.",
            "estimand": "k3_nats_per_token",
            "unit": "ratio",
            "paper_source": None,
            "consistent_with_paper": False,
            "verdict": "FAIL",
            "estimate": 2.0,
            "interval": [1.5, 2.5],
            "accept": [16, None],
            "paper_value": 64,
            "num_seeds": 3,
            "reason": "disjoint",
        },
    ],
}


def run_suite(*words: str, prelude: str = "", cwd: Path = REPO) -> subprocess.CompletedProcess:
    """`suite WORDS` in a process of its own."""
    code = f"{prelude}\nimport sys\nfrom suite.cli.main import main\nsys.exit(main({list(words)!r}))"
    environ = {**os.environ, "PYTHONPATH": str(REPO), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environ, capture_output=True, text=True, check=False
    )


def test_help_takes_less_than_half_a_second_of_a_core():
    times = []
    for _ in range(3):  # processor time, the least of three: other processes may hold the core
        start = _seconds_of_children()
        shown = subprocess.run(
            [sys.executable, "-m", "suite", "--help"], cwd=REPO, capture_output=True, text=True, check=True
        )
        times.append(_seconds_of_children() - start)
    assert min(times) < 0.5 and "reproduce" in shown.stdout


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_imports_nothing_heavy():
    heavy = "{'numpy', 'pydantic', 'yaml', 'rich', 'torch'}"
    prelude = f"import atexit, sys; atexit.register(lambda: print('HEAVY', sorted({heavy} & set(sys.modules))))"
    assert run_suite("--help", prelude=prelude).stdout.rstrip().endswith("HEAVY []")


# Imports that a laptop without engines does not have.
NO_ENGINES = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "vllm", "transformers", "datasets"}:
            raise ImportError(f"{name} is not importable here")
sys.meta_path.insert(0, Refuse())
"""


@pytest.mark.parametrize(
    ("words", "codes"),
    [
        (("list",), {0}),
        (("list", "--json"), {0}),
        (("show", "desk-offline-mismatch"), {0}),
        (("show", "C1"), {0}),
        (("validate",), {0}),
        (("plan", "desk-offline-mismatch"), {0}),
        (("grade", "desk-offline-mismatch", "--runs", "no-such-folder"), {14}),
        (("report", "--check"), {0, 1}),
        (("verify",), {0, 1, 14}),
    ],
)
def test_reading_verbs_work_without_engines(words, codes):
    found = run_suite(*words, prelude=NO_ENGINES)
    assert found.returncode in codes, found.stdout[-500:] + found.stderr[-2000:]
    assert "Traceback" not in found.stderr


def test_the_refusing_hook_really_refuses():
    assert "not importable here" in run_suite("list", prelude=NO_ENGINES + "import torch").stderr


def test_list_as_json_is_one_row_per_task(checkout, capsys):  # noqa: F811
    checkout()
    assert cli.main(["list", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["id"], row["tier"], row["claims"], row["num_cells"], row["num_graded"]) == (
        "tiny",
        "desk",
        ["C1"],
        14,
        1,
    )
    assert cli.main(["list", "--tier", "paper", "--json"]) == 14


def test_validate_prints_each_error_on_a_line_and_exits_2(checkout, capsys):  # noqa: F811
    path = checkout(("max_tokens: 64", "max_tokens: 1e-6"), ("metrics: [k3", "metrics: [k9"))
    assert cli.main(["validate", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") and "tiny.yaml" in line for line in lines)


@pytest.mark.parametrize("verb", ["show", "plan", "run", "grade", "reproduce", "publish"])
def test_no_verb_takes_a_bad_task_and_none_shows_a_traceback(checkout, capsys, verb):  # noqa: F811
    checkout(("accept: [16, 128]", "accept: [0, null]"))
    assert cli.main([verb, "tiny"]) == 2
    shown = capsys.readouterr().err
    assert "grade.C1-k3.accept" in shown and "Traceback" not in shown


def test_an_unknown_task_is_answered_with_those_there_are(checkout, capsys):  # noqa: F811
    checkout()
    assert cli.main(["plan", "tini"]) == 2
    assert "there are: tiny" in capsys.readouterr().err


def test_an_unknown_verb_or_flag_is_bad_usage():
    for words in (["bake"], ["run"], ["run", "tiny", "--seeds", "x"], ["run", "tiny", "--limit", "0"], []):
        with pytest.raises(SystemExit) as left:
            cli.main(words)
        assert left.value.code == 2


@pytest.fixture
def machine(checkout, monkeypatch):  # noqa: F811
    """The tiny task on a machine that can run it, where running and grading are replaced; `calls` says in which order
    they came.
    """
    checkout()
    calls = []
    monkeypatch.setattr(verbs, "check_machine", lambda task, runs_dir: calls.append("doctor"))
    monkeypatch.setattr(verbs, "run_cells", lambda args, task, cells: calls.append(f"run {len(cells)}") or 0)
    monkeypatch.setattr(
        verbs,
        "_grade_records",
        lambda task, runs_dir: calls.append("grade") or (VERDICT, Path("runs/tiny/verdict.json")),
    )
    return calls


def test_reproduce_checks_runs_grades_and_ends_with_the_verdict_line(machine, capsys):
    assert cli.main(["reproduce", "tiny"]) == 1  # FAIL
    assert machine == ["doctor", "run 14", "grade"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "VERDICT task=tiny verdict=FAIL claims=0/1 verdict_file=runs/tiny/verdict.json"


def test_a_limited_run_is_never_graded(machine, capsys):
    assert cli.main(["reproduce", "tiny", "--limit", "2"]) == 12
    assert "grade" not in machine
    assert capsys.readouterr().out.splitlines()[-1] == "VERDICT task=tiny verdict=NOT_RUN claims=0/1 verdict_file=-"


def raising(problem):
    def call(*args):
        raise problem

    return call


@pytest.mark.parametrize(
    ("problem", "code", "verdict", "words"),
    [
        (NotRunnable("needs 1 GPU with 40 GiB"), 12, "NOT_RUN", "needs 1 GPU with 40 GiB"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            11,
            "ERROR",
            "cannot use runs/x: No space left on device",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "runs/x"),
            11,
            "ERROR",
            "cannot use runs/x: Read-only file system",
        ),
        (KeyboardInterrupt(), 130, "ERROR", "the same command, without --fresh, goes on from here"),
        (RuntimeError("the engine died"), 11, "ERROR", "Traceback"),
        (UserError("another process is running this cell"), 2, None, "another process"),
        (DataError("x.parquet: sha256 differs"), 2, None, "sha256 differs"),
    ],
)
def test_what_goes_wrong_in_a_run_has_its_exit_code_and_its_words(
    machine, monkeypatch, capsys, problem, code, verdict, words
):
    monkeypatch.setattr(verbs, "run_cells", raising(problem))
    assert cli.main(["reproduce", "tiny"]) == code
    shown = capsys.readouterr()
    assert words in shown.err and ("Traceback" in shown.err) == isinstance(problem, RuntimeError)
    if verdict:
        assert shown.out.splitlines()[-1] == f"VERDICT task=tiny verdict={verdict} claims=0/1 verdict_file=-"


def test_a_task_that_needs_a_gpu_is_not_run_without_one(checkout, monkeypatch, capsys):  # noqa: F811
    from suite.machine import environment

    checkout(("gpus: 0, gpu_mem_gib: 0", "gpus: 1, gpu_mem_gib: 40"), ("cpu_ok: true", "cpu_ok: false"))
    monkeypatch.setattr(environment, "list_gpus", list)
    assert cli.main(["reproduce", "tiny"]) == 12
    shown = capsys.readouterr()
    assert "GPU" in shown.err and "40 GiB" in shown.err and "Traceback" not in shown.err
    assert shown.out.splitlines()[-1] == "VERDICT task=tiny verdict=NOT_RUN claims=0/1 verdict_file=-"


def test_a_runs_folder_that_is_a_file_is_a_clear_error(checkout, monkeypatch, capsys, tmp_path):  # noqa: F811
    from suite.protocols import run as protocols

    checkout()
    (tmp_path / "occupied").write_text("")
    monkeypatch.setattr(verbs, "check_machine", lambda task, runs_dir: None)
    monkeypatch.setattr(protocols, "run_task", lambda *args, runs_dir, **flags: (runs_dir / "x").mkdir(parents=True))
    assert cli.main(["run", "tiny", "--runs-dir", str(tmp_path / "occupied")]) == 11
    assert "cannot use" in capsys.readouterr().err


def test_grade_without_records_says_so(checkout, capsys):  # noqa: F811
    checkout()
    assert cli.main(["grade", "tiny", "--runs", "empty"]) == 14
    assert "nothing recorded below empty" in capsys.readouterr().out


def test_runs_go_where_the_variable_says(monkeypatch):
    assert str(cli.build_parser().parse_args(["run", "t"]).runs_dir) == "runs"
    monkeypatch.setenv("RUNS_DIR", "elsewhere")
    assert str(cli.build_parser().parse_args(["run", "t"]).runs_dir) == "elsewhere"
    assert str(cli.build_parser().parse_args(["run", "t", "--out", "here"]).runs_dir) == "here"


def test_select_narrows_arms_and_seeds_and_keeps_controls(checkout):  # noqa: F811
    task = load_task(checkout())
    assert len(verbs.select(task)) == len(plan(task)) == 14
    assert {(cell.arm, cell.seed) for cell in verbs.select(task, seeds=[1])} == {
        ("bf16", 1),
        ("fp16", 1),
        ("control-aa", 10),
        ("control-aa", 11),
    }
    assert {cell.arm for cell in verbs.select(task, arms=["fp16"])} == {"fp16"}
    with pytest.raises(UserError, match="has no seed 7; it has 0, 1, 2"):
        verbs.select(task, seeds=[0, 7])
    with pytest.raises(UserError, match="no arm 'fp8'"):
        verbs.select(task, arms=["fp8"])


@pytest.mark.parametrize(("words", "named"), [
    (["bench", "rl", "--vocab", "64"], "found --vocab, allowed: with bench scoring"),
    (["bench", "scoring", "--sizes", "1m"], "found --sizes, allowed: with bench rl"),
])  # fmt: skip
def test_a_flag_that_would_be_ignored_is_refused(words, named, capsys):
    assert cli.main(words) == 2
    assert named in capsys.readouterr().err


def test_a_task_outside_the_checkout_cannot_be_published(checkout, capsys, tmp_path):  # noqa: F811
    (tmp_path / "elsewhere").mkdir()
    outside = checkout().rename(tmp_path / "elsewhere" / "tiny.yaml")
    assert cli.main(["publish", str(outside)]) == 2
    assert "allowed: a task of tasks/" in capsys.readouterr().err


def test_show_and_plan_print_what_is_graded(checkout, capsys, monkeypatch):  # noqa: F811
    checkout()
    monkeypatch.setattr(
        verbs, "_design_power", lambda task: {"C1-k3": {"p_pass_if_true": 0.93, "p_fail_if_null": None}}
    )
    assert cli.main(["show", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert "k3_nats_per_token of bf16 / fp16 at num_terms=4-24; accepted in [16, 128], at least 3 seeds" in shown
    assert cli.main(["plan", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert "bf16.num_terms=60-120.s2" in shown and "0.93" in shown and "-" in shown


def test_show_of_a_claim_gives_the_papers_value_and_published_verdicts(checkout, capsys):  # noqa: F811
    checkout()
    folder = Path("results/tiny/cpu-test")
    folder.mkdir(parents=True)
    (folder / "verdict.json").write_text(json.dumps(VERDICT))
    assert cli.main(["show", "c1"]) == 0
    shown = capsys.readouterr().out
    assert "ratio: 64" in shown and "cpu-test" in shown and "[1.5, 2.5]" in shown and "FAIL" in shown
    assert cli.main(["show", "C9"]) == 2


def test_a_line_for_each_step_where_there_is_no_terminal(capsys):
    from suite.cli.progress import Progress

    with Progress(num_cells=2) as progress:
        progress("bf16.s0", 1, 2, note="k3 1e-4")
        progress("bf16.s0", 2, 2)
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[0].startswith("[0/2 cells")
        and lines[0].endswith("bf16.s0 1/2 k3 1e-4")
        and lines[1].startswith("[1/2 cells")
    )


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_run_as_killed_with_one_line_and_its_code_and_the_run_goes_on(tmp_path, how, code):
    words = [sys.executable, str(REPO / "tests" / "growing.py"), "run", "desk-offline-mismatch", "--cell",
             "bf16.num_terms=25-200.s10", "--out", str(tmp_path)]  # fmt: skip
    environ = os.environ | {"PYTHONPATH": str(REPO)}
    with subprocess.Popen(words, cwd=REPO, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        next(line for line in child.stderr if " 3/40" in line)
        child.send_signal(how)
        said = child.stderr.read()
        assert child.wait() == code
    told = [line for line in said.splitlines() if not line.startswith("[")]
    assert told == ["suite run: interrupted; the same command, without --fresh, goes on from here"]
    path = next(tmp_path.rglob("record.json"))
    record = json.loads(path.read_text())
    assert record["status"] == "killed" and record["error"]["message"] == how.name
    assert not (path.parent / "running.lock").exists()
    done = subprocess.run(words, cwd=REPO, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and " 1/40" not in done.stderr
    (run,) = find_runs(tmp_path, "desk-offline-mismatch")
    assert [row["step"] for row in run.metrics] == list(range(40)) and "recovered" not in run.record


def test_an_error_that_a_library_makes_of_a_signal_is_the_signal(machine, monkeypatch, capsys):
    def broken(*_):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("trying to pop from empty mode stack") from None

    monkeypatch.setattr(verbs, "run_cells", broken)
    assert cli.main(["reproduce", "tiny"]) == 130
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err and "goes on from here" in shown.err and "verdict=ERROR" in shown.out


def test_a_run_folder_that_went_away_and_a_nameless_full_place_are_named(machine, monkeypatch, capsys, tmp_path):
    gone = OSError(errno.ENOENT, "No such file or directory", str(tmp_path / "gone" / ".record.json.tmp"))
    gone.add_note("the record does not say so")
    monkeypatch.setattr(verbs, "run_cells", raising(gone))
    assert cli.main(["run", "tiny"]) == 11
    shown = capsys.readouterr().err
    assert f"cannot use {gone.filename}: its folder has gone; the record does not say so" in shown and "Traceback" not in shown
    monkeypatch.setattr(verbs, "run_cells", raising(OSError(errno.ENOSPC, "No space left on device")))
    assert cli.main(["run", "tiny"]) == 11
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "/dev/shm" in shown and tempfile.gettempdir() in shown


@pytest.mark.parametrize("words", [["show", "C1"], ["list"], ["list", "--json"]])
def test_a_reader_that_went_away_is_no_failure(words):
    with subprocess.Popen([sys.executable, "-m", "suite", *words], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        said = child.stderr.read()
        assert child.wait() == 141 and said == b""


CLOSED = """
import os, sys
for stream in map(int, sys.argv[1]):
    os.close(stream)
os.execv(sys.executable, [sys.executable, "-m", "suite", *sys.argv[2:]])
"""


@pytest.mark.parametrize("streams", ["1", "12", "012"])
def test_a_standard_stream_that_is_closed_is_no_failure_and_gets_no_file(streams):
    done = subprocess.run([sys.executable, "-c", CLOSED, streams, "list"], cwd=REPO, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_standard_output_that_is_full_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "suite", "list"], cwd=REPO, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 11 and done.stderr == "suite list: cannot write to the standard output: No space left on device\n"


def test_a_current_folder_that_went_away_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cli.main(["list"]) == 2
    assert "the current folder no longer exists" in capsys.readouterr().err


def test_a_narrow_terminal_gets_a_task_on_a_few_lines(checkout, monkeypatch, capsys):  # noqa: F811
    checkout()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("suite.cli.show._console", lambda: Console(width=40, highlight=False))
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 5 and max(map(len, lines)) <= 40 and "tiny" in lines[0] and "A task for tests" in " ".join(lines)
