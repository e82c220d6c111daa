"""Dumps of another framework: numbers equal those of the tokens, both formats agree, and what cannot be used is
refused by row."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from suite.dumps import dump
from suite.dumps import files as dump_files
from suite.errors import TaskError, UserError
from suite.measure.mismatch import estimates, prompt_sums
from suite.spec.task import Task

GRADE = {
    "estimand": "k3_nats_per_token",
    "contrast": {"ratio": ["bf16", "fp16"]},
    "accept": [16, 128],
    "min_seeds": 3,
    "interval": {"method": "student_t"},
    "tolerance": {"level": "P4", "derivation": "three mantissa bits", "date": "2026-01-01"},
}
CONTROL = {
    "name": "control-floor",
    "kind": "floor",
    "like": "fp32",
    "seeds": [0],
    "estimand": "k3_nats_per_token",
    "contrast": {"arm": "control-floor"},
    "accept": [None, 1e-9],
}


SETTINGS = {
    "model": {"family": "qwen2", "sha256": "a" * 64},
    "data": {"id": "sums", "template": "desk"},
    "rollout": {"engine": "hf", "samples_per_prompt": 3, "temperature": 1.0, "top_p": 1.0, "max_tokens": 64},
    "train": {"engine": "dense", "score_batch_size": 4},
}


def make_task(controls=(), grid=None, protocol="offline_mismatch", **grade):
    text = json.dumps(
        {
            "schema": 1,
            "id": "example",
            "version": 1,
            "grade_version": 1,
            "tier": "desk",
            "title": "an example",
            "protocol": protocol,
            **SETTINGS,
            "claims": [{"id": "C1-k3-ratio", "about": "C1", "statement": "fp16 shrinks the gap", "kind": "ratio"}],
            "arms": {name: {"precision": {"rollout": name, "train": name}} for name in ("bf16", "fp16", "fp32")},
            "vary": ["precision.rollout", "precision.train"],
            "grid": grid or {},
            "seeds": [0, 1, 2],
            "controls": list(controls),
            "grade": {"C1-k3-ratio": GRADE | grade},
            "resources": {"gpus": 0, "gpu_mem_gib": 0.0, "disk_gib": 0.1, "cpu_ok": True},
        }
    )
    return Task.model_validate_json(text)


def make_rows(arms=("bf16", "fp16"), seeds=(0, 1, 2), num_prompts=4, samples=3, **extra):
    """Rollouts whose mean k3 is about (noise^2)/2: 0.08 for bf16, an eighth of it for every other arm."""
    rng, rows = np.random.default_rng(0), []
    for arm in arms:
        for seed in seeds:
            for prompt in range(num_prompts):
                for sample in range(samples):
                    length = int(rng.integers(1, 40))
                    mu = -rng.exponential(1.0, length) - 0.5
                    pi = np.minimum(mu + rng.normal(0, 0.08 if arm == "bf16" else 0.01, length), 0.0)
                    mu, pi = (x.astype(np.float32).tolist() for x in (mu, pi))
                    rows.append(
                        {
                            "arm": arm,
                            "seed": seed,
                            "prompt_id": f"p{prompt}",
                            "sample_id": sample,
                            "num_prompt_tokens": 3,
                            "token_ids": [prompt, 1, 2, *rng.integers(0, 1000, length).tolist()],
                            "rollout_logprobs": mu,
                            "trainer_logprobs": pi,
                            "finish_reason": "length" if sample == 0 else "stop",
                            "reward": float(sample == 1),
                            **extra,
                        }
                    )
    return rows


def runs_of(task, path):
    return dump.read_dump(task, path).runs


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["dump.jsonl", "dump.parquet"])
def test_runs_hold_the_numbers_of_the_tokens(tmp_path, name):
    rows = make_rows()
    runs = runs_of(make_task(), write(tmp_path / name, rows))
    assert [(run.arm, run.seed) for run in runs] == [(arm, seed) for arm in ("bf16", "fp16") for seed in (0, 1, 2)]
    for run in runs:
        mine = [row for row in rows if (row["arm"], row["seed"]) == (run.arm, run.seed)]
        mu, pi = (np.concatenate([row[c] for row in mine]) for c in ("rollout_logprobs", "trainer_logprobs"))
        want = prompt_sums(
            [row["prompt_id"] for row in mine],
            [len(row["rollout_logprobs"]) for row in mine],
            mu,
            pi,
            [row["reward"] for row in mine],
            [row["finish_reason"] == "length" for row in mine],
        )
        assert all(np.array_equal(run.summary[column], want[column]) for column in want)
        assert run.record["series_summary"].items() >= estimates(want).items()
        assert run.record["series_summary"]["prob_diff_p999"] == pytest.approx(
            np.quantile(np.abs(np.exp(pi) - np.exp(mu)), 0.999)
        )
        assert run.record["counts"] == {"num_prompts": 4, "num_rollouts": 12, "num_response_tokens": mu.size}
        assert run.status == "success" and run.record["limit"] is None and not run.is_control
    assert len({run.fingerprint for run in runs}) == 1


def test_folding_early_changes_nothing_but_the_token_statistics(tmp_path, monkeypatch):
    path, task = write(tmp_path / "dump.jsonl", make_rows()), make_task()
    whole = runs_of(task, path)
    monkeypatch.setattr(dump, "FLUSH_TOKENS", 30)
    monkeypatch.setattr(dump, "KEPT_TOKENS", 100)
    for a, b in zip(whole, runs_of(task, path)):
        for column, values in a.summary.items():
            if column == "prompt_id":
                assert values.tolist() == b.summary[column].tolist()
            else:
                np.testing.assert_allclose(
                    b.summary[column].astype(float), values.astype(float), rtol=1e-12, atol=1e-13
                )
        assert "prob_diff_p999" in a.record["series_summary"] and "prob_diff_p999" not in b.record["series_summary"]


def test_response_token_ids_and_missing_options_are_accepted(tmp_path):
    rows = make_rows()
    for row in rows:
        row["response_token_ids"] = row.pop("token_ids")[row.pop("num_prompt_tokens") :]
        for name in ("sample_id", "finish_reason", "reward"):
            del row[name]
    full, bare = (
        runs_of(make_task(), write(tmp_path / n, r)) for n, r in (("a.jsonl", make_rows()), ("b.jsonl", rows))
    )
    for a, b in zip(full, bare):
        assert np.array_equal(a.summary["sum_k3"], b.summary["sum_k3"])
        assert b.summary["num_truncated"].sum() == 0 and b.record["series_summary"]["reward_mean"] is None


@pytest.mark.parametrize("label", ["60-120", [60, 120]])
@pytest.mark.parametrize("name", ["dump.jsonl", "dump.parquet"])
def test_the_grid_column_takes_the_value_or_its_label(tmp_path, label, name):
    task = make_task(grid={"data.num_terms": [[8, 24], [60, 120]]})
    runs = runs_of(task, write(tmp_path / name, make_rows(num_terms=label)))
    assert {json.dumps(run.point) for run in runs} == {'{"data.num_terms": [60, 120]}'}
    assert runs[0].record["cell"]["name"] == "bf16.num_terms=60-120.s0"


def test_a_single_grid_point_needs_no_column(tmp_path):
    runs = runs_of(make_task(grid={"data.num_terms": [[8, 24]]}), write(tmp_path / "d.jsonl", make_rows()))
    assert runs[0].point == {"data.num_terms": [8, 24]}


@pytest.mark.parametrize(
    "change, field, says",
    [
        ({"rollout_logprobs": [-0.1]}, "rollout_logprobs", "1 values"),
        ({"trainer_logprobs": []}, "trainer_logprobs", "0 values"),
        ({"num_prompt_tokens": 10**6}, "num_prompt_tokens", "at most"),
        ({"num_prompt_tokens": None}, "num_prompt_tokens", "response_token_ids"),
        ({"arm": "int8"}, "arm", "control-floor"),
        ({"arm": None}, "arm", "missing or null"),
        ({"seed": None}, "seed", "missing or null"),
        ({"seed": -1}, "seed", ">= 0"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"seed": True}, "seed", "integer"),
        ({"sample_id": "x"}, "sample_id", "integer"),
        ({"seed": 3}, "seed", "0, 1, 2"),
        ({"prompt_id": 1.5}, "prompt_id", "string"),
        ({"prompt_id": "x" * 5000}, "prompt_id", "500 letters"),
        ({"arm": ["bf16"]}, "arm", "control-floor"),
        ({"finish_reason": {"type": "stop"}}, "finish_reason", "stop, length"),
        ({"finish_reason": "abort"}, "finish_reason", "sample it again"),
        ({"reward": 1e308}, "reward", "finite"),
        ({"reward": 10**30}, "reward", "finite"),
        ({"finish_reason": "eos"}, "finish_reason", "stop, length"),
        ({"reward": math.inf}, "reward", "finite"),
        ({"token_ids": "abc"}, "token_ids", "list"),
        ({"token_ids": [1, 2, -3, 4]}, "token_ids", "-3"),
        ({"token_ids": [1, 2, 3.5, 4]}, "token_ids", "3.5"),
        ({"token_ids": [1, math.nan]}, "token_ids", "nan"),
        ({"token_ids": [1, 10**30]}, "token_ids", "at token 1"),
        ({"rollout_logprobs": "abc"}, "rollout_logprobs", "list"),
        ({"response_token_ids": [1]}, "response_token_ids", "either"),
        ({"temperature": 1.0, "extra": 2}, "columns", "['extra', 'temperature']"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_row_and_field(tmp_path, change, field, says):
    rows = make_rows()
    rows[16] |= change
    path = write(tmp_path / "dump.jsonl", rows)
    with pytest.raises(TaskError) as refused:
        runs_of(make_task([CONTROL]), path)
    assert str(path) in str(refused.value) and f"row 17: {field}" in str(refused.value) and says in str(refused.value)


@pytest.mark.parametrize(
    "bad, shown",
    [
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (math.inf, "inf"),
        (1e-3, "0.001"),
        (None, "null at response token"),
        ("x", "x"),
        (True, "True"),
    ],
)
@pytest.mark.parametrize("side", ["rollout_logprobs", "trainer_logprobs"])
def test_a_log_prob_that_is_none_is_refused_with_its_token(tmp_path, bad, shown, side):
    rows = make_rows()
    rows[5][side][-1] = bad
    with pytest.raises(TaskError, match=f"row 6: {side}.*{shown}"):
        runs_of(make_task(), write(tmp_path / "dump.jsonl", rows))
    if not isinstance(bad, (str, bool)):
        with pytest.raises(TaskError, match=f"row 6: {side}"):
            runs_of(make_task(), write(tmp_path / "dump.parquet", rows))


def test_a_log_prob_of_zero_and_its_rounding_are_accepted(tmp_path):
    rows = make_rows()
    rows[0]["rollout_logprobs"][0], rows[0]["trainer_logprobs"][0] = 0, 9e-6
    assert len(runs_of(make_task(), write(tmp_path / "dump.jsonl", rows))) == 6


def test_duplicates_missing_arms_and_unpaired_seeds_are_refused(tmp_path):
    rows, task = make_rows(), make_task([CONTROL])
    with pytest.raises(TaskError, match=r"row 73: sample_id.*'p0'.*once"):
        runs_of(task, write(tmp_path / "a.jsonl", [*rows, rows[1]]))
    with pytest.raises(TaskError, match=r"needs bf16, fp16.*missing: fp16"):
        runs_of(task, write(tmp_path / "b.jsonl", make_rows(arms=["bf16", "fp32"])))
    with pytest.raises(TaskError, match=r"seed.*'fp16': \[0, 1\].*the same seeds"):
        runs_of(task, write(tmp_path / "c.jsonl", [r for r in rows if (r["arm"], r["seed"]) != ("fp16", 2)]))


def test_rewards_must_be_there_when_a_claim_is_about_them(tmp_path):
    rows = make_rows()
    rows[3]["reward"] = None
    path = write(tmp_path / "dump.jsonl", rows)
    assert runs_of(make_task(), path)
    with pytest.raises(TaskError, match="reward of arm bf16, seed 0.*11 of 12"):
        runs_of(make_task(estimand="reward_mean"), path)


def test_the_grid_column_is_asked_for_and_checked(tmp_path):
    task = make_task(grid={"data.num_terms": [[8, 24], [60, 120]]})
    with pytest.raises(TaskError, match="row 1: num_terms: found None, allowed: 8-24, 60-120"):
        runs_of(task, write(tmp_path / "a.jsonl", make_rows()))
    with pytest.raises(TaskError, match="row 1: num_terms"):
        runs_of(task, write(tmp_path / "b.jsonl", make_rows(num_terms=[1, 2])))


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "an empty file"),
        (b"\n\n", "there are no rows"),
        (bytes(range(128, 256)) * 8, "line 1"),
        (b"PAR1garbage", "a readable parquet file"),
        (b"[1, 2]\n", "JSON object"),
        (b"[" * 100_000, "line 1"),
        (b'{"arm": "bf16", "arm": "fp16"}\n', "twice"),
        (b'{"arm": ', "line 1"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "line 1"),
        (b'{"reward": ' + b"1" + b"0" * 400 + b"}", "401 digits"),
        (b'{"arm": "\xff"}', "line 1"),
        (b"\x1f\x8bgarbage", "gzip"),
    ],
    ids=range(12),
)
def test_what_is_no_dump_is_refused(tmp_path, content, says):
    path = tmp_path / "dump.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as refused:
        runs_of(make_task(), path)
    assert str(path) in str(refused.value)


def test_an_empty_parquet_file_a_cut_one_and_a_missing_one_are_refused(tmp_path):
    path = write(tmp_path / "whole.parquet", make_rows())
    pq.write_table(pq.read_table(path).slice(0, 0), tmp_path / "empty.parquet")
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:-200])
    for name, says in (("empty.parquet", "no rows"), ("cut.parquet", "parquet"), ("none.parquet", "No such file")):
        with pytest.raises(UserError, match=says):
            runs_of(make_task(), tmp_path / name)


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(dump_files, "MAX_LINE_BYTES", 1000)
    with pytest.raises(UserError, match="line 1: found more than 1000"):
        runs_of(make_task(), write(tmp_path / "dump.jsonl", [{"arm": "x" * 3 * 2**20}]))


def test_rl_tasks_are_not_graded_from_a_dump(tmp_path):
    with pytest.raises(UserError, match="'rl'"):
        runs_of(make_task(protocol="rl"), write(tmp_path / "dump.jsonl", make_rows()))


def swapped(rows):
    return [row | {"arm": {"bf16": "fp16", "fp16": "bf16"}.get(row["arm"], row["arm"])} for row in rows]


@pytest.mark.parametrize("rows, verdict", [(make_rows(), "PASS"), (swapped(make_rows()), "FAIL")])
def test_a_dump_is_judged_like_a_run(tmp_path, rows, verdict):
    found = dump.grade_evidence(make_task(), write(tmp_path / "dump.jsonl", rows))
    (claim,) = found["claims"]
    assert found["verdict"] == claim["verdict"] == verdict
    ratios = []
    for seed in (0, 1, 2):
        r = {
            arm: np.concatenate(
                [
                    np.subtract(row["trainer_logprobs"], row["rollout_logprobs"])
                    for row in rows
                    if (row["arm"], row["seed"]) == (arm, seed)
                ]
            )
            for arm in ("bf16", "fp16")
        }
        ratios.append(np.mean(np.expm1(r["bf16"]) - r["bf16"]) / np.mean(np.expm1(r["fp16"]) - r["fp16"]))
    assert claim["estimate"] == pytest.approx(np.exp(np.mean(np.log(ratios))), rel=1e-6) and claim["num_seeds"] == 3
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("rows, verdict", [(make_rows(), "PASS"), (swapped(make_rows()), "FAIL")])
def test_absent_controls_are_listed_and_cap_both_ways(tmp_path, rows, verdict):
    found = dump.grade_evidence(make_task([CONTROL]), write(tmp_path / "dump.jsonl", rows))
    assert found["verdict"] == found["claims"][0]["verdict"] == "INCONCLUSIVE"
    assert (
        f"control-floor; otherwise {verdict}" in found["reason"]
        and f"otherwise {verdict}" in found["claims"][0]["reason"]
    )
    assert [(c["name"], c["outcome"]) for c in found["controls"]] == [("control-floor", "absent")]


def test_controls_that_the_dump_carries_are_judged(tmp_path):
    floor = make_rows(arms=["control-floor"], seeds=[0])
    for row in floor:
        row["trainer_logprobs"] = [x - 1e-5 for x in row["rollout_logprobs"]]  # k3 = 5e-11
    task = make_task([CONTROL])
    held = dump.grade_evidence(task, write(tmp_path / "held.jsonl", make_rows() + floor))
    assert held["verdict"] == "PASS" and held["controls"][0]["outcome"] == "holds"
    broken = dump.grade_evidence(task, write(tmp_path / "broken.jsonl", make_rows() + make_rows(["control-floor"], [0])))
    assert broken["verdict"] == "INVALID" and broken["controls"][0]["outcome"] == "broken"


def test_one_seed_is_inconclusive(tmp_path):
    assert (
        dump.grade_evidence(make_task(), write(tmp_path / "dump.jsonl", make_rows(seeds=[0])))["verdict"]
        == "INCONCLUSIVE"
    )


def test_the_verdict_does_not_depend_on_the_format(tmp_path):
    found = [
        dump.grade_evidence(make_task(), write(tmp_path / name, make_rows())) for name in ("dump.jsonl", "dump.parquet")
    ]
    for verdict in found:
        for key in ("fingerprint", "environment"):
            del verdict[key]
        for run in verdict["runs"]:
            del run["run_key"]
    assert found[0] == found[1]
