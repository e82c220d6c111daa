"""The offline protocol on real engines: shared rollouts, numbers that evidence alone reproduces, kills and resumes."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("torch")

from small_models import ROLLOUT, TRAIN  # noqa: E402
from test_record import OneTask  # noqa: E402

from suite.errors import NotRunnable, UserError  # noqa: E402
from suite.measure.mismatch import SAMPLED_COLUMNS  # noqa: E402
from suite.protocols import offline  # noqa: E402
from suite.protocols.session import Session  # noqa: E402
from suite.record.evidence import flat  # noqa: E402
from suite.record.manifest import check_manifest  # noqa: E402
from suite.record.run import Run, find_runs, read_evidence  # noqa: E402
from suite.record.writer import open_run  # noqa: E402
from suite.spec.kinds import KINDS  # noqa: E402
from suite.spec.plan import Cell  # noqa: E402
from suite.spec.precision import unsaid_points  # noqa: E402

pytestmark = pytest.mark.engine

ARMS = {"bf16": ("bf16", "bf16"), "fp16": ("fp16", "fp16"), "bf16-fp32": ("fp32", "bf16")}  # train-rollout, values (rollout, train)


def cells(arms=("bf16", "fp16"), seeds=(0, 1), num_prompts=6, train=TRAIN):
    def settings(arm):
        rollout, trainer = ARMS[arm]
        return {
            "model": {"path": "baselines/desk/qwen2-1m", "id": None, "revision": None, "sha256": None, "family": "qwen2"},
            "data": {"id": "desk/sum-mod-100", "template": "desk", "num_prompts": num_prompts, "num_terms": [3, 6]},
            "rollout": ROLLOUT | {"engine": "hf", "samples_per_prompt": 2, "max_tokens": 60, "prompts_per_batch": 2},
            "train": train,
            "precision": {"rollout": rollout, "train": trainer},
        }

    return [Cell("t", 1, arm, (), seed, settings(arm)) for arm in arms for seed in seeds]


def run(root: Path, chosen, progress=lambda *a, **k: None, limit=None, protocol="offline_mismatch") -> dict[str, Run]:
    task = OneTask(protocol=protocol)

    def open_cell(cell):
        return open_run(root, task, cell, {"packages": {}}, "cpu", limit=limit)

    offline.run(chosen, Session(task, limit, progress, open_cell))
    return {found.record["cell"]["name"]: found for found in find_runs(root, "t")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("offline"), cells())


def test_one_load_of_vllm_serves_every_seed_and_trainer_of_a_sampler_precision(tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    from suite.engines.samplers.vllm import VllmSampler

    loads, init = [], VllmSampler.__init__
    monkeypatch.setattr(VllmSampler, "__init__", lambda self, *args: (loads.append(args[2]), init(self, *args))[1])
    chosen = [replace(cell, settings=cell.settings | {"rollout": cell.settings["rollout"] | {"engine": "vllm"}})
              for cell in cells(arms=("bf16-fp32",), seeds=(0, 1))]  # fmt: skip
    found = run(tmp_path, chosen)
    assert loads == ["fp32"] and all(one.status == "success" for one in found.values())
    for one in found.values():
        executed = one.record["precision_executed"]
        assert unsaid_points(KINDS["offline_mismatch"].must_say, executed) == [] and executed["sampler_engine"] == "vllm"
        assert one.record["weights"]["sha256"] and one.record["series_summary"]["k3_nats_per_token"] > 0


def test_data_or_weights_that_are_not_here_leave_no_failed_and_no_running_record(tmp_path):
    missing = (("model", {"path": "no/such/folder"}, NotRunnable, {"planned"}),
               ("data", {"kept": {"path": "no/such.json", "sha256": "0" * 64}}, (NotRunnable, UserError), {"planned", "failed"}))  # fmt: skip
    for section, change, error, left in missing:
        chosen = [replace(cell, settings=cell.settings | {section: cell.settings[section] | change}) for cell in cells(("fp16",))]
        with pytest.raises(error):
            run(tmp_path / section, chosen)
        assert {found.status for found in find_runs(tmp_path / section, "t")} <= left, section


def test_every_token_has_the_entropy_of_pi_where_it_was_drawn(finished):
    for found in finished.values():
        evidence = read_evidence(found.folder)
        entropies, logprobs = flat(evidence, "trainer_entropies"), flat(evidence, "trainer_logprobs")
        assert entropies.shape == logprobs.shape and (entropies > -1e-5).all() and (entropies <= np.log(64) + 1e-5).all()
        assert abs(entropies.mean() + logprobs.mean()) < 0.15, "mean -log pi of sampled tokens estimates the mean entropy"


def test_the_recorded_numbers_follow_from_the_evidence_with_a_few_lines_of_numpy(finished):
    for found in finished.values():
        rows = pq.read_table(found.folder / "evidence").to_pylist()
        mu = [np.array(row["rollout_logprobs"], float) for row in rows]
        pi = [np.array(row["trainer_logprobs"], float) for row in rows]
        r = np.concatenate(pi) - np.concatenate(mu)
        gap = np.abs(np.exp(np.concatenate(pi)) - np.exp(np.concatenate(mu)))
        lengths = np.array([len(m) for m in mu]) / 1000
        per_sequence = np.array([(p - m).sum() for p, m in zip(pi, mu, strict=True)])
        recorded = found.record["series_summary"]
        assert recorded["k3_nats_per_token"] == pytest.approx(np.mean(np.expm1(r) - r), rel=1e-9)
        assert recorded["prob_diff_mean"] == pytest.approx(gap.mean(), rel=1e-9)
        assert recorded["seq_kl_k1_nats"] == pytest.approx(-per_sequence.mean(), rel=1e-6, abs=1e-12)
        assert recorded["seq_slope_nats_per_1k_tokens"] == pytest.approx(np.polyfit(lengths, per_sequence, 1)[0], rel=1e-6)
        assert recorded["reward_mean"] == pytest.approx(np.mean([row["reward"] for row in rows]))
        assert found.record["counts"]["num_rollouts"] == 12 and check_manifest(found.folder) == []


def test_the_record_says_which_precision_ran_where(finished):
    for arm in ("bf16", "fp16"):
        executed = finished[f"{arm}.s0"].record["precision_executed"]
        for point in ("rollout_weights", "kv_cache", "rollout_logits", "compute", "trainer_head"):
            assert executed[point] == arm, point
        assert executed["arithmetic"] == "rounded-fp32-accumulate" and executed["checkpoint"] in ("fp32", "bf16")


def test_arms_with_one_seed_share_problems_and_another_seed_has_others(finished):
    prompts = {name: read_evidence(found.folder)["prompt_id"].to_pylist() for name, found in finished.items()}
    assert prompts["bf16.s0"] == prompts["fp16.s0"] != prompts["bf16.s1"]


def test_cells_that_differ_in_the_trainer_alone_share_their_rollouts(tmp_path):
    found = run(tmp_path, cells(("bf16", "bf16-fp32"), seeds=(0,)) + [
        Cell("t", 1, "fp32-fp32", (), 0, cells(("bf16-fp32",), (0,))[0].settings | {"precision": {"rollout": "fp32", "train": "fp32"}})
    ])  # fmt: skip
    a, b = read_evidence(found["bf16-fp32.s0"].folder), read_evidence(found["fp32-fp32.s0"].folder)
    assert a["token_ids"].equals(b["token_ids"]) and a["rollout_logprobs"].equals(b["rollout_logprobs"])
    assert not a["trainer_logprobs"].equals(b["trainer_logprobs"])
    assert found["fp32-fp32.s0"].record["series_summary"]["k3_nats_per_token"] < 1e-9


def test_an_accuracy_run_has_no_trainer_and_reports_no_mismatch(tmp_path):
    found = run(tmp_path, cells(("fp16",), (0,)), protocol="offline_accuracy")["fp16.s0"]
    assert set(found.record["series_summary"]) == {"response_tokens_mean", "reward_mean", "truncated_share"}
    evidence = read_evidence(found.folder)
    assert evidence["trainer_logprobs"].null_count == evidence.num_rows > 0 and tuple(found.summary) == SAMPLED_COLUMNS
    assert "k3_nats_per_token" not in found.metrics[0] and "compute" not in found.record["precision_executed"]


CHILD = """
import sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
import test_offline
test_offline.run(Path({root!r}), test_offline.cells(), progress=lambda name, done, total, note="": print(name, done, flush=True))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_finishes_the_rest_and_repeats_nothing(finished, tmp_path, how):
    code = CHILD.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for _ in range(3):
        child.stdout.readline()
    child.send_signal(how)
    child.communicate()
    complete = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("part-*.parquet")}
    assert complete, "something was complete before the stop"
    resumed = run(tmp_path, cells())
    assert all(path.stat().st_mtime_ns == written for path, written in complete.items()), "complete parts were not touched"
    for name, found in resumed.items():
        assert found.status == "success"
        assert read_evidence(found.folder)["token_ids"].equals(read_evidence(finished[name].folder)["token_ids"])
    before = json.dumps([found.record for found in resumed.values()], sort_keys=True)
    assert json.dumps([found.record for found in run(tmp_path, cells()).values()], sort_keys=True) == before


def test_a_limited_run_uses_fewer_prompts_and_is_never_found_for_grading(tmp_path):
    assert run(tmp_path, cells(("fp16",), (0,)), limit=1) == {}
    record = json.loads(next(tmp_path.rglob("record.json")).read_text())
    assert record["limit"] == 1 and record["counts"]["num_prompts"] == 1
