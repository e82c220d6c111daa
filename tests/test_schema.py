"""record.json as a model: one constructor for all who make a record, and every record that is published fits it."""

import json
from types import SimpleNamespace

import pytest
from fakes import OFFLINE, claim, offline_run, task_of
from pydantic import ValidationError

from suite.files import json_safe
from suite.record.schema import RECORD_SCHEMA, Record, new_record
from suite.spec.checkout import find_repo

TASK = SimpleNamespace(id="t", version=2, grade_version=1, text="id: t\n")
CELL = {"name": "bf16.s0", "arm": "bf16", "point": {}, "seed": 0, "is_control": False, "settings": {"precision": {"rollout": "bf16"}}}


def made(**entries):
    return new_record(TASK, CELL | entries.pop("cell", {}), "0" * 64, environment={}, fingerprint="cpu", **entries)


def test_a_record_that_begins_holds_its_task_cell_and_precision_and_nothing_measured():
    record = made(limit=3)
    assert record["schema"] == RECORD_SCHEMA and record["task"] == vars(TASK) and record["cell"] == CELL
    assert (record["status"], record["limit"], record["precision_asked"]) == ("running", 3, {"rollout": "bf16"})
    assert record["counts"] == record["series_summary"] == record["precision_executed"] == {} and record["error"] is None
    assert made(cell={"defaults": {"train.attention": "sdpa"}})["cell"]["defaults"] == {"train.attention": "sdpa"}


def test_entries_beside_those_of_every_record_are_kept():
    assert made(weights={"sha256": "a"})["weights"] == {"sha256": "a"}


@pytest.mark.parametrize("entries, key", [
    ({"status": "done"}, "status"), ({"cell": {"seed": "0"}}, "seed"), ({"cell": {"arm": "../x"}}, "arm"), ({"limit": 1.5}, "limit"),
])  # fmt: skip
def test_a_record_that_no_reader_would_take_is_not_made(entries, key):
    with pytest.raises(ValidationError, match=key):
        made(**entries)


def test_the_record_of_a_test_has_the_entries_of_a_record_that_is_written(tmp_path):
    from suite.record.run import read_run
    from suite.record.writer import open_run
    from suite.spec.plan import plan

    task = task_of(tmp_path, OFFLINE, claim("report", "estimand: k3_nats_per_token, contrast: {arm: bf16}"))
    writer = open_run(tmp_path, task, plan(task)[0], {}, "cpu")
    writer.close()
    assert read_run(writer.folder).record.keys() == offline_run(task, "bf16", 0, 0.1).record.keys()


def test_every_published_record_is_read_as_one():
    files = sorted((find_repo() / "results").glob("*/*/*/*/record.json"))
    for path in files[:: max(1, len(files) // 60)]:
        said = json.loads(path.read_text())
        record = Record.model_validate(said)
        assert json_safe(record.model_dump(exclude_unset=True)) == said and said["schema"] == RECORD_SCHEMA
    assert len(files) > 100
