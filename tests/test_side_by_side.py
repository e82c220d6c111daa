"""`suite compare`: only what differs of what was asked, everything that came out, and the step from which series part."""

import json
import shutil
from pathlib import Path

import published as fakes
import pytest

from suite.archive.publishing import publish_task
from suite.cli.main import main as cli
from suite.errors import UserError
from suite.record.run import read_metrics
from suite.report.side_by_side import _agreement, side_by_side
from suite.spec.task import load_task


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    repo = fakes.checkout(tmp_path_factory.mktemp("compare") / "checkout")
    fakes.make_runs(repo)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        publish_task(load_task("desk-tiny"), repo / "runs", repo / "results")
    return repo


def run_folder(repo: Path, cell: str) -> Path:
    (record,) = (repo / "runs" / "desk-tiny").glob(f"{cell}/*/record.json")
    return record.parent


def table(sections, title) -> dict[str, tuple]:
    (section,) = (one for one in sections if one.title.startswith(title))
    return {row[0]: row[1:] for row in section.rows}


def test_two_runs_differ_in_what_their_arms_set_and_their_results_have_a_ratio(repo):
    sections = side_by_side(run_folder(repo, "bf16.*s0"), run_folder(repo, "fp16.*s0"))
    asked = table(sections, "asked for")
    assert asked["arm"] == ("bf16", "fp16") and set(asked) == {"arm", "precision.rollout", "precision.train"}
    k3 = table(sections, "results")["k3_nats_per_token"]
    assert float(k3[2]) == pytest.approx(float(k3[1]) / float(k3[0]), rel=1e-3)
    assert not any(section.title.startswith("machine") for section in sections), "the same machine: nothing to show"


def test_a_published_run_is_the_run_it_was_made_from(repo):
    (published,) = (repo / "results" / "desk-tiny").glob("*/bf16.*s0/*/record.json")
    sections = side_by_side(run_folder(repo, "bf16.*s0"), published.parent)
    assert not any(section.title.startswith("asked for") for section in sections)
    assert {row[0] for row in table(sections, "series").values()} == {"equal"}


def test_one_changed_value_is_found_where_it_stands(repo, tmp_path):
    shutil.copytree(run_folder(repo, "bf16.*s0"), tmp_path / "copy")
    rows = read_metrics(tmp_path / "copy")
    rows[-1]["k3_nats_per_token"] *= 1.5
    (tmp_path / "copy" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    series = table(side_by_side(run_folder(repo, "bf16.*s0"), tmp_path / "copy"), "series")
    assert series.pop("k3_nats_per_token") == (f"differ from step {len(rows) - 1} on", "0.33")
    assert {row[0] for row in series.values()} == {"equal"}


@pytest.mark.parametrize(("left", "right", "said"), [
    ([1.0, float("nan")], [1.0, float("nan")], ("equal", "")),
    ([1.0, 2.0, 3.0], [1.0, 2.0], ("equal to step 1, where one ends", "")),
    ([1.0, None], [1.0, 2.0], ("differ from step 1 on", "one has no number there")),
    ([1.0, 2.0, 4.0], [1.0, 1.0, 4.0], ("differ from step 1 on", "0.5")),
])  # fmt: skip
def test_how_two_series_agree(left, right, said):
    assert _agreement(left, right) == said


def test_two_verdicts_are_laid_beside_each_other(repo, tmp_path, capsys):
    folder = repo / "results" / "desk-tiny" / fakes.FINGERPRINT
    other = json.loads((folder / "verdict.json").read_text())
    other["claims"][0] |= {"estimate": 12.5, "interval": [10.0, 15.0], "verdict": "FAIL"}
    (tmp_path / "verdict.json").write_text(json.dumps(other))
    assert cli.main(["compare", str(folder), str(tmp_path)]) == 0
    assert "12.5 [10, 15] FAIL" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused_with_what_could_be(repo, tmp_path, capsys):
    run = run_folder(repo, "bf16.*s0")
    with pytest.raises(UserError, match="found a run and a verdict, allowed: two runs or two verdicts"):
        side_by_side(run, repo / "results" / "desk-tiny" / fakes.FINGERPRINT)
    with pytest.raises(UserError, match=r"record.json or verdict.json \(\d+ runs lie below it, such as"):
        side_by_side(run, repo / "runs")
    assert cli.main(["compare", str(run), str(tmp_path / "nothing")]) == 2
    assert "allowed: a folder with record.json or verdict.json" in capsys.readouterr().err
