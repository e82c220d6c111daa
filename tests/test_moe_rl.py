"""The RL loop with the MoE trainer: killed and resumed bit for bit, and bound to the sampler's experts where the task says so."""

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from small_models import OPTIMIZER  # noqa: E402
from test_rl import kill_and_resume, run, series  # noqa: E402

from suite.engines.samplers.hf import HfSampler  # noqa: E402
from suite.errors import UserError  # noqa: E402
from suite.record.run import find_runs, read_evidence  # noqa: E402

pytestmark = pytest.mark.engine

MIXTURE = {
    "model__path": "baselines/desk/qwen3-moe-2m", "model__family": "qwen3_moe", "train__engine": "moe", "precision__loss_scaling": None,
    "precision__rollout": "bf16", "precision__train": "bf16", "schedule__steps": 4, "train__routing_replay": "rollout",
    "train__optimizer": OPTIMIZER | {"lr": 1e-4},
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return run(tmp_path_factory.mktemp("straight"), **MIXTURE)


def test_a_killed_run_of_the_moe_trainer_with_replay_ends_with_the_uninterrupted_series(straight, tmp_path):
    killed = kill_and_resume(tmp_path, 1, len(straight.metrics), **MIXTURE)
    resumed = find_runs(tmp_path, "t")[0]
    assert killed == 1 and resumed.status == "success"
    assert json.dumps(series(resumed)) == json.dumps(series(straight))
    assert read_evidence(resumed.folder).equals(read_evidence(straight.folder)), "the evidence is bit-equal too"
    assert any(row["grad_norm"] > 0 for row in straight.metrics), "something was learned from"


def test_with_replay_no_expert_differs_at_any_step_and_without_it_some_do(straight, tmp_path):
    free = run(tmp_path, **MIXTURE | {"train__routing_replay": None, "schedule__steps": 2})
    assert [row["routing_disagreement"] for row in straight.metrics] == [0.0] * 4
    assert all(0 < row["routing_disagreement"] < 0.2 for row in free.metrics)
    first, bound = free.metrics[0], straight.metrics[0]
    assert first["reward_mean"] == bound["reward_mean"], "the same rollouts of the same weights"
    assert bound["k3_nats_per_token"] != first["k3_nats_per_token"], "scored with other experts"
    assert straight.record["precision_executed"]["trainer_engine"] == "megatron-core"


def test_replay_with_a_sampler_that_does_not_tell_is_refused_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(HfSampler, "expert_choices", lambda *_: None)
    with pytest.raises(UserError, match="train.routing_replay.*does not tell"):
        run(tmp_path, **MIXTURE)
    assert find_runs(tmp_path, "t")[0].record["error"]["class"] == "UserError"
