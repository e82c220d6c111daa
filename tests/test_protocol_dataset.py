"""The protocol `dataset` on a file whose counts are known by hand, and on the published one."""

import hashlib
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from suite.errors import DataError, NotRunnable
from suite.problems.data import INSTRUCTION
from suite.protocols.dataset import find_tokenizer, measure_dataset, run, variants
from suite.protocols.session import Session
from suite.record.run import read_metrics, read_run
from suite.record.writer import open_run
from suite.spec.checkout import find_repo
from suite.spec.estimands import DATASET_ESTIMANDS
from suite.spec.estimands import ESTIMANDS as MISMATCH_ESTIMANDS
from suite.spec.plan import plan
from suite.spec.reading import load_task
from suite.spec.validate import check


def verl_row(problem: str, gold: str) -> dict:
    turn = {"role": "user", "content": problem + INSTRUCTION}
    return {"prompt": [turn], "reward_model": {"ground_truth": gold, "style": "rule"}}


# 1/2 is a number bare and boxed, \sqrt{2} only boxed.
ROWS = [("a", "1/2"), ("a", "1/2"), ("bb", "\\sqrt{2}"), ("a", "1/2"), ("ccc", "\\sqrt{2}")]
COUNTS = {
    "num_files_pinned": 1,
    "num_rows": 5,
    "num_unique": 3,
    "num_unique_problems": 3,
    "copies_min": 1,
    "copies_max": 3,
    "num_blocks": 4,  # aa, bb, a, ccc
    "num_parse_bare": 1,
    "num_parse_boxed": 3,
    "num_parse_expression": 3,
    "num_self_verified": 3,
    "num_golds_graders_differ": 0,
    "num_variants": 0,
    "num_variants_graders_differ": 0,
    "num_variants_mathd_sympy_differs": 0,
    "num_variants_oat_differs": 0,
    "gold_chars_max": 8,
    "prompt_chars_mean": len(INSTRUCTION) + 2,
    "prompt_chars_max": len(INSTRUCTION) + 3,
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    path = tmp_path / "set.parquet"
    pq.write_table(pa.Table.from_pylist([verl_row(*row) for row in ROWS]), path)
    monkeypatch.setenv("SUITE_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"id": "somebody/something", "template": "verl_r1", "files": [{"name": "set.parquet", "sha256": sha256}]}


@pytest.fixture
def cell(data):
    (cell,) = plan(load_task(find_repo() / "tasks" / "paper" / "sanity-data.yaml"))
    cell.settings.update(data=data, model=None)
    return cell


def session_of(cell, runs_dir, limit=None, seen=None):
    task = load_task(find_repo() / "tasks" / "paper" / "sanity-data.yaml")

    def open_cell(cell):
        return open_run(runs_dir, task, cell, {}, "cpu-test", limit=limit, evidence_parts=False)

    def progress(name, done, total, note=""):
        (seen if seen is not None else []).append((done, note))

    return Session(task, limit, progress, open_cell)


def test_counts_of_a_small_file(data):
    assert measure_dataset(data, num_workers=1) == COUNTS


def test_a_file_without_a_named_hash_is_not_pinned(data):
    data["files"][0]["sha256"] = "unknown"
    assert measure_dataset(data, num_workers=1)["num_files_pinned"] == 0


def test_limit_takes_the_first_problems_with_all_their_copies(data):
    counts = measure_dataset(data, limit=1, num_workers=1)
    assert (counts["num_rows"], counts["num_unique"], counts["copies_max"]) == (3, 1, 3)


def test_an_answer_that_cannot_be_graded_is_counted(data, tmp_path):
    rows = [verl_row("a", "}"), verl_row("b", "?"), verl_row("c", "7")]  # nothing, mere text, a number
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hard.parquet")
    counts = measure_dataset(data | {"files": [{"name": "hard.parquet"}]}, num_workers=1)
    assert (counts["num_unique"], counts["num_parse_boxed"], counts["num_parse_expression"]) == (3, 2, 1)
    assert counts["num_self_verified"] == 2


def test_graders_differ_over_variants_that_are_known(data, tmp_path):
    golds = ["\\frac{1}{3}", "-26", "10001_2", "1, 2", "(1, 2)"]
    assert variants(golds) == [
        ("\\frac{1}{3}", "1/3"),
        ("\\frac{1}{3}", "0.333333"),  # right for OAT alone: math-verify rounds to six places
        ("-26", "-26\\%"),
        ("1, 2", "2, 1"),  # wrong for VeRL alone: it compares text
        ("(1, 2)", "(2, 1)"),
        ("10001_2", "10001_{3}"),  # right for OAT alone: math-verify drops the base
        ("-26", "-25"),
    ]
    pq.write_table(pa.Table.from_pylist([verl_row(gold, gold) for gold in golds]), tmp_path / "known.parquet")
    counts = measure_dataset(data | {"files": [{"name": "known.parquet"}]}, num_workers=1)
    assert {name: counts[name] for name in counts if "differ" in name or name == "num_variants"} == {
        "num_golds_graders_differ": 0,
        "num_variants": 7,
        "num_variants_graders_differ": 3,
        "num_variants_mathd_sympy_differs": 1,
        "num_variants_oat_differs": 2,
    }


def test_token_lengths_with_a_tokenizer_at_hand(data, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(".", "isolated")  # pieces between full stops, and the stops
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert find_tokenizer(str(tmp_path), None) == tmp_path / "tokenizer.json"
    assert find_tokenizer(str(tmp_path / "nowhere"), None) is None and find_tokenizer(None, None) is None
    counts = measure_dataset(data, tokenizer_file=tmp_path / "tokenizer.json", num_workers=1)
    # "...{problem} ... \\boxed{}" "." "\n<...>"
    assert (counts["prompt_tokens_mean"], counts["prompt_tokens_max"], counts["num_prompts_over_limit"]) == (3, 3, 0)


def test_a_run_writes_one_row_and_is_not_repeated(cell, tmp_path):
    seen = []
    run([cell], session_of(cell, tmp_path / "runs", seen=seen))
    folder = next((tmp_path / "runs").rglob("record.json")).parent
    (row,) = read_metrics(folder)
    assert row == {"step": 0, **COUNTS}
    finished = read_run(folder)
    assert finished.status == "success" and finished.record["counts"]["num_prompts"] == 3
    assert finished.record["series_summary"]["num_rows"] == 5
    run([cell], session_of(cell, tmp_path / "runs", seen=seen))
    assert seen[-1] == (1, "complete already") and len(list((tmp_path / "runs").rglob("record.json"))) == 1


def test_another_or_a_missing_file_opens_no_run(cell, data, tmp_path):
    session = session_of(cell, tmp_path / "runs")
    data["files"][0]["sha256"] = "0" * 64
    with pytest.raises(DataError, match="0" * 64):
        run([cell], session)
    data["files"][0]["name"] = "gone.parquet"
    with pytest.raises(NotRunnable, match="SUITE_DATA_DIR.*somebody/something"):
        run([cell], session)
    assert not (tmp_path / "runs").exists()


def test_what_is_measured_is_what_tasks_may_name(data, tmp_path):
    tokens = {"prompt_tokens_mean", "prompt_tokens_max", "num_prompts_over_limit"}
    assert set(COUNTS) | tokens == set(DATASET_ESTIMANDS)
    assert not set(DATASET_ESTIMANDS) & set(MISMATCH_ESTIMANDS)


def test_the_task_is_valid():
    task = load_task(find_repo() / "tasks" / "paper" / "sanity-data.yaml")
    assert check(task) == ([], [])
    assert {grade.estimand for grade in task.grade.values()} <= set(DATASET_ESTIMANDS)


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("SUITE_DATA_DIR"), reason="SUITE_DATA_DIR is not set: the authors' files are not here"
)
def test_the_published_set_lies_in_every_accept_region():
    task = load_task(find_repo() / "tasks" / "paper" / "sanity-data.yaml")
    (cell,) = plan(task)
    counts = measure_dataset(cell.settings["data"])
    for name, grade in task.grade.items():
        if grade.accept is not None:
            assert grade.accept[0] <= counts[grade.estimand] <= grade.accept[1], name
    assert counts["num_parse_bare"] == 1300
