"""Rehearsals: every task that runs an engine can be cut down, keeps what it is about, and runs on the real engines."""

import json

import pytest

from suite.cli import main as cli
from suite.protocols.rehearse import rehearsal
from suite.spec.kinds import kind_of
from suite.spec.plan import plan
from suite.spec.reading import load_all, load_task
from suite.spec.settings import Settings

TASKS = load_all()
WITH_ENGINES = [name for name, task in TASKS.items() if task.protocol not in ("dataset", "compare")]


@pytest.mark.parametrize("name", WITH_ENGINES)
def test_a_rehearsal_keeps_what_a_task_is_about_and_cuts_the_rest_down(name):
    task = TASKS[name]
    cells = {(cell.arm, str(cell.point)): cell for cell in rehearsal(task)}
    assert set(cells) == {(cell.arm, str(cell.point)) for cell in plan(task)}, "every arm, grid point and control once"
    for whole in plan(task):
        cell = cells[whole.arm, str(whole.point)]
        settings = Settings.model_validate_json(json.dumps(cell.settings), strict=True).model_dump(mode="json")
        assert all(cell.get(path) is not None for path in kind_of(task).required if path != "model.sha256")
        for kept in ("precision", "algorithm", "train.lora", "train.optimizer", "train.gradient_checkpointing", "train.routing_replay", "rollout.stop"):
            assert cell.get(kept, None) == whole.get(kept, None), kept
        assert settings["model"]["path"].startswith("baselines/desk/") and settings["rollout"]["max_tokens"] <= 192
        assert (settings["schedule"] or {}).get("steps") in (2, None)
        assert cell.run_key() != whole.run_key()


@pytest.mark.parametrize("name", ["sanity-data", "desk-sanity-order"])
def test_a_task_without_engines_has_no_rehearsal(name, capsys):
    assert cli.main(["rehearse", name]) == 2
    assert f"rehearse: found {name}" in capsys.readouterr().err


@pytest.mark.engine
def test_a_paper_tier_task_is_rehearsed_on_the_real_engines(capsys, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("vllm")
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    assert cli.main(["rehearse", "octothinker-grpo"]) == 0
    shown, task = capsys.readouterr().out, load_task("octothinker-grpo")
    assert shown.count("as asked") == len(task.arms) + len(task.controls) and "desk/llama-1m" in shown
    assert not (tmp_path / "runs").exists(), "nothing is kept"
