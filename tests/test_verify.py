"""`suite verify` recomputes what is published and names every difference; nothing changed or stale gets through."""

import json
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import published as fakes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import suite.report
from suite.record import write_manifest
from suite.report.publishing import publish_task
from suite.report.verifying import compare, verify_published
from suite.task import load_task


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    repo = fakes.checkout(tmp_path_factory.mktemp("verify") / "checkout")
    fakes.make_runs(repo)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        publish_task(load_task("desk-tiny"), repo / "runs", repo / "results")
    return repo


@pytest.fixture
def repo(shared, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(shared, copy)
    monkeypatch.chdir(copy)
    return copy


def folder_of(repo):
    return repo / "results" / "desk-tiny" / fakes.FINGERPRINT


def differences(repo, target=None):
    return verify_published(target, repo / "results")[1]


def change_verdict(repo, change):
    """Edit the published verdict and make the manifest agree, as somebody would who means to deceive."""
    path = folder_of(repo) / "verdict.json"
    verdict = json.loads(path.read_text())
    change(verdict)
    path.write_text(json.dumps(verdict))
    write_manifest(folder_of(repo))


def test_what_was_just_published_verifies(repo, capsys):
    assert suite.report.verify(None, repo / "results") == 0
    assert "1 published verdicts recomputed, 0 differences" in capsys.readouterr().out
    assert suite.report.verify("desk-tiny", repo / "results") == 0


def test_nothing_published_is_exit_14(repo):
    assert suite.report.verify("no-such-task", repo / "results") == 14
    shutil.rmtree(repo / "results")
    assert suite.report.verify(None, repo / "results") == 14


def test_the_published_verdict_is_the_one_the_noise_was_made_for(repo):
    claim = json.loads((folder_of(repo) / "verdict.json").read_text())["claims"][0]
    assert claim["estimate"] == pytest.approx(64, rel=0.15)


def test_a_flattered_estimate_is_found(repo):
    change_verdict(repo, lambda v: v["claims"][0].update(estimate=v["claims"][0]["estimate"] * (1 + 1e-6)))
    (line,) = differences(repo)
    assert "claims[0].estimate: published" in line and "recomputed" in line


def test_a_turned_verdict_is_found(repo):
    change_verdict(repo, lambda v: v.update(verdict="PASS" if v["verdict"] != "PASS" else "FAIL"))
    assert any(".json: verdict: published" in line for line in differences(repo))
    assert suite.report.verify(None, repo / "results") == 1


def test_rounding_below_1e_9_is_no_difference(repo):
    change_verdict(repo, lambda v: v["claims"][0].update(estimate=v["claims"][0]["estimate"] * (1 + 1e-11)))
    assert differences(repo) == []


def test_changed_sums_are_found_by_hash_and_by_verdict(repo):
    path = next(folder_of(repo).glob("bf16*/*/evidence_summary.parquet"))
    table = pq.read_table(path)
    table = table.set_column(table.column_names.index("sum_k3"), "sum_k3", pa.array(np.asarray(table["sum_k3"]) * 2))
    pq.write_table(table, path)
    found = differences(repo)
    assert any("evidence_summary.parquet: sha256" in line for line in found)
    assert any("claims[0].estimate" in line for line in found)


@pytest.mark.parametrize("how", ["extra", "missing"])
def test_unlisted_and_missing_files_are_found(repo, how):
    if how == "extra":
        (folder_of(repo) / "notes.txt").write_text("x")
    else:
        next(folder_of(repo).rglob("plot_points.parquet")).unlink()
    (line,) = differences(repo)
    assert (
        "notes.txt: not in the manifest" if how == "extra" else "plot_points.parquet: in the manifest, but missing"
    ) in line


def test_a_run_left_out_after_the_fact_is_found(repo):
    shutil.rmtree(next(folder_of(repo).glob("bf16*.s2")))
    write_manifest(folder_of(repo))
    assert any("num_seeds" in line for line in differences(repo))


@pytest.mark.parametrize("key, label", [("version", "task_version"), ("grade_version", "grade_version")])
def test_a_task_that_moved_on_is_stale_and_not_passed(repo, key, label):
    fakes.checkout(repo, fakes.TASK.replace(f"\n{key}: 1", f"\n{key}: 2"))
    (line,) = differences(repo)
    assert f"stale: {label} 1, the task is at 2" in line
    assert suite.report.verify(None, repo / "results") == 1


def test_a_setting_changed_without_a_new_version_is_found(repo):
    fakes.checkout(repo, fakes.TASK.replace("score_batch_size: 4", "score_batch_size: 8"))
    found = differences(repo)
    assert sum("a setting changed without a new version" in line for line in found) == 6


def test_a_grade_changed_without_a_new_grade_version_is_found(repo):
    fakes.checkout(repo, fakes.TASK.replace("accept: [16.0, 128.0]", "accept: [1.0, 2.0]"))
    assert any("claims[0].accept" in line for line in differences(repo))


def test_a_published_task_that_no_longer_exists_is_named(repo):
    (repo / "tasks" / "desk" / "desk-tiny.yaml").unlink()
    (line,) = differences(repo)
    assert "no longer exists" in line


def test_records_without_a_verdict_are_named(repo):
    shutil.copytree(folder_of(repo), folder_of(repo).with_name("other-machine"))
    (folder_of(repo).with_name("other-machine") / "verdict.json").unlink()
    (line,) = differences(repo)
    assert "other-machine: records without a verdict.json" in line


def test_a_bundle_is_checked_as_folder_and_as_archive(repo, tmp_path):
    with tarfile.open(tmp_path / "bundle.tar.gz", "w:gz") as archive:
        archive.add(repo / "results" / "desk-tiny", "desk-tiny")
    for target in (str(tmp_path / "bundle.tar.gz"), str(repo / "results")):
        checked, found = verify_published(target, repo / "nowhere")
        assert len(checked) == 1 and found == []


def test_compare_names_the_leaf_and_tells_types_apart():
    published = {"a": [1.0, {"b": None}], "c": True, "d": [1, 2]}
    assert compare(published, json.loads(json.dumps(published))) == []
    assert compare(published, {"a": [1.0, {"b": 0}], "c": 1, "d": [1]}) == [
        "a[1].b: published null, recomputed 0",
        "c: published true, recomputed 1",
        "d: published [1, 2], recomputed [1]",
    ]
    assert compare({"a": 1}, {}) == ['a: published 1, recomputed "(absent)"']


WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "vllm", "transformers", "datasets", "matplotlib", "jinja2"):
            raise ImportError(f"{name} is made unimportable")
sys.meta_path.insert(0, Refuse())
import suite.report
sys.exit(suite.report.verify())
"""


def test_verify_needs_neither_engine_nor_figures(repo):
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=repo, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_bundle_holds_what_would_be_published_and_verifies_elsewhere(repo, tmp_path, capsys):
    from suite import cli

    out = tmp_path / "sent.tar.gz"
    assert cli.main(["bundle", "desk-tiny", "--out", str(out)]) == 0
    assert "suite verify sent.tar.gz" in capsys.readouterr().out
    first = out.read_bytes()
    assert cli.main(["bundle", "desk-tiny", "--out", str(out)]) == 0 and out.read_bytes() == first
    with tarfile.open(out) as archive:
        names = {name for name in archive.getnames() if not name.startswith("results/desk-tiny/" + fakes.FINGERPRINT)}
        assert not names and not any(member.uname or member.mtime for member in archive.getmembers())
    shutil.rmtree(repo / "results")
    shutil.rmtree(repo / "runs")
    assert suite.report.verify(str(out), repo / "results") == 0
    assert cli.main(["bundle", "desk-tiny", "--out", str(tmp_path / "none.tar.gz")]) == 14
    assert not (tmp_path / "none.tar.gz").exists()
