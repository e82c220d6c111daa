"""What decides numbers and a task does not say: it is in the settings, in the record, and in the key once it changes."""

import dataclasses

import pytest
from fakes import OFFLINE, RL, claim, offline_run, task_of

from suite.grade.fitness import violations
from suite.record.run import read_run
from suite.record.writer import open_run
from suite.spec import defaults
from suite.spec.defaults import DEFAULTS, Default, as_it_ran, default
from suite.spec.plan import Cell, plan, resolve_task
from suite.spec.reading import load_all

REPORT = "estimand: k3_nats_per_token, contrast: {arm: bf16}"


@pytest.fixture
def offline(tmp_path):
    return task_of(tmp_path, OFFLINE, claim("report", REPORT))


@pytest.fixture
def rl(tmp_path):
    return task_of(tmp_path, RL, claim("report", REPORT), name="trains")


def keys(*tasks) -> dict[str, str]:
    return {f"{task.id}/{cell.name}": cell.run_key() for task in tasks for cell in plan(task)}


def change(monkeypatch, path: str, value) -> None:
    monkeypatch.setitem(DEFAULTS, path, dataclasses.replace(DEFAULTS[path], value=value))


def test_what_a_task_leaves_to_an_engine_stands_in_its_settings_and_in_the_record(offline, rl, tmp_path):
    cell, trained = plan(offline)[0], plan(rl)[0]
    assert (cell.get("train.attention"), cell.get("rollout.prompts_per_batch"), cell.get("rollout.max_num_seqs")) == ("sdpa", 32, 64)
    assert cell.get("train.micro_batch_size", None) is None and trained.get("train.micro_batch_size") == 32
    assert trained.get("rollout.prompts_per_batch", None) is None, "RL samples a step at a time"
    writer = open_run(tmp_path, offline, cell, {}, "cpu")
    writer.close()
    said = read_run(writer.folder).record["cell"]
    assert said["defaults"] == dict(cell.defaults) and said["defaults"]["constants.pad_to_tokens"] == 16
    assert said["settings"]["train"]["attention"] == "sdpa"


def test_a_new_setting_with_a_default_changes_no_key(monkeypatch):
    tasks = list(load_all().values())[::4]
    before = keys(*tasks)
    for path, value in (("rollout.seed", 0), ("constants.something", 3)):
        monkeypatch.setitem(DEFAULTS, path, Default(path, value, value, lambda kind, settings: True))
    cells = [cell for task in tasks for cell in plan(task)]
    assert keys(*tasks) == before and len(before) > 100
    assert all(dict(cell.defaults)["constants.something"] == 3 for cell in cells)


@pytest.mark.parametrize("path, value", [
    ("rollout.prompts_per_batch", 48), ("rollout.max_num_seqs", 8), ("train.attention", "eager"), ("train.micro_batch_size", 16),
    ("constants.pad_to_tokens", 8), ("constants.head_chunk_logits", 2**20),
])  # fmt: skip
def test_a_changed_default_changes_every_key_that_relied_on_it_and_no_other(offline, rl, monkeypatch, path, value):
    tasks = (offline, rl, *list(load_all().values())[::9])
    before, relied = keys(*tasks), {f"{task.id}/{cell.name}": path in dict(cell.defaults) for task in tasks for cell in plan(task)}
    change(monkeypatch, path, value)
    after = keys(*tasks)
    assert {name: before[name] != after[name] for name in before} == relied and any(relied.values())
    change(monkeypatch, path, DEFAULTS[path].unsaid)
    assert keys(*tasks) == before


def test_a_value_that_is_said_has_the_key_that_it_always_had_whatever_the_default(tmp_path, monkeypatch):
    said = task_of(tmp_path, OFFLINE.replace("score_batch_size: 4", "score_batch_size: 4, attention: eager"), claim("report", REPORT))
    before = keys(said)
    change(monkeypatch, "train.attention", "eager")
    assert keys(said) == before and "train.attention" not in dict(plan(said)[0].defaults)


def test_a_record_that_claims_a_default_for_another_value_gets_another_key(offline):
    cell = plan(offline)[0]
    settings = cell.settings | {"train": cell.settings["train"] | {"attention": "eager"}}
    assert dataclasses.replace(cell, settings=settings).run_key() != cell.run_key()
    for path, value in (("rollout.temperature", 1.0), ("constants.unknown", 1)):
        assert dataclasses.replace(cell, defaults=(*cell.defaults, (path, value))).run_key() != cell.run_key()


def older(cell: Cell) -> dict:
    """Its settings as records held them before there was a table of defaults: null where the task says nothing."""
    return defaults.said(cell.settings, dict(cell.defaults))[0]


def run_like(task, arm, seed, settings, relied=None):
    run = offline_run(task, arm, seed, 2.0**-5)
    run.record["cell"] |= {"settings": settings} | ({} if relied is None else {"defaults": relied})
    return run


def test_older_records_are_of_the_same_cells_and_compare_with_newer_ones(offline):
    found = []
    for cell in plan(offline):
        assert dataclasses.replace(cell, settings=older(cell), defaults=()).run_key() == cell.run_key()
        is_new = cell.seed == 2
        found.append(run_like(offline, cell.arm, cell.seed, cell.settings if is_new else older(cell), dict(cell.defaults) if is_new else None))
    assert [line for _, line in violations(offline, found) if "settings" in line or "differ" in line or " is " in line] == []


def test_a_record_from_before_a_default_changed_departs_from_the_task_and_says_where(offline, monkeypatch):
    cell = plan(offline)[0]
    for path, value, shown in (("train.attention", "eager", "train.attention is 'sdpa', the task says 'eager'"),
                               ("constants.pad_to_tokens", 8, "constants.pad_to_tokens is 16, the task says 8")):  # fmt: skip
        runs = [run_like(offline, cell.arm, cell.seed, older(cell)), run_like(offline, cell.arm, cell.seed, cell.settings, dict(cell.defaults))]
        with monkeypatch.context() as patch:
            change(patch, path, value)
            for run in runs:
                assert any(shown in line for _, line in violations(offline, [run]))


def test_engines_take_their_defaults_from_the_table():
    pytest.importorskip("torch")
    from suite.engines import batch
    from suite.engines.samplers import hf
    from suite.engines.trainers import scoring, steps

    assert default("constants.pad_to_tokens") == batch.PAD_TO_TOKENS and default("rollout.max_num_seqs") == hf.DEFAULT_MAX_NUM_SEQS
    assert default("train.micro_batch_size") == steps.DEFAULT_MICRO_BATCH_SIZE
    assert default("constants.head_chunk_logits") == scoring.DEFAULT_HEAD_CHUNK_LOGITS


def test_constants_are_no_settings_and_every_other_row_is_one(rl):
    settings = resolve_task(rl).settings_by("bf16")
    for row in DEFAULTS.values():
        assert row.is_constant or row.path.split(".")[1] in settings[row.path.split(".")[0]]
        assert row.value == row.unsaid, "no default has changed yet"
    assert as_it_ran(settings, {})["constants"] == {"head_chunk_logits": 2**26, "pad_to_tokens": 16} and "constants" not in settings
