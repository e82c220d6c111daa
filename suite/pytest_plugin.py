"""Collects tasks/**/*.yaml as pytest items. Registered through the pytest11 entry point; idle outside a checkout.

Without --bench an item passes if and only if its task validates and every verdict published for it, recomputed from
the published records, equals the published one. Its letter is the published verdict: a published FAIL is a result, and
the item that confirms it passes.

With --bench an item runs its task (`suite reproduce`) and the verdict is the outcome: FAIL, INVALID and ERROR fail the
session; INCONCLUSIVE and NOT_RUN are reported as such, and are neither passes nor failures.

With --bench all items share one xdist worker: two engines on one machine slow each other down.

With --suite-check MODEL one more item runs `suite check MODEL`, in any project; it passes if no bar named with --bar is
missed. A check that cannot run fails: a gate that stands open is none.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

LETTERS = {"PASS": ".", "FAIL": "F", "INCONCLUSIVE": "?", "NOT_RUN": "n", "INVALID": "I", "ERROR": "E"}
# Several fingerprints: the item shows the verdict that comes first here; what one machine could not run weighs little.
GRAVITY = ("INVALID", "ERROR", "FAIL", "INCONCLUSIVE", "NOT_RUN", "PASS")
FAILS_SESSION = ("FAIL", "INVALID", "ERROR")
_LAST_LINE = re.compile(r"^VERDICT task=(\S+) verdict=(\S+)", re.MULTILINE)


class TaskFailure(Exception):
    """Why an item failed, already in words; shown without a traceback."""


def pytest_addoption(parser):
    group = parser.getgroup("suite", "fp16-mismatch-suite")
    group.addoption("--bench", action="store_true", help="run each collected task; its verdict is the outcome")
    group.addoption("--suite-check", metavar="MODEL", action="append", default=[], help="also run `suite check MODEL`")
    group.addoption("--bar", metavar="A,B", default="", help="with --suite-check: published bars that must not be missed")
    group.addoption("--suite-check-flags", metavar="FLAGS", default="", help="further flags of `suite check`, as one text")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "xdist_group(name): tests of one group run on one xdist worker (--dist loadgroup)"
    )


def pytest_collect_file(file_path: Path, parent):
    folder = file_path.parent
    if file_path.suffix != ".yaml" or folder.parent.name != "tasks" or folder.name.startswith("_"):
        return None
    return TaskFile.from_parent(parent, path=file_path) if _in_checkout(folder.parent.parent) else None


def _in_checkout(folder: Path) -> bool:
    project = folder / "pyproject.toml"
    return project.is_file() and "fp16-mismatch-suite" in project.read_text(encoding="utf-8")


class TaskFile(pytest.File):
    """One task file holds one item, named by the task's id, which is the file's name."""

    def collect(self):
        yield TaskItem.from_parent(self, name=self.path.stem)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(session, config, items):
    items += [CheckItem.from_parent(session, name=f"suite-check[{model}]", model=model) for model in config.getoption("suite_check")]


class CheckItem(pytest.Item):
    """One model against the chosen bars."""

    def __init__(self, *, model: str, **kwargs):
        super().__init__(**kwargs)
        self.model = model
        self.add_marker(pytest.mark.xdist_group("engine"))

    def runtest(self):
        bars = self.config.getoption("bar")
        command = [sys.executable, "-m", "suite", "check", self.model, *(["--bar", bars] if bars else [])]
        command += shlex.split(self.config.getoption("suite_check_flags"))
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.add_report_section("call", "suite check", done.stdout)
        if done.returncode:
            what = "a chosen bar is missed" if done.returncode == 1 else f"no answer (exit code {done.returncode})"
            last = "" if done.returncode == 1 else "\n" + "\n".join(done.stdout.strip().splitlines()[-3:])
            raise TaskFailure(f"suite check {self.model}: {what}{last}")

    def repr_failure(self, excinfo, style=None):
        return str(excinfo.value) if isinstance(excinfo.value, TaskFailure) else super().repr_failure(excinfo, style)

    def reportinfo(self):
        return self.path, None, self.name


class TaskItem(pytest.Item):
    """One task; `verdict` is what its letter shows, known once it has run."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.verdict: str | None = None
        if self.config.getoption("bench"):
            self.add_marker(pytest.mark.xdist_group("engine"))

    def runtest(self):
        repo = self.path.parents[2]
        if self.config.getoption("bench"):
            self._reproduce(repo)
        else:
            self.verdict = confirm_published(self.path, repo)

    def _reproduce(self, repo: Path) -> None:
        command = [sys.executable, "-m", "suite", "reproduce", self.name]
        done = subprocess.run(command, cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.add_report_section("call", "suite reproduce", done.stdout)
        lines = _LAST_LINE.findall(done.stdout)
        self.verdict = lines[-1][1] if lines else "ERROR"
        last = done.stdout.strip().splitlines()[-1:] or ["no output"]
        if self.verdict in FAILS_SESSION:
            raise TaskFailure(f"{self.name}: {self.verdict} (exit code {done.returncode}): {last[0]}")
        if self.verdict != "PASS":
            pytest.skip(last[0])

    def repr_failure(self, excinfo, style=None):
        if isinstance(excinfo.value, TaskFailure) or type(excinfo.value).__module__.startswith("suite."):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self):
        return self.path, 0, self.name


def confirm_published(path: Path, repo: Path) -> str:
    """The gravest published verdict of a task, after every one of them was recomputed; NOT_RUN if there is none.

    Raises TaskFailure if the task does not validate or a recomputed verdict is not the published one.
    """
    from suite.archive.published import read_verdict
    from suite.archive.verifying import folder_differences
    from suite.spec.reading import load_task
    from suite.spec.validate import validate_file

    errors, _ = validate_file(path)
    if errors:
        raise TaskFailure("\n".join(str(error) for error in errors))
    task = load_task(path)
    verdicts = sorted((repo / "results" / task.id).glob("*/verdict.json"))
    if differences := [line for verdict in verdicts for line in folder_differences(verdict.parent, {task.id: task})]:
        raise TaskFailure("\n".join(differences))
    found = [read_verdict(verdict)["verdict"] for verdict in verdicts]
    return min(found, key=GRAVITY.index, default="NOT_RUN")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if isinstance(item, TaskItem) and call.when == "call" and item.verdict is not None:
        outcome.get_result().suite_verdict = item.verdict  # plain attribute: xdist carries it to the controller


def pytest_report_teststatus(report):
    verdict = getattr(report, "suite_verdict", None)
    if verdict is None or report.when != "call":
        return None
    if report.failed:
        return ("error" if verdict == "ERROR" else "failed"), LETTERS[verdict], verdict
    markup = {"green": verdict == "PASS", "yellow": verdict != "PASS"}
    category = "passed" if verdict == "PASS" else verdict if report.skipped else f"published {verdict}"
    return category, LETTERS[verdict], (verdict, markup)
