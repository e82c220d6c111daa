"""The table of protocols: a new one is a row and a module, and no other file knows one by its name."""

import ast
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fakes import OFFLINE, block, claim, task_of
from published import checkout

import suite
from suite.archive.points import plot_points
from suite.archive.publishing import publish_task
from suite.archive.verifying import verify_folder
from suite.archive.views import contradictions
from suite.cli import verbs
from suite.grade import verdict as grade
from suite.grade.launches import run_value
from suite.machine import environment
from suite.machine.doctor import can_run
from suite.measure.mismatch import SAMPLED_COLUMNS, concat_sums, estimates, prompt_sums
from suite.protocols import run as protocols
from suite.record.evidence import is_scored, summarise
from suite.record.run import EVIDENCE_SCHEMA, Run, find_runs
from suite.spec.estimands import ESTIMANDS, SAMPLER_ESTIMANDS
from suite.spec.kinds import KINDS, Kind, kind_of
from suite.spec.plan import plan
from suite.spec.reading import load_all, load_task
from suite.spec.strict_yaml import TaskErrors
from suite.spec.validate import validate_file

TOY = """\
schema: 1
id: desk-coins
version: 1
grade_version: 1
tier: desk
title: Two coins
protocol: coins
claims:
  - {id: C1-x, about: C1, kind: ratio, statement: "The heavy coin shows heads three times as often."}
data: {id: coins, revision: "1", sha256: "SHA", num_prompts: 3}
arms:
  bf16: {data: {seed: 75}}
  fp16: {data: {seed: 25}}
vary: [data.seed]
seeds: [0, 1, 2]
grade:
  C1-x:
    estimand: reward_mean
    contrast: {ratio: [bf16, fp16]}
    interval: {method: student_t}
    accept: [2.5, 3.5]
    tolerance: {level: P4, derivation: a test, date: "2026-01-01"}
controls:
  - {name: control-coins, kind: floor, like: fp16, seeds: [9], estimand: reward_mean, contrast: {arm: control-coins}, accept: [0.1, 0.4]}
resources: {gpus: 0, gpu_mem_gib: 0.0, nodes: 1, disk_gib: 0.0, cpu_ok: true}
""".replace("SHA", "a" * 64)


def run_coins(cells, session) -> None:
    """The module of the toy protocol: a share of heads that the cell's setting decides."""
    for cell in cells:
        session.run_cell(cell, "coins", lambda writer, cell=cell: _flip(cell, writer))


def _flip(cell, writer) -> None:
    share = cell.get("data.seed") / 100 + 0.001 * cell.seed
    writer.append({"step": 0, "reward_mean": share})
    writer.finish("success", series_summary={"reward_mean": share})


@pytest.fixture
def coins(monkeypatch):
    """The two additions: a row and a module."""
    row = Kind("coins", "coins_protocol", ("data.seed",), {"reward_mean": ESTIMANDS["reward_mean"]}, has_engines=False)
    monkeypatch.setitem(KINDS, "coins", row)
    module = types.ModuleType("coins_protocol")
    module.run = run_coins
    monkeypatch.setitem(sys.modules, "coins_protocol", module)


def test_a_protocol_added_by_one_row_and_one_module_goes_the_whole_way(coins, tmp_path, monkeypatch):
    repo = checkout(tmp_path, TOY, "desk-coins")
    monkeypatch.chdir(repo)
    errors, _ = validate_file("desk-coins")
    assert errors == []
    task = load_task("desk-coins")
    cells = verbs.select(task)
    assert [cell.name for cell in cells] == [f"{arm}.s{seed}" for arm in ("bf16", "fp16") for seed in (0, 1, 2)] + ["control-coins.s9"]
    assert can_run(task, environment.collect()) is None
    protocols.run_task(task, cells, runs_dir=tmp_path / "runs")
    runs = find_runs(tmp_path / "runs", task.id)
    verdict = grade.grade_task(task, runs)
    (row,) = verdict["claims"]
    assert (verdict["verdict"], row["verdict"], verdict["controls"][0]["outcome"]) == ("PASS", "PASS", "holds")
    assert row["estimate"] == pytest.approx(0.751 / 0.251, rel=1e-3)
    (folder,) = publish_task(task, tmp_path / "runs", tmp_path / "results")
    assert verify_folder(tmp_path / "results", {task.id: task}).differences == []


def test_a_setting_that_its_row_requires_is_asked_for_by_name(coins, tmp_path):
    path = tmp_path / "desk-coins.yaml"
    path.write_text(TOY.replace("fp16: {data: {seed: 25}}", "fp16: {data: {num_prompts: 4}}"))
    with pytest.raises(TaskErrors) as found:
        plan(load_task(path))
    error = found.value.errors[0]
    assert (error.key, error.found, error.allowed) == ("arms.fp16.data.seed", "nothing", "a value (coins needs it)")


def test_an_unknown_protocol_is_refused_with_those_there_are(tmp_path):
    path = tmp_path / "desk-coins.yaml"
    path.write_text(TOY)
    with pytest.raises(TaskErrors) as found:
        load_task(path)
    error = next(error for error in found.value.errors if error.key == "protocol")
    assert error.file == str(path) and error.found == "coins" and error.allowed == ", ".join(KINDS)


# Words that are spelled like a protocol (a verb, the names of benches, the hub's word for a repository of data), and the
# one task that is written by code.
SAME_WORDS = {
    "compare": ("cli/main.py", "cli/verbs.py"), "rl": ("cli/main.py", "cli/verbs.py", "bench/verbs.py", "bench/tables.py"),
    "dataset": ("problems/data.py",), "offline_mismatch": ("check/template.py",),
}  # fmt: skip


def test_no_other_file_holds_the_name_of_a_protocol():
    root = Path(suite.__file__).parent
    found = set()
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root).as_posix()
        if place.startswith("protocols/") or path.name == "kinds.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in KINDS:
                found |= set() if place.endswith(SAME_WORDS.get(node.value, "-")) else {(place, node.value)}
    assert found == set()


def test_every_row_has_its_module_and_asks_for_settings_that_there_are():
    assert list(KINDS) == [kind.name for kind in KINDS.values()]
    for task in load_all().values():
        for cell in plan(task):
            assert all(cell.get(path) is not None for path in kind_of(task).required)
    for kind in KINDS.values():
        assert kind.compares or Path(suite.__file__).parent.joinpath(*kind.module.split(".")[1:]).with_suffix(".py").is_file()
        assert (kind.evidence == "scored") == kind.has_trainer and bool(kind.must_say) == kind.has_engines


# --- a protocol without a trainer has no pi ---------------------------------------------------------------------------


def evidence(scored: bool, num: int = 6) -> pa.Table:
    rng = np.random.default_rng(3)
    rows = [{
        "prompt_id": f"p{i // 2}", "sample_id": i % 2, "step": 0, "token_ids": [1, 2, *([3] * (4 + i))], "num_prompt_tokens": 2,
        "rollout_logprobs": (mu := -rng.random(4 + i)), "trainer_logprobs": mu - 0.01 if scored else None, "finish_reason": "length",
        "reward": float(i % 3 == 0),
    } for i in range(num)]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=EVIDENCE_SCHEMA)


def test_rollouts_that_nobody_scored_add_up_to_what_needs_no_pi_and_to_the_same():
    scored, sampled = summarise(evidence(True)), summarise(evidence(False))
    assert tuple(sampled) == SAMPLED_COLUMNS and is_scored(evidence(True)) and not is_scored(evidence(False))
    assert all(np.array_equal(sampled[name], scored[name]) for name in SAMPLED_COLUMNS)
    values = estimates(sampled)
    assert set(values) == {"reward_mean", "truncated_share", "response_tokens_mean"} <= SAMPLER_ESTIMANDS.keys()
    assert values == {name: estimates(scored)[name] for name in values} and estimates(scored)["k3_nats_per_token"] > 0
    both = pa.concat_tables([evidence(True), evidence(False)])  # a run that an earlier version began
    assert tuple(summarise(both)) == SAMPLED_COLUMNS
    halves = [summarise(evidence(False).slice(start, 3)) for start in (0, 3)]
    assert all(np.array_equal(concat_sums(halves)[name], sampled[name]) for name in SAMPLED_COLUMNS)
    with pytest.raises(ValueError, match="lacks the columns"):
        concat_sums([scored, sampled])


def test_rollouts_without_a_single_token_add_up_without_a_trainer():
    sums = prompt_sums(["a", "a"], [0, 0], np.zeros(0), None, [0.0, 1.0], [True, True])
    assert estimates(sums) == {"response_tokens_mean": 0.0, "reward_mean": 0.5, "truncated_share": 1.0}


def test_a_claim_on_the_mismatch_of_a_task_without_a_trainer_is_refused(tmp_path):
    text = OFFLINE.replace("offline_mismatch", "offline_accuracy")
    task = task_of(tmp_path, text, claim("ratio", block("k3_nats_per_token", "ratio: [bf16, fp16]", "[0.5, 2.0]", method="exact")))
    errors, _ = validate_file(task.file)
    error = next(error for error in errors if error.key == "grade.C1-x.estimand")
    assert error.file == str(task.file) and error.found == "k3_nats_per_token" and error.allowed == ", ".join(sorted(SAMPLER_ESTIMANDS))


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.evidence == "sampled"])
def test_no_run_of_a_protocol_without_a_trainer_has_a_mismatch_whatever_its_record_holds(tmp_path, name):
    task = task_of(tmp_path, OFFLINE, claim("ratio", block("k3_nats_per_token", "ratio: [bf16, fp16]", "[0.5, 2.0]")))
    filled = prompt_sums(["a", "b"], [2, 3], -np.ones(5), -np.ones(5), [1.0, 0.0], [False, False])  # log mu on both sides
    run = Run(tmp_path, {"status": "success", "series_summary": {"k3_nats_per_token": 0.0}}, [{"k3_nats_per_token": 0.0}], filled)
    value = run_value(KINDS[name], run, task.grade["C1-x"])
    assert value.value is None and value.problem == f"a run of {name} has no k3_nats_per_token"


def test_a_summary_that_speaks_of_pi_contradicts_evidence_without_it():
    metrics = [{"step": 0, "num_rollouts": 6, "num_response_tokens": 39}]
    record = {
        "status": "success", "series_summary": {"k3_nats_per_token": 0.0, "prob_diff_p999": 0.0},
        "counts": {"num_prompts": 3, "num_rollouts": 6, "num_response_tokens": 39},
        "cell": {"settings": {"rollout": {"samples_per_prompt": 2, "max_tokens": 64}, "data": {}}},
    }  # fmt: skip
    found = contradictions(Run(Path("r"), record, metrics, summarise(evidence(False))), KINDS["offline_accuracy"])
    assert found == ["k3_nats_per_token, prob_diff_p999: in series_summary, of rollouts that no trainer scored"]
    clean = record | {"series_summary": estimates(summarise(evidence(False)))}
    assert contradictions(Run(Path("r"), clean, metrics, summarise(evidence(False))), KINDS["offline_accuracy"]) == []
    bare = contradictions(Run(Path("r"), clean, metrics, summarise(evidence(False))), KINDS["offline_mismatch"])
    assert bare == ["evidence_summary.parquet: sums of rollouts that no trainer scored, in a protocol whose trainer does"]


def test_evidence_without_pi_gives_no_points_to_draw(tmp_path):
    from suite.files import write_parquet

    write_parquet(tmp_path / "part-00000.parquet", evidence(False))
    assert plot_points(tmp_path) == {}
    write_parquet(tmp_path / "part-00000.parquet", evidence(True))
    assert plot_points(tmp_path)["token"]["pi"].size == 39
