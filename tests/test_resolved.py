"""A task is resolved once per distinct setting, by whoever comes first, and handed on."""

import pytest
from fakes import COMPARE, OFFLINE, block, claim, task_of

from suite.cli import verbs
from suite.grade.verdict import design_power, grade_task, with_needed
from suite.machine import environment
from suite.machine.doctor import can_run
from suite.spec import plan as planning
from suite.spec.plan import canonical_json, plan, resolve_task
from suite.spec.reading import load_all
from suite.spec.validate import require_valid, validate_file

CONTROL = """
controls:
  - {name: control-aa, kind: aa, like: bf16, seeds: [100], estimand: k3_nats_per_token, contrast: {ratio: [control-aa, bf16]}, accept: [0.8, 1.2]}
"""


@pytest.fixture
def resolved(monkeypatch):
    """What was resolved: the settings as written, one text per call."""
    calls, resolve = [], planning.resolve
    monkeypatch.setattr(planning, "resolve", lambda task, raw, key="arms": calls.append(f"{task.id} {canonical_json(raw)}") or resolve(task, raw, key))
    return calls


def whole_way(task) -> dict:
    """Every verb's part before and after a run."""
    valid = require_valid(task)
    verbs.select(valid)
    can_run(valid, environment.collect())
    design_power(valid)
    return grade_task(valid, [], with_needed(valid, lambda name: []))


def test_each_distinct_setting_of_a_task_is_resolved_once_from_its_check_to_its_verdict(tmp_path, resolved):
    task = task_of(tmp_path, OFFLINE, claim("ratio", block("k3_nats_per_token", "ratio: [bf16, fp16]", "[16, 128]")) + CONTROL)
    assert whole_way(task)["verdict"] == "NOT_RUN"
    assert len(resolved) == len(set(resolved)) == 2  # the A/A control is its arm again


def test_a_comparison_resolves_the_settings_of_the_tasks_it_needs_once_each(resolved):
    task = min((task for task in load_all().values() if len(task.needs) > 1), key=lambda task: len(task.needs))
    whole_way(task)
    num_resolved = len(resolved)
    needed = resolve_task(task).needed
    distinct = {(name, canonical_json(cell.settings)) for name in task.needs for cell in needed[name].cells}
    assert num_resolved == len(distinct) == len(set(resolved)) > len(task.needs) > 1


def test_what_is_resolved_stays_as_it_is(tmp_path):
    task = task_of(tmp_path, OFFLINE, claim("report", "estimand: k3_nats_per_token, contrast: {arm: bf16}"))
    found = resolve_task(task)
    assert resolve_task(found) is found and require_valid(found) is found and list(found.cells) == plan(task) == plan(found)


def test_a_task_whose_needs_do_not_resolve_says_which_and_how_to_see_why(tmp_path):
    folder = tmp_path / "tasks" / "desk"
    folder.mkdir(parents=True)
    (folder.parent / "_base").mkdir()
    task_of(folder, OFFLINE.replace(", max_tokens: 64", ""), claim("report", "estimand: k3_nats_per_token, contrast: {arm: bf16}"), name="bad")
    path = folder / "both.yaml"
    head = COMPARE.format(id="both", seeds=[0], needs=["bad"])
    path.write_text(head + claim("report", "estimand: k3_nats_per_token, contrast: {arm: bad-bf16}"))
    errors, _ = validate_file(path)
    assert ("needs", "bad", "a task without errors", "suite validate bad") in [(e.key, e.found, e.allowed, e.hint) for e in errors]
