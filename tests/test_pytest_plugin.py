"""Task files as pytest items: letters are verdicts, and a verdict that does not come out again fails."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points

import published as fakes
import pytest

from suite.archive.publishing import publish_task
from suite.record.manifest import write_manifest
from suite.spec.reading import load_task

pytest_plugins = "pytester"

# A stand-in for `python -m suite reproduce TASK`: says and returns what stands in <task>.verdict.
REPRODUCE = """
import sys
verdict, code = open(f"{sys.argv[2]}.verdict").read().split()
print("some output of the run")
if verdict != "SILENT":
    print(f"VERDICT task={sys.argv[2]} verdict={verdict} claims=0/1 verdict_file=x")
sys.exit(int(code))
"""
EXIT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 10, "ERROR": 11, "NOT_RUN": 12, "INVALID": 13, "SILENT": 3}


@pytest.fixture
def checkout(pytester):
    """A checkout with one valid, unpublished task; the current folder is its root."""
    return fakes.checkout(pytester.path)


@pytest.fixture
def run(pytester):
    """Runs pytest on the checkout with the plugin; the entry point brings it where the package is installed."""
    installed = any(point.name == "suite" for point in entry_points(group="pytest11"))
    plugin = () if installed else ("-p", "suite.pytest_plugin")

    def call(*args, where="tasks"):
        return pytester.runpytest_inprocess(*plugin, "-p", "no:cacheprovider", *args, where)

    return call


def publish(repo, **how):
    fakes.make_runs(repo, **how)
    publish_task(load_task("desk-tiny"), repo / "runs", repo / "results")
    return repo / "results" / "desk-tiny" / fakes.FINGERPRINT / "verdict.json"


@pytest.fixture
def bench_task(checkout, monkeypatch):
    """Makes `suite reproduce TASK` end with a given verdict. Only child processes see the stand-in."""
    (checkout / "standin" / "suite").mkdir(parents=True)
    (checkout / "standin" / "suite" / "__init__.py").write_text("")
    (checkout / "standin" / "suite" / "__main__.py").write_text(REPRODUCE)
    monkeypatch.setenv("PYTHONPATH", str(checkout / "standin"), prepend=os.pathsep)

    def make(verdict, name="desk-tiny"):
        (checkout / f"{name}.verdict").write_text(f"{verdict} {EXIT_CODES[verdict]}")

    return make


def first_letters(result):
    """The progress letters of the line that belongs to the task folder."""
    return next(line.split()[1] for line in result.outlines if line.startswith("tasks/") and "[" in line)


def test_items_are_named_by_task_and_sorted_and_blocks_are_left_out(checkout, run):
    for name in ("desk-zebra", "desk-alpha"):
        fakes.checkout(checkout, fakes.TASK.replace("desk-tiny", name), name)
    (checkout / "tasks" / "_base" / "block.yaml").write_text("x: 1")
    result = run("--collect-only", "-q")
    found = [line for line in result.outlines if "::" in line]
    assert found == [f"tasks/desk/{name}.yaml::{name}" for name in ("desk-alpha", "desk-tiny", "desk-zebra")]


def test_yaml_outside_a_checkout_of_this_suite_is_not_collected(pytester, run):
    fakes.checkout(pytester.path)
    (pytester.path / "pyproject.toml").write_text('[project]\nname = "something-else"\n')
    assert run().ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_an_unpublished_task_that_validates_passes_with_n(checkout, run):
    result = run()
    assert result.ret == 0 and first_letters(result) == "n"
    assert "1 published NOT_RUN" in result.outlines[-1]


def test_a_published_pass_is_a_dot(checkout, run):
    assert json.loads(publish(checkout).read_text())["verdict"] == "PASS"
    result = run()
    assert result.ret == 0 and first_letters(result) == "."
    assert "1 passed" in result.outlines[-1]


def test_a_published_fail_shows_f_and_passes(checkout, run):
    same = {"bf16": 2.0**-5, "fp16": 2.0**-4.9}
    assert json.loads(publish(checkout, noise=same).read_text())["verdict"] == "FAIL"
    result = run()
    assert result.ret == 0 and first_letters(result) == "F"
    assert "1 published FAIL" in result.outlines[-1] and "failed" not in result.outlines[-1]


def test_a_published_verdict_that_does_not_come_out_again_fails(checkout, run):
    path = publish(checkout)
    verdict = json.loads(path.read_text())
    verdict["claims"][0]["estimate"] *= 1.01
    path.write_text(json.dumps(verdict))
    write_manifest(path.parent)
    result = run()
    assert result.ret == 1 and "1 failed" in result.outlines[-1]
    result.stdout.fnmatch_lines(["*claims[[]0[]].estimate: published*recomputed*"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_a_task_that_does_not_validate_fails_with_file_and_key(checkout, run):
    fakes.checkout(checkout, fakes.TASK + "colour: red\n")
    result = run()
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*desk-tiny.yaml: colour*"])
    result.stdout.no_fnmatch_line("*Traceback*")


@pytest.mark.parametrize(
    "verdict, letter, code, words",
    [
        ("PASS", ".", 0, "1 passed"), ("FAIL", "F", 1, "1 failed"), ("INVALID", "I", 1, "1 failed"),
        ("ERROR", "E", 1, "1 error"),
        ("INCONCLUSIVE", "?", 0, "1 INCONCLUSIVE"), ("NOT_RUN", "n", 0, "1 NOT_RUN"), ("SILENT", "E", 1, "1 error"),
    ],
)  # fmt: skip
def test_with_bench_the_verdict_is_the_outcome(run, bench_task, verdict, letter, code, words):
    bench_task(verdict)
    result = run("--bench")
    assert first_letters(result) == letter and result.ret == code
    assert words in result.outlines[-1]


def test_with_bench_a_failure_shows_the_output_of_the_run(run, bench_task):
    bench_task("FAIL")
    run("--bench").stdout.fnmatch_lines(
        ["desk-tiny: FAIL (exit code 1): VERDICT task=desk-tiny*", "*some output of the run*"]
    )


@pytest.mark.parametrize("bench", [False, True])
def test_two_workers_agree_with_one_and_bench_items_share_a_worker(checkout, run, bench_task, bench):
    names = [f"desk-{letter}" for letter in "abcd"]
    for name in names:
        fakes.checkout(checkout, fakes.TASK.replace("desk-tiny", name), name)
        bench_task("PASS", name)
    bench_task("PASS")
    result = run("-n", "2", "--dist", "loadgroup", "-v", *(["--bench"] if bench else []))
    assert result.ret == 0
    lines = [line for line in result.outlines if line.startswith("[gw") and "desk-" in line]
    assert len(lines) == 5
    if bench:
        assert len({line.split("]")[0] for line in lines}) == 1 and all("PASS" in line for line in lines)
    else:
        assert all("NOT_RUN" in line for line in lines)


def test_collection_imports_nothing_heavy():
    heavy = "('torch', 'vllm', 'transformers', 'numpy', 'pyarrow', 'matplotlib', 'pydantic')"
    code = f"import sys, suite.pytest_plugin; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# A stand-in for `python -m suite check MODEL ...`: says what it was asked, and ends with the number that the model is called.
CHECK = """
import sys
print("asked:", " ".join(sys.argv[1:]))
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def check_standin(pytester, monkeypatch):
    (pytester.path / "standin" / "suite").mkdir(parents=True)
    (pytester.path / "standin" / "suite" / "__init__.py").write_text("")
    (pytester.path / "standin" / "suite" / "__main__.py").write_text(CHECK)
    monkeypatch.setenv("PYTHONPATH", str(pytester.path / "standin"), prepend=os.pathsep)


@pytest.mark.parametrize("code, says", [(0, None), (1, "a chosen bar is missed"), (2, "no answer (exit code 2)"), (12, "no answer (exit code 12)")])
def test_a_gate_passes_only_where_the_check_ran_and_no_bar_was_missed(run, pytester, check_standin, code, says):
    result = run("--suite-check", str(code), "--bar", "nemo-rl,verl", "--suite-check-flags", "--seeds 0 --precision bf16", where=str(pytester.path))
    result.assert_outcomes(passed=int(says is None), failed=int(says is not None))
    assert result.ret == (says is not None)
    if says:
        result.stdout.fnmatch_lines([f"*suite check {code}: {says.replace('[', '[[]')}*", f"*asked: check {code} --bar nemo-rl,verl --seeds 0 --precision bf16*"])


def test_a_gate_stands_beside_the_tests_of_a_project(run, pytester, check_standin):
    pytester.makepyfile("def test_mine(): pass")
    run("--suite-check", "0", "--suite-check", "1", where=str(pytester.path)).assert_outcomes(passed=2, failed=1)
    run(where=str(pytester.path)).assert_outcomes(passed=1)
