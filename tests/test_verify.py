"""`suite verify` recomputes what is published and names every difference; nothing changed or stale gets through."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import published as fakes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from suite.archive.publishing import compute_verdict, publish_task
from suite.archive.ties import _algorithm as untied_algorithm
from suite.archive.verifying import compare, verify_published
from suite.files import json_safe, write_json
from suite.record.manifest import write_manifest
from suite.record.run import Run
from suite.report import verbs as report_verbs
from suite.spec.algorithms import resolve
from suite.spec.plan import Cell
from suite.spec.reading import load_task


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
    return verify_published(target, repo / "results").differences


def change_verdict(repo, change):
    """Edit the published verdict and make the manifest agree, as somebody would who means to deceive."""
    path = folder_of(repo) / "verdict.json"
    verdict = json.loads(path.read_text())
    change(verdict)
    path.write_text(json.dumps(verdict))
    write_manifest(folder_of(repo))


def test_what_was_just_published_verifies(repo, capsys):
    assert report_verbs.verify(None, repo / "results") == 0
    assert "1 published verdicts recomputed, 0 differences" in capsys.readouterr().out
    assert report_verbs.verify("desk-tiny", repo / "results") == 0


def test_the_page_of_a_published_task_has_its_place_and_no_other_page_has(repo):
    folder = repo / "results" / "pages"
    folder.mkdir(exist_ok=True)
    (folder / "desk-tiny.html").write_text("a page, which `report --check` compares")
    assert report_verbs.verify(None, repo / "results") == 0
    for name in ("desk-other.html", "desk-tiny.htm", "desk-tiny", "bench.html"):
        (folder / name).write_text("x")
        assert report_verbs.verify(None, repo / "results") == 1, name
        (folder / name).unlink()


def test_nothing_published_is_exit_14(repo):
    assert report_verbs.verify("no-such-task", repo / "results") == 14
    shutil.rmtree(repo / "results")
    assert report_verbs.verify(None, repo / "results") == 14


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
    assert report_verbs.verify(None, repo / "results") == 1


def test_rounding_below_1e_9_is_no_difference(repo):
    change_verdict(repo, lambda v: v["claims"][0].update(estimate=v["claims"][0]["estimate"] * (1 + 1e-11)))
    assert differences(repo) == []


def test_changed_sums_are_found_by_hash_and_with_another_hash_by_metrics_and_verdict(repo):
    path = next(folder_of(repo).glob("bf16*/*/evidence_summary.parquet"))
    table = pq.read_table(path)
    table = table.set_column(table.column_names.index("sum_k3"), "sum_k3", pa.array(np.asarray(table["sum_k3"]) * 2))
    pq.write_table(table, path)
    by_hash, not_recomputed = differences(repo)
    assert "evidence_summary.parquet: sha256" in by_hash and "not recomputed, since 1 files" in not_recomputed
    write_manifest(folder_of(repo))
    found = differences(repo)
    assert any("k3_nats_per_token: metrics add up to" in line for line in found)
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
    assert report_verbs.verify(None, repo / "results") == 1


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
        archive.add(repo / "results" / "desk-tiny", "results/desk-tiny")
    for target in (str(tmp_path / "bundle.tar.gz"), str(repo / "results"), str(repo)):
        found = verify_published(target, repo / "nowhere")
        assert len(found.checked) == 1 and found.differences == []


def test_compare_names_the_leaf_and_tells_types_apart():
    published = {"a": [1.0, {"b": None}], "c": True, "d": [1, 2]}
    assert compare(published, json.loads(json.dumps(published))) == []
    assert compare(published, {"a": [1.0, {"b": 0}], "c": 1, "d": [1]}) == [
        "a[1].b: published null, recomputed 0",
        "c: published true, recomputed 1",
        "d: published [1, 2], recomputed [1]",
    ]
    assert compare({"a": 1}, {}) == ['a: published 1, recomputed "(absent)"']


# --- records are claims, the task is the law: edits by hand with manifest and verdict made to agree -------------------


def reseal(repo):
    """Verdict and manifest made anew from what lies there: only the records can still give an edit away."""
    write_json(folder_of(repo) / "verdict.json", compute_verdict(load_task("desk-tiny"), fakes.FINGERPRINT, repo / "results"))
    write_manifest(folder_of(repo))


def edit(repo, change, cell="bf16.s1"):
    """Change one published record; a function that returns a path says where its folder moves to."""
    path = next(folder_of(repo).glob(f"{cell}/*/record.json"))
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    reseal(repo)


def setting(section, name, value):
    return lambda record: record["cell"]["settings"][section].update({name: value})


@pytest.mark.parametrize("change, words", [
    (setting("rollout", "temperature", 0.2), ["run_key", "its settings give"]),
    (lambda r: r.update(status="bogus"), ["status: found 'bogus'"]),
    (lambda r: r.update(status="killed"), ["status: found killed", "evidence summary"]),
    (lambda r: r.update(limit=5), ["limit: found 5"]),
    (lambda r: r.update(precision_asked={}), ["precision_asked: found {}"]),
    (lambda r: r.update(weights={"sha256": "b" * 64}), ["weights.sha256: found bbb", "the task pins aaa"]),
    (lambda r: r["task"].update(text=r["task"]["text"].replace("accept: [16.0", "accept: [1.0")), ["task.text: another text"]),
    (lambda r: r["environment"].update(torch_build="cuda", gpus=[{"name": "H100"}]), ["fingerprint", "gpu-h100-1x"]),
    (lambda r: r["series_summary"].update(k3_nats_per_token=1e-9), ["k3_nats_per_token: series_summary says"]),
    (lambda r: r["counts"].update(num_rollouts=10_000), ["num_rollouts: counts say 10000"]),
    (lambda r: r["cell"].update(seed=7), ["run_key", "seed"]),
    (lambda r: r["cell"].update(arm="fp16"), ["arm, grid point, seed"]),
])  # fmt: skip
def test_a_record_that_does_not_follow_from_its_task_or_machine_is_named(repo, change, words):
    edit(repo, change)
    found = "\n".join(line for line in differences(repo) if "bf16.s1" in line)
    assert all(word in found for word in words), found


@pytest.mark.parametrize("key", ["version", "grade_version", "the file"])
def test_a_stale_folder_is_still_held_against_its_own_machine(repo, key):
    """Old records may be those of another task by now, but never of another machine or of other settings than they say."""
    edit(repo, lambda record: record.update(precision_asked={}))
    if key == "the file":
        (repo / "tasks" / "desk" / "desk-tiny.yaml").unlink()
    else:
        fakes.checkout(repo, fakes.TASK.replace(f"\n{key}: 1", f"\n{key}: 2"))
    folder_of(repo).rename(folder_of(repo).with_name("gpu-h100-8x"))
    found = differences(repo)
    assert sum("its folder is gpu-h100-8x" in line for line in found) == 6 and any("precision_asked: found {}" in line for line in found)


@pytest.mark.parametrize("key", ["sync_floor", "timings", "algorithm"])
def test_a_value_of_another_type_is_named_with_its_key(repo, key):
    path = next(folder_of(repo).glob("bf16.s1/*/record.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: {"k3": {}}}))
    write_manifest(folder_of(repo))
    assert any(f"record.json: {key}.k3" in line for line in differences(repo))


def test_the_row_of_the_loss_follows_from_the_settings():
    """Whatever a record says of the algorithm that ran; a key that rows did not have then is no difference."""
    settings = {"name": "PG-Seq-TIS", "cap": 5.0, "clip_low": None, "shuffle_rewards": False}
    ran = json_safe(resolve("PG-Seq-TIS", cap=5.0).settings())

    def lines(said):
        return list(untied_algorithm(Run(Path("x"), {"algorithm": said, "cell": {"settings": {"algorithm": settings}}}, [], None)))

    assert not lines(ran) and not lines({key: ran[key] for key in ("name", "cap")}) and not lines(None)
    assert lines(ran | {"cap": 2.0}) == ["algorithm.cap: found 2.0, its settings give 5.0"]
    assert lines(ran | {"advantage": None}) and lines(ran | {"correction": "mask"})


def test_a_seed_or_an_arm_that_the_task_does_not_have_is_named(repo):
    source = next(folder_of(repo).glob("bf16.s1/*"))
    for arm, seed, word in (("bf16", 9, "bf16 has the seeds 0, 1, 2, not 9"), ("best", 0, "it has the arms bf16, fp16")):
        record = json.loads((source / "record.json").read_text())
        record["cell"] |= {"name": f"{arm}.s{seed}", "arm": arm, "seed": seed}
        cell = Cell("desk-tiny", 1, arm, (), seed, record["cell"]["settings"])
        target = folder_of(repo) / cell.name / cell.run_key()[:12]
        shutil.copytree(source, target)
        (target / "record.json").write_text(json.dumps(record | {"run_key": cell.run_key()}))
        reseal(repo)
        assert any(word in line for line in differences(repo))


def test_planned_cells_that_are_not_there_are_listed(repo):
    shutil.rmtree(folder_of(repo) / "bf16.s2")
    reseal(repo)
    found = verify_published(None, repo / "results")
    assert any("1 of 6 planned cells are not there: bf16.s2" in line for line in found.remarks)


def test_an_attempt_left_out_is_found(repo):
    place = next((folder_of(repo) / "bf16.s2").iterdir())
    place.rename(place.with_name(f"{place.name}.2"))
    reseal(repo)
    assert any("attempt 1 is not there, attempt 2 is" in line for line in differences(repo))


def change_metrics(repo, change, cell="bf16.s1"):
    path = next(folder_of(repo).glob(f"{cell}/*/metrics.jsonl.gz"))
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    rows = change(rows) or rows
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    reseal(repo)


@pytest.mark.parametrize("change, word", [
    (lambda rows: rows[0].update(reward_mean=0.123), "reward_mean: metrics add up to"),
    (lambda rows: rows[0].update(k3_nats_per_token=1e-7), "k3_nats_per_token: metrics add up to"),
    (lambda rows: rows[0].update(num_rollouts=3), "num_rollouts: metrics add up to 3"),
    (lambda rows: rows[0].update(step=4), "step: found 4"),
    (lambda rows: rows[0].update(prob_diff_max=0.9), "prob_diff_max"),
    (lambda rows: rows * 2, "num_rollouts: metrics add up to 96"),
    (lambda rows: [{}], "num_rollouts is not a count"),
])  # fmt: skip
def test_metrics_that_contradict_the_sums_are_named(repo, change, word):
    change_metrics(repo, change)
    assert any(word in line and "bf16.s1" in line for line in differences(repo))


@pytest.mark.parametrize("column, change, word", [
    ("sum_reward", lambda x: x * 0 + 24.0, "sum_reward"), ("num_rewarded", lambda x: x * 2, "num_rewarded"),
    ("sum_k3", lambda x: -x, "negative"), ("num_response_tokens", lambda x: x + 4000, "max_tokens"),
])  # fmt: skip
def test_sums_that_no_rollouts_add_up_to_are_named(repo, column, change, word):
    path = next(folder_of(repo).glob("bf16.s1/*/evidence_summary.parquet"))
    table = pq.read_table(path)
    table = table.set_column(table.column_names.index(column), column, pa.array(change(np.asarray(table[column]))))
    pq.write_table(table, path)
    reseal(repo)
    assert any(word in line for line in differences(repo))


def test_a_finished_run_without_sums_is_named(repo):
    next(folder_of(repo).glob("bf16.s1/*/evidence_summary.parquet")).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("suite.archive.verifying._verdict_differences", lambda *_: [])
        write_manifest(folder_of(repo))
        assert any("no evidence_summary.parquet" in line for line in differences(repo))


@pytest.mark.parametrize("name, word", [("plot_points.parquet", "no plot_points.parquet"), ("record.json", "without its record"),
                                        ("metrics.jsonl.gz", "num_rollouts: metrics add up to 0")])  # fmt: skip
def test_a_run_of_which_a_file_is_left_out_is_named(repo, name, word):
    next(folder_of(repo).glob(f"bf16.s1/*/{name}")).unlink()
    reseal(repo)
    assert any(word in line for line in differences(repo))


def test_points_that_hold_other_tokens_are_named(repo):
    a, b = (next(folder_of(repo).glob(f"{cell}/*/plot_points.parquet")) for cell in ("bf16.s1", "bf16.s2"))
    shutil.copyfile(b, a)
    reseal(repo)
    assert any("plot_points, by_position" in line for line in differences(repo))


@pytest.mark.parametrize("key", ["suite_evil", "note", "Verdict"])
def test_a_key_that_no_verdict_has_is_found(repo, key):
    change_verdict(repo, lambda v: v.update({key: 1}) or v["suite"].update(version="9.9", by="me"))
    found = differences(repo)
    assert len(found) == 2 and any(f"{key}: published 1" in line for line in found) and any("suite.by" in line for line in found)


# --- files that have no place there ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "results/evil.html", "results/desk-tiny/notes.txt", "results/bench/free.json", "results/bench/table.md",
    "{folder}/checkpoint/x", "{folder}/running.lock", "{folder}/bf16.s0/MANIFEST.sha256", "{folder}/.hidden",
])  # fmt: skip
def test_a_file_that_is_not_published_is_named_wherever_it_lies(repo, name):
    path = repo / name.format(folder=folder_of(repo).relative_to(repo))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    assert any(path.name in line for line in differences(repo))


@pytest.mark.parametrize("make, word", [
    (lambda path: os.mkfifo(path), "a FIFO"), (lambda path: os.symlink("/dev/zero", path), "a link"),
    (lambda path: os.mkdir(path), ""),
])  # fmt: skip
@pytest.mark.parametrize("name", ["record.json", "metrics.jsonl.gz", "verdict.json", "extra"])
def test_what_is_no_file_is_named_and_never_waited_for(repo, make, word, name):
    path = folder_of(repo) / name if name == "verdict.json" else next(folder_of(repo).glob("bf16.s1/*")) / name
    path.unlink(missing_ok=True)
    make(path)
    if name != "extra" or word:  # an empty folder more says nothing
        assert any(str(path.parent) in line and name in line and word in line for line in differences(repo))


def test_a_damaged_folder_hides_no_other(repo):
    """Two folders broken in different ways: both are told of, and what is whole in them is still checked."""
    other = folder_of(repo).with_name("gpu-other")
    shutil.copytree(folder_of(repo), other)
    (folder_of(repo) / "verdict.json").write_bytes(b"{")
    next(other.glob("bf16.s0/*/metrics.jsonl.gz")).write_bytes(b"\x1f\x8b junk")
    found = differences(repo)
    assert any(str(folder_of(repo)) in line and "verdict.json: sha256" in line for line in found)
    assert any("gpu-other" in line and "metrics.jsonl.gz: sha256" in line for line in found)
    assert sum("gpu-other" in line and "fingerprint: found" in line for line in found) == 5


@pytest.mark.parametrize("line", ["nonsense", f"{'0' * 64}  ../../x", f"{'0' * 64} verdict.json", f"{'Z' * 64}  verdict.json", "\0"])
def test_a_manifest_that_is_none_is_named_by_line(repo, line):
    path = folder_of(repo) / "MANIFEST.sha256"
    path.write_text(path.read_text() + line + "\n")
    assert any("MANIFEST.sha256: line" in found for found in differences(repo))


BROKEN = {"[]": "list", "{}": "nothing", "\xff": "utf-8", "[" * 99_999: "Recursion", '{"schema": 1, "schema": 1}': "twice", "": "JSON"}


@pytest.mark.parametrize("text", BROKEN, ids=BROKEN.values())
def test_damaged_records_and_verdicts_are_one_line_with_the_file_and_exit_2(repo, text, capsys):
    """compare, show and report --check read published files too."""
    from suite.cli import main as cli

    (repo / "baselines").mkdir()
    (repo / "baselines" / "paper.yaml").write_text("C1:\n  title: the first claim\n")
    for path in (next(folder_of(repo).glob("bf16.s1/*/record.json")), folder_of(repo) / "verdict.json"):
        whole = path.read_bytes()
        path.write_bytes(text.encode("latin-1"))
        commands = [["compare", str(path.parent), str(path.parent)], ["report", "--check"], ["show", "C1"]]
        for command in commands if path.name == "verdict.json" else commands[:2]:
            assert cli.main(command) == 2, command
            said = capsys.readouterr().err
            assert str(path) in said and BROKEN[text] in said and said.count("\n") == 1
        path.write_bytes(whole)


WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "vllm", "transformers", "datasets", "matplotlib", "jinja2"):
            raise ImportError(f"{name} is made unimportable")
sys.meta_path.insert(0, Refuse())
from suite.report import verbs as report_verbs
sys.exit(report_verbs.verify())
"""


def test_verify_needs_neither_engine_nor_figures(repo):
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=repo, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_bundle_holds_what_would_be_published_and_verifies_elsewhere(repo, tmp_path, capsys):
    from suite.cli import main as cli

    out = tmp_path / "sent.tar.gz"
    assert cli.main(["bundle", "desk-tiny", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "suite verify sent.tar.gz" in said and f"machine: {fakes.FINGERPRINT}" in said and "26 files" in said
    first = out.read_bytes()
    assert cli.main(["bundle", "desk-tiny", "--out", str(out)]) == 0 and out.read_bytes() == first
    with tarfile.open(out) as archive:
        names = {name for name in archive.getnames() if not name.startswith("results/desk-tiny/" + fakes.FINGERPRINT)}
        assert not names and not any(member.uname or member.mtime for member in archive.getmembers())
    shutil.rmtree(repo / "results")
    shutil.rmtree(repo / "runs")
    assert report_verbs.verify(str(out), repo / "results") == 0
    assert cli.main(["bundle", "desk-tiny", "--out", str(tmp_path / "none.tar.gz")]) == 14
    assert not (tmp_path / "none.tar.gz").exists()
