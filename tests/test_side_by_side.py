"""`suite compare`: only what differs of what was asked, everything that came out, and the step from which series part."""

import json
import shutil
from pathlib import Path

import published as fakes
import pytest

from suite.archive.publishing import publish_task
from suite.cli import main as cli
from suite.errors import UserError
from suite.record.run import read_metrics
from suite.report.side_by_side import _agreement, side_by_side
from suite.report.worse import what_is_worse
from suite.spec.reading import load_task


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


def verdict_with(folder: Path, *claims, task="check-m") -> Path:
    folder.mkdir()
    path = folder / "verdict.json"
    path.write_text(json.dumps({"task": task, "claims": list(claims)}))
    return path


def reported(value, interval, estimand="k3_nats_per_token", unit="nats/token", id="bf16-k3"):
    return {"id": id, "verdict": None, "reason": "", "estimand": estimand, "unit": unit, "estimate": value, "interval": interval}


def graded(word):
    return reported(1.0, [0.9, 1.1]) | {"id": "C1", "verdict": word, "reason": "so it is"}


@pytest.fixture
def worse(tmp_path, monkeypatch):
    """what_is_worse of two lists of claims, without the rest of a verdict that a reader asks for."""
    monkeypatch.setattr("suite.report.worse.read_either", lambda path: json.loads(path.read_text()))

    def call(before, after, **tasks):
        return what_is_worse(verdict_with(tmp_path / "a", *before), verdict_with(tmp_path / "b", *after, **tasks))

    return call


@pytest.mark.parametrize("before, after, num", [
    ([2e-4, [1e-4, 3e-4]], [5e-4, [4e-4, 6e-4]], 1),
    ([2e-4, [1e-4, 3e-4]], [5e-4, [2e-4, 9e-4]], 0),  # intervals that touch
    ([5e-4, [4e-4, 6e-4]], [2e-4, [1e-4, 3e-4]], 0),  # better
    ([2e-4, [1e-4, 3e-4]], [None, None], 1),
    ([2e-4, None], [9e-4, None], 0),  # nothing to tell noise by
])  # fmt: skip
def test_a_mismatch_is_worse_only_beyond_both_intervals(worse, before, after, num):
    assert len(worse([reported(*before)], [reported(*after)])) == num


def test_a_larger_ratio_or_signed_mean_is_not_worse(worse):
    ratio, signed = ("ratio", "k3_nats_per_token"), ("nats/token", "k1_nats_per_token")
    before, after = ([reported(value, [value - 1, value + 1], estimand, unit, id=unit) for unit, estimand in (ratio, signed)] for value in (10.0, 60.0))
    assert worse(before, after) == []


@pytest.mark.parametrize("words, num", [(("PASS", "INCONCLUSIVE"), 1), (("INCONCLUSIVE", "FAIL"), 1), (("FAIL", "PASS"), 0), (("PASS", "PASS"), 0)])
def test_a_graded_claim_is_worse_where_its_word_is_graver(worse, words, num):
    assert len(worse([graded(words[0])], [graded(words[1])])) == num


def test_two_tasks_or_a_claim_that_is_gone_cannot_be_told_worse(worse, tmp_path):
    with pytest.raises(UserError, match="two of one task"):
        worse([graded("PASS")], [graded("PASS")], task="check-n")
    shutil.rmtree(tmp_path / "a"), shutil.rmtree(tmp_path / "b")
    with pytest.raises(UserError, match="found no claim C1"):
        worse([graded("PASS")], [])


def test_the_command_says_what_is_worse_and_ends_with_one(repo, tmp_path, monkeypatch, capsys):
    (published,) = (repo / "results" / "desk-tiny").glob("*/verdict.json")
    assert cli.main(["compare", str(published), str(published), "--fail-on", "worse"]) == 0
    assert "nothing is worse in B" in capsys.readouterr().out
    assert cli.main(["compare", str(run_folder(repo, "bf16.*s0")), str(run_folder(repo, "fp16.*s0")), "--fail-on", "worse"]) == 2
    assert "two verdicts" in capsys.readouterr().err
