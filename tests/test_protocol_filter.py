"""The filter, on a sampler whose answers are known; kept sets and what reads them."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from suite.engines.batch import Request, Rollout, request_seed
from suite.errors import DataError, NotRunnable
from suite.grade.verdict import grade_task
from suite.measure.mismatch import SAMPLED_COLUMNS
from suite.problems.data import load_prompts
from suite.problems.desk import TEMPLATE_END
from suite.problems.kept import KeptProblem, in_band, problem_texts, read_kept, write_kept
from suite.protocols import filter
from suite.protocols.engine_pool import reward_pool
from suite.protocols.session import Session
from suite.record.manifest import check_manifest
from suite.record.run import read_evidence, read_run
from suite.record.writer import open_run
from suite.spec.checkout import find_repo
from suite.spec.plan import plan
from suite.spec.reading import load_task

NUM_SAMPLES = 40
SOLVED = (0, 7, 8, 20, 32, 33, 40)  # correct responses of problem 0, 1, ...; 8 and 32 of 40 are the ends of the band


class KnownEngines:
    """Answers problem i right in its first SOLVED[i] samples; a response is the sample's number and an end token."""

    samples_per_prompt = NUM_SAMPLES

    def __init__(self, prompts):
        self.place = {prompt.prompt_id: i for i, prompt in enumerate(prompts)}
        self.sampler, self.batches = self, 0

    def requests(self, prompts, *seed_parts):
        return [
            Request(prompt.prompt_id, sample, (1, 2, 3), request_seed(*seed_parts, prompt.prompt_id, sample))
            for prompt in prompts
            for sample in range(NUM_SAMPLES)
        ]

    def sample(self, requests):
        self.batches += 1
        return [Rollout(r, [r.sample_id, 99], np.array([-0.5, -0.1], np.float32), "stop") for r in requests]

    def reward(self, rollouts, prompts):
        return [float(r.request.sample_id < SOLVED[self.place[r.request.prompt_id]]) for r in rollouts]

    weights = {"sha256": "0" * 64, "revision": None}

    def executed(self):
        return {"rollout_weights": "fp32", "kv_cache": "fp32", "rollout_logits": "fp32"}


@pytest.fixture
def cell():
    (cell, *_) = plan(load_task(find_repo() / "tasks" / "desk" / "desk-sanity-filter.yaml"))
    data = cell.settings["data"] | {"num_prompts": len(SOLVED), "reference": None}
    rollout = cell.settings["rollout"] | {"prompts_per_batch": 3}
    return replace(cell, settings=cell.settings | {"data": data, "rollout": rollout})


def run_filter(tmp_path, cell, stop_after: int | None = None):
    """(the finished run or None, engines) of one cell; `stop_after` breaks off like a kill after so many batches."""
    task = load_task(find_repo() / "tasks" / "desk" / "desk-sanity-filter.yaml")
    prompts = load_prompts(cell.settings["data"], cell.seed)
    engines, seen = KnownEngines(prompts), []

    def progress(*args):
        seen.append(args)
        if len(seen) == stop_after:
            raise KeyboardInterrupt

    writer = open_run(tmp_path, task, cell, {}, "cpu-test")
    session = Session(task, None, progress, lambda cell: writer)
    try:
        filter.sample_all(cell, prompts, writer, engines, session)
    except KeyboardInterrupt as stop:
        writer.fail("filter", stop)
        return None, engines
    filter.finish(cell, prompts, writer)
    return read_run(writer.folder), engines


def test_the_band_is_kept_with_both_of_its_ends(tmp_path, cell):
    run, engines = run_filter(tmp_path, cell)
    kept = read_kept(run.folder / filter.KEPT_NAME)
    assert [one.num_correct for one in kept] == [8, 20, 32] and engines.batches == 3
    prompts = load_prompts(cell.settings["data"])
    assert [one.problem for one in kept] == [prompts[i].meta["problem"] for i in (2, 3, 4)]
    found = run.record["series_summary"]
    assert (found["num_problems"], found["num_kept"], found["kept_share"]) == (7, 3, pytest.approx(3 / 7))
    assert found["accuracy_of_kept"] == pytest.approx(0.5) and found["reward_mean"] == pytest.approx(20 / 40)
    assert "num_overlap" not in found and check_manifest(run.folder) == []
    assert read_evidence(run.folder)["trainer_logprobs"].null_count == 7 * 40 and tuple(run.summary) == SAMPLED_COLUMNS


def test_a_killed_filter_goes_on_and_keeps_the_same_set(tmp_path, cell):
    whole, _ = run_filter(tmp_path / "a", cell)
    assert run_filter(tmp_path / "b", cell, stop_after=1)[0] is None
    resumed, engines = run_filter(tmp_path / "b", cell)
    assert engines.batches == 2
    assert (resumed.folder / filter.KEPT_NAME).read_bytes() == (whole.folder / filter.KEPT_NAME).read_bytes()


def test_the_overlap_counts_problems_of_the_reference_by_their_text(tmp_path, cell):
    prompts = load_prompts(cell.settings["data"])
    wanted = [KeptProblem(f"other-{i}", prompts[i].meta["problem"], ("1",), 20) for i in (1, 2, 3)]
    spec = put_kept(tmp_path / "reference.json", wanted)
    changed = replace(cell, settings=cell.settings | {"data": cell.settings["data"] | {"reference": spec}})
    found = run_filter(tmp_path, changed)[0].record["series_summary"]
    assert (found["num_reference"], found["num_overlap"]) == (3, 2) and found["overlap_share"] == pytest.approx(2 / 3)


def test_a_reference_that_is_not_here_is_said_and_counts_nothing(tmp_path, cell):
    spec = {"path": str(tmp_path / "nothing.json"), "name": None, "id": None, "sha256": "unknown"}
    changed = replace(cell, settings=cell.settings | {"data": cell.settings["data"] | {"reference": spec}})
    run, _ = run_filter(tmp_path, changed)
    assert "no such file" in run.record["reference_missing"] and "num_overlap" not in run.record["series_summary"]


def test_counts_of_a_filter_are_graded_from_the_run_as_a_whole(tmp_path):
    """Not from its parts, of which there are several."""
    task = load_task(find_repo() / "tasks" / "desk" / "desk-sanity-filter.yaml")
    task = task.model_copy(update={"data": task.data.model_copy(update={"num_prompts": len(SOLVED), "reference": None})})
    run, _ = run_filter(tmp_path, plan(task)[0])
    rows = {row["id"]: row for row in grade_task(task, [run])["claims"]}
    assert rows["C5-kept"]["estimate"] == 3 and rows["C5-accuracy"]["estimate"] == pytest.approx(0.5)
    assert rows["C5-overlap"]["estimate"] is None and rows["C5-overlap"]["verdict"] == "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("num_correct", "num_samples", "kept"),
    [(2, 10, True), (1, 5, True), (7, 35, True), (3, 10, True), (1, 10, False), (9, 10, False), (6, 35, False)],
)
def test_the_ends_of_the_band_do_not_depend_on_binary_fractions(num_correct, num_samples, kept):
    assert in_band(num_correct, num_samples, (0.2, 0.8)) is kept


# --- kept sets ------------------------------------------------------------------------------------------------------


def put_kept(path, problems) -> dict:
    write_kept(path, problems, task="t", samples_per_prompt=40)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"path": str(path), "name": None, "id": None, "sha256": sha256}


PROBLEMS = [KeptProblem(f"p{i}", f"Sum mod 100: a{i}", (str(i),), 20) for i in range(4)]


def test_training_prompts_come_from_the_kept_set_in_its_order(tmp_path):
    data = {"template": "desk", "kept": put_kept(tmp_path / "kept.json", PROBLEMS), "num_prompts": 3}
    prompts = load_prompts(data, seed=5)
    assert [one.prompt_id for one in prompts] == ["p0", "p1", "p2"] and prompts[2].gold == ("2",)
    assert prompts[1].text == "Sum mod 100: a1" + TEMPLATE_END and prompts == load_prompts(data, seed=6)


def test_another_kept_set_is_refused_and_so_are_more_problems_than_it_has(tmp_path):
    spec = put_kept(tmp_path / "kept.json", PROBLEMS)
    with pytest.raises(DataError, match="data.num_prompts: found 5, allowed: at most 4"):
        load_prompts({"template": "desk", "kept": spec, "num_prompts": 5})
    with pytest.raises(DataError, match="sha256: found"):
        load_prompts({"template": "desk", "kept": spec | {"sha256": "0" * 64}})


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2, "problems": []}', '{"schema": 1, "problems": [{"x": 1}]}'])
def test_a_file_that_is_no_kept_set_is_refused(tmp_path, text):
    path = tmp_path / "kept.json"
    path.write_text(text)
    with pytest.raises(DataError, match=str(path)):
        read_kept(path)


def test_the_same_kept_set_is_the_same_bytes(tmp_path):
    put_kept(tmp_path / "a.json", PROBLEMS)
    put_kept(tmp_path / "b.json", PROBLEMS)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text())["problems"][0]["gold"] == ["0"]
    assert read_kept(tmp_path / "a.json") == PROBLEMS


def test_a_published_reference_is_looked_for_where_data_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SUITE_DATA_DIR", str(tmp_path))
    with pytest.raises(NotRunnable, match="math.parquet"):
        problem_texts({"path": None, "name": "math.parquet", "id": "somebody/something", "sha256": "unknown"})


def test_a_seed_in_the_data_wins_over_the_launch_seed():
    data = {"template": "desk", "num_prompts": 2, "num_terms": (4, 6), "seed": 3}
    assert load_prompts(data, seed=0) == load_prompts(data, seed=1) == load_prompts(data | {"seed": None}, seed=3)


def test_the_rule_for_truncated_responses_reaches_the_grader():
    for rule in (True, None):
        with reward_pool({"template": "desk", "zero_truncated": rule}) as pool:
            (found,) = pool.score(["</think>\\boxed{3}"], ["3"], [True])
        assert found.value == (0.0 if rule else 1.0)
