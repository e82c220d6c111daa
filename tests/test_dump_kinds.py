"""Dumps that look like dumps and are not: copies, foreign problems, placeholders, stored precision, files as tools write
them, and files that are small on disk only."""

import gzip
import json
import os
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from peak import PEAK_MIB
from test_dump import CONTROL, make_rows, make_task, runs_of, write

from suite.dumps import dump
from suite.dumps import files as dump_files
from suite.errors import UserError
from suite.spec.reading import deep_merge

PLANNED = {"data": {"num_prompts": 4}, "rollout": {"samples_per_prompt": 3}}


def planned_task(*args, **kwargs):
    task = make_task(*args, **kwargs)
    return type(task).model_validate_json(json.dumps(deep_merge(json.loads(task.model_dump_json(by_alias=True)), PLANNED)))


def refused(tmp_path, rows, task=None):
    with pytest.raises(UserError) as problem:
        dump.grade_evidence(task or make_task(), write(tmp_path / "dump.jsonl", rows))
    return str(problem.value)


def graded(tmp_path, rows, task=None):
    return dump.grade_evidence(task or make_task(), write(tmp_path / "dump.jsonl", rows))


def of(rows, arm, seed=None):
    return [row for row in rows if row["arm"] == arm and seed in (None, row["seed"])]


# ---- placeholders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side, value", [("rollout_logprobs", -9999.0), ("rollout_logprobs", -51.3), ("rollout_logprobs", -1e308),
                                         ("trainer_logprobs", -1e10), ("trainer_logprobs", -100), ("trainer_logprobs", -3.4e38)])  # fmt: skip
def test_a_log_prob_that_no_engine_computed_is_refused_with_row_and_token(tmp_path, side, value):
    rows = make_rows()
    row = next(i for i, row in enumerate(rows) if len(row[side]) > 8)
    rows[row][side][7] = value
    text = refused(tmp_path, rows)
    assert f"row {row + 1}: {side}" in text and "at response token 7" in text and "placeholder" in text


def test_a_trainer_may_find_a_sampled_token_very_unlikely(tmp_path):
    rows = make_rows()
    rows[0]["trainer_logprobs"][0] = -63.7
    assert runs_of(make_task(), write(tmp_path / "dump.jsonl", rows))


def padded(row, times, finish):
    extra = {"token_ids": row["token_ids"] + [0] * times, "finish_reason": finish}
    return row | extra | {name: row[name] + [0.0] * times for name in ("rollout_logprobs", "trainer_logprobs")}


@pytest.mark.parametrize("finish, times", [("stop", 2), (None, 4), ("length", 32)])
def test_padding_left_in_a_row_is_refused_by_row_and_token(tmp_path, finish, times):
    rows = make_rows()
    start = len(rows[2]["rollout_logprobs"])
    text = refused(tmp_path, [*rows[:2], padded(rows[2], times, finish), *rows[3:]])
    assert "row 3: rollout_logprobs" in text and f"{times} times from response token {start}" in text and "padding" in text
    assert runs_of(make_task(), write(tmp_path / "less.jsonl", [*rows[:2], padded(rows[2], times - 1, finish), *rows[3:]]))


@pytest.mark.parametrize("start, most", [(0, 3), (2, 31)], ids=["on the left", "inside"])
def test_padding_before_or_between_tokens_is_refused_as_well(tmp_path, start, most):
    """Batches are padded on the left for sampling, and between the turns of a conversation."""
    rows = make_rows()

    def put_in(times):
        row, prompt = rows[2], rows[2]["num_prompt_tokens"]
        new = {"token_ids": [*row["token_ids"][: prompt + start], *[9] * times, *row["token_ids"][prompt + start :]]}
        new |= {name: [*row[name][:start], *[0.0] * times, *row[name][start:]] for name in ("rollout_logprobs", "trainer_logprobs")}
        return [*rows[:2], row | new, *rows[3:]]

    text = refused(tmp_path, put_in(most + 1))
    assert "row 3: rollout_logprobs" in text and f"{most + 1} times from response token {start}" in text
    assert runs_of(make_task(), write(tmp_path / "less.jsonl", put_in(most)))


def test_one_id_for_all_tokens_is_refused(tmp_path):
    rows = make_rows()
    row = next(i for i, row in enumerate(rows) if sum(row["rollout_logprobs"]) < -51)
    rows[row]["token_ids"] = [0] * len(rows[row]["token_ids"])
    assert f"row {row + 1}: token ids" in refused(tmp_path, rows)


@pytest.mark.parametrize("other", [-0.35, -0.002])
def test_an_appended_token_with_log_prob_zero_makes_its_claim_invalid_and_is_named(tmp_path, other):
    rows = make_rows()
    for row in of(rows, "bf16", 1):
        for name, value in (("token_ids", 2), ("rollout_logprobs", 0.0), ("trainer_logprobs", other)):
            row[name] = [*row[name], value]
    found = graded(tmp_path, rows)
    first = rows.index(of(rows, "bf16", 1)[0])
    where = f"dump.jsonl row {first + 1}, response token {len(rows[first]['rollout_logprobs']) - 1}"
    assert found["verdict"] == found["claims"][0]["verdict"] == "INVALID"
    assert all(text in found["reason"] for text in ("arm bf16 seed 1", where, str(other), "12 times"))


def test_log_probs_clamped_from_below_make_the_claim_invalid(tmp_path):
    rows = make_rows()
    for row in of(rows, "fp16", 0)[:5]:
        row["trainer_logprobs"][0] = -23.02585
    found = graded(tmp_path, rows)
    assert found["verdict"] == "INVALID" and "trainer_logprobs is -23.0258 5 times" in found["reason"]


# ---- columns -----------------------------------------------------------------------------------------------------------


def bf16(values):
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x8000) & 0xFFFF0000).view(np.float32).tolist()


def fp16(values):
    return np.asarray(values, np.float16).tolist()


def swapped(rows):
    return [row | {"arm": {"bf16": "fp16", "fp16": "bf16"}[row["arm"]]} for row in rows]


@pytest.mark.parametrize(
    "side, round_to, rows, name",
    [
        ("trainer_logprobs", bf16, make_rows(), "a bf16 number"),
        ("rollout_logprobs", fp16, make_rows(), "an fp16 number"),
        ("trainer_logprobs", lambda values: [round(v, 6) for v in fp16(values)], swapped(make_rows()), "an fp16 number"),
        ("trainer_logprobs", lambda values: [round(v, 2) for v in values], make_rows(), "a decimal of 2 digits"),
        ("trainer_logprobs", lambda values: [round(v, 2) for v in values], swapped(make_rows()), None),
    ],
    ids=["bf16", "fp16", "fp16 in six digits, would fail", "decimals", "decimals beside a larger mismatch"],
)
def test_a_column_stored_too_coarsely_can_neither_pass_nor_fail(tmp_path, side, round_to, rows, name):
    found = graded(tmp_path, [row | {side: round_to(row[side])} if row["arm"] == "fp16" else row for row in rows])
    if name is None:
        assert found["notes"] == []
    else:
        assert found["verdict"] == "INCONCLUSIVE"
        assert f"arm fp16 seed 0: every value of {side} is {name}" in found["claims"][0]["reason"]


def test_fp32_log_probs_near_zero_are_on_no_grid(tmp_path):
    rows = make_rows()
    for row in rows:  # a sure model: multiples of 2^-24, which all formats hold
        for side in ("rollout_logprobs", "trainer_logprobs"):
            row[side] = [value if i % 5 == 0 else -(2.0**-23) for i, value in enumerate(row[side])]
    assert graded(tmp_path, rows)["notes"] == []


def test_a_trainer_column_that_is_the_samplers_is_named(tmp_path):
    rows = make_rows()
    for row in of(rows, "fp16", 2):
        row["trainer_logprobs"] = row["rollout_logprobs"]
    found = graded(tmp_path, rows)
    assert found["verdict"] == found["claims"][0]["verdict"] == "INCONCLUSIVE"
    assert "arm fp16 seed 2: the two columns are equal, k3 is exactly 0" in found["claims"][0]["reason"]


def test_log_probs_say_nothing_about_claims_on_the_reward(tmp_path):
    rows = make_rows()
    for row in rows:
        row["trainer_logprobs"] = row["rollout_logprobs"] = bf16(row["rollout_logprobs"])
    task = make_task(estimand="reward_mean", accept=[0.9, 1.1])
    assert "columns" not in graded(tmp_path, rows, task)["claims"][0]["reason"]


# ---- launches ----------------------------------------------------------------------------------------------------------


def copied(rows, what):
    """The rows of bf16 seed 0 again as seed 1, with `what` of them alone."""
    for source, target in zip(of(rows, "bf16", 0), of(rows, "bf16", 1), strict=True):
        size = len(source["rollout_logprobs"])
        fresh = np.random.default_rng(size).integers(1000, 2000, size).tolist()
        target |= {name: source[name] for name in ("token_ids", "rollout_logprobs", "trainer_logprobs")}
        if what != "tokens":
            target["token_ids"] = [*source["token_ids"][:3], *fresh]
        for side in {"rollout_logprobs", "trainer_logprobs"} - {what}:
            target[side] = [value - 1e-4 for value in source[side]]
    return rows


@pytest.mark.parametrize("what", ["tokens", "rollout_logprobs", "trainer_logprobs"])
def test_one_launch_under_two_seeds_is_refused(tmp_path, what):
    text = refused(tmp_path, copied(make_rows(), what))
    assert f"arm bf16 seed 0 and arm bf16 seed 1: the same {what} in" in text
    first, second = map(int, re.search(r"row (\d+) and dump.jsonl row (\d+)", text).groups())
    assert second == first + 12


def test_one_launch_as_two_arms_or_as_a_control_is_refused(tmp_path):
    rows = make_rows()
    for source, target in zip(of(rows, "bf16", 0), of(rows, "fp16", 0), strict=True):
        target |= {name: source[name] for name in ("token_ids", "rollout_logprobs", "trainer_logprobs")}
    assert "arm bf16 seed 0 and arm fp16 seed 0: the same log-probs on both sides" in refused(tmp_path, rows)
    rows = make_rows()
    rows += [row | {"arm": "control-floor"} for row in of(rows, "bf16", 0)]
    assert "arm bf16 seed 0 and arm control-floor seed 0" in refused(tmp_path, rows, make_task([CONTROL]))


def test_arms_of_one_seed_may_share_noise_and_rollouts(tmp_path):
    rows = make_rows()
    for source, target in zip(of(rows, "bf16"), of(rows, "fp16"), strict=True):
        shift = np.random.default_rng(len(source["token_ids"])).normal(0, 0.01, len(source["rollout_logprobs"]))
        mu = source["rollout_logprobs"]
        target |= {"token_ids": source["token_ids"], "rollout_logprobs": mu, "trainer_logprobs": np.minimum(mu + shift, 0).tolist()}
    assert graded(tmp_path, rows)["verdict"] == "PASS"


def test_short_answers_that_agree_by_chance_are_no_copies(tmp_path):
    rows = make_rows()
    for row in rows:
        short = {"token_ids": [*row["token_ids"][:3], 7], "rollout_logprobs": [-0.7], "trainer_logprobs": [-0.8]}
        row |= short if row["sample_id"] == 0 else {}
    assert runs_of(make_task(), write(tmp_path / "dump.jsonl", rows))


def test_rows_given_twice_without_sample_ids_are_refused(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "sample_id"} for row in make_rows()]
    assert "arm bf16 seed 0, twice: the same tokens in" in refused(tmp_path, [*rows, *of(rows, "bf16", 0)])


def test_a_greedy_task_may_draw_the_same_again(tmp_path):
    task = make_task()
    greedy = json.loads(task.model_dump_json(by_alias=True)) | {"rollout": {"temperature": 0.0}}
    rows = copied(make_rows(), "tokens")
    assert runs_of(type(task).model_validate_json(json.dumps(greedy)), write(tmp_path / "dump.jsonl", rows))


def test_arms_that_saw_other_problems_are_refused_or_capped(tmp_path):
    rows = make_rows()
    other = [row | {"prompt_id": "q" + row["prompt_id"]} if row["arm"] == "fp16" else row for row in rows]
    assert "arm bf16 seed 0 and arm fp16 seed 0: no prompt_id in common" in refused(tmp_path, other)
    tokens = [row | {"token_ids": [9, *row["token_ids"][1:]]} if row["arm"] == "fp16" else row for row in rows]
    assert "other prompt tokens under 'p0'" in refused(tmp_path, tokens)
    within = [row | {"token_ids": [9, *row["token_ids"][1:]]} if row["sample_id"] == 2 else row for row in rows]
    assert "row 3: prompt_id: found \"prompt 'p0' with other prompt tokens" in refused(tmp_path, within)
    partly = [row | {"prompt_id": "q3"} if row["arm"] == "fp16" and row["prompt_id"] == "p3" else row for row in rows]
    found = graded(tmp_path, partly)
    assert found["verdict"] == "INCONCLUSIVE" and "2 problems stand in one of them only, such as 'p3'" in found["reason"]


def test_what_is_not_as_planned_caps_the_claim_and_says_what(tmp_path):
    task = planned_task([CONTROL | {"seeds": [0, 1]}])
    floor = make_rows(["control-floor"], [0, 1])
    for row in floor:
        row["trainer_logprobs"] = [x - 1e-5 for x in row["rollout_logprobs"]]
    rows = make_rows() + floor
    assert graded(tmp_path, rows, task)["verdict"] == "PASS"
    for left_out, says in (
        (lambda row: row["prompt_id"] != "p3", "arm bf16 seed 0: 1 of 4 planned problems"),
        (lambda row: row["arm"] == "fp16" and row["sample_id"] != 2, "arm fp16 seed 0: 1 of 3 planned samples of 'p0'"),
        (lambda row: row["seed"] == 2, "arm bf16 seed 2: no rows; 3 launches are planned"),
        (lambda row: row in floor and row["seed"] == 1, "arm control-floor seed 1: no rows; 2 launches are planned"),
    ):
        found = graded(tmp_path, [row for row in rows if not left_out(row)], task)
        assert found["verdict"] == found["claims"][0]["verdict"] == "INCONCLUSIVE"
        assert says in found["claims"][0]["reason"]
    fewer = graded(tmp_path, [row for row in rows if row["prompt_id"] != "p3" and row["sample_id"] != 2], task)
    assert fewer["verdict"] == "PASS" and any("3 of 4 planned problems" in note and "2 of 3 planned samples" in note for note in fewer["notes"])


# ---- masks -------------------------------------------------------------------------------------------------------------


def with_tools(row, value):
    """Two tool tokens after the first one."""
    size = len(row["rollout_logprobs"])
    masked = {"loss_mask": [1, 0, 0, *[1] * (size - 1)], "token_ids": [*row["token_ids"][:4], 5, 6, *row["token_ids"][4:]]}
    return row | masked | {s: [row[s][0], value, value, *row[s][1:]] for s in ("rollout_logprobs", "trainer_logprobs")}


@pytest.mark.parametrize("name", ["dump.jsonl", "dump.parquet"])
@pytest.mark.parametrize("value", [None, 0.0, -9999.0, float("nan")])
def test_masked_tokens_do_not_count_whatever_stands_there(tmp_path, name, value):
    rows = make_rows()
    plain = runs_of(make_task(), write(tmp_path / "plain.jsonl", rows))
    masked = runs_of(make_task(), write(tmp_path / name, [with_tools(row, value) for row in rows]))
    for a, b in zip(plain, masked, strict=True):
        assert all(np.array_equal(a.summary[column], b.summary[column]) for column in a.summary)


@pytest.mark.parametrize(
    "mask, says", [([1], "1 values"), ([2], "2.0 at|2 at|1 values"), ([0], "1 values|no 1"), ("11", "list"), ([None], "null")]
)
def test_a_mask_that_does_not_fit_is_refused(tmp_path, mask, says):
    rows = make_rows()
    row = next(i for i, row in enumerate(rows) if len(row["rollout_logprobs"]) == (2 if mask == [1] else 1) or mask == [1])
    rows[row]["loss_mask"] = mask
    with pytest.raises(UserError, match=f"row {row + 1}: loss_mask.*({says})"):
        runs_of(make_task(), write(tmp_path / "dump.jsonl", rows))


def test_a_token_is_named_by_its_place_before_the_mask(tmp_path):
    rows = [with_tools(row, 0.0) for row in make_rows()]
    row = next(i for i, row in enumerate(rows) if len(row["loss_mask"]) > 6)
    rows[row]["rollout_logprobs"][5] = 0.4
    assert f"row {row + 1}: rollout_logprobs: found '0.4 at response token 5'" in refused(tmp_path, rows)


# ---- files as tools write them -------------------------------------------------------------------------------------------


def sums(runs):
    return [run.summary["sum_k3"].tolist() for run in runs]


def test_the_index_and_the_floats_of_pandas_are_taken(tmp_path):
    rows = make_rows()
    table = pa.Table.from_pylist([row | {"__index_level_0__": i} for i, row in enumerate(rows)])
    for name in ("sample_id", "seed", "num_prompt_tokens"):
        at = table.column_names.index(name)
        table = table.set_column(at, name, table[name].cast(pa.float64()))
    pq.write_table(table, tmp_path / "pandas.parquet")
    want = sums(runs_of(make_task(), write(tmp_path / "plain.jsonl", rows)))
    assert sums(runs_of(make_task(), tmp_path / "pandas.parquet")) == want
    assert sums(runs_of(make_task(), write(tmp_path / "index.jsonl", [row | {"__index_level_0__": 1} for row in rows]))) == want


def test_the_suites_own_evidence_columns_are_taken(tmp_path):
    rows = [row | {"step": 0, "trainer_entropies": [0.1] * len(row["rollout_logprobs"])} for row in make_rows()]
    for name in ("own.jsonl", "own.parquet"):
        assert len(runs_of(make_task(), write(tmp_path / name, rows))) == 6


def test_a_folder_of_shards_equals_the_file(tmp_path):
    rows, folder = make_rows(), tmp_path / "shards"
    want = sums(runs_of(make_task(), write(tmp_path / "whole.jsonl", rows)))
    for step, part in enumerate((rows[:10], rows[10:50], rows[50:])):
        (folder / f"step_{step}").mkdir(parents=True)
        write(folder / f"step_{step}" / ("rank_0.parquet" if step == 1 else "rank_0.jsonl"), part)
    text = (folder / "step_2" / "rank_0.jsonl").read_bytes()
    (folder / "step_2" / "rank_0.jsonl.gz").write_bytes(gzip.compress(text))
    (folder / "step_2" / "rank_0.jsonl").unlink()
    for name in (".DS_Store", "._rank_0.jsonl", "_SUCCESS"):
        (folder / name).write_bytes(b"\0\5\26\7")
    assert sums(runs_of(make_task(), folder)) == want
    steps = [folder / f"step_{step}" for step in range(3)]
    assert sums(runs_of(make_task(), steps)) == want
    (folder / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="notes.txt: found a file of another kind.*move it"):
        runs_of(make_task(), folder)


def test_folders_may_name_columns(tmp_path):
    rows = make_rows()
    for row in rows:
        folder = tmp_path / "parts" / f"arm={row['arm']}" / f"seed={row['seed']}"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "part.jsonl", "a") as file:
            file.write(json.dumps({name: value for name, value in row.items() if name not in ("arm", "seed")}) + "\n")
    assert sums(runs_of(make_task(), tmp_path / "parts")) == sums(runs_of(make_task(), write(tmp_path / "a.jsonl", rows)))
    write(folder / "part.jsonl", [row | {"seed": 0}])
    with pytest.raises(UserError, match="row 1: seed: found 0, allowed: 2, as the folder says"):
        runs_of(make_task(), tmp_path / "parts")


def test_what_is_no_file_says_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").mkdir()
    for path, says in ((tmp_path / "fifo", "a FIFO"), ("/dev/zero", "a device"), (tmp_path / "empty", "a folder without files"),
                       (tmp_path / ("x" * 5000), "name too long"), ("a\0b", "null")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            runs_of(make_task(), path)
    path = write(tmp_path / "dump.jsonl", make_rows())
    with pytest.raises(UserError, match="given twice"):
        runs_of(make_task(), [path, path])


def test_columns_of_odd_types_or_names_are_refused_by_row_and_field(tmp_path):
    table = pa.Table.from_pylist(make_rows())
    lists = pa.array([[1]] * table.num_rows)
    bad_text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    bad_text = pa.concat_arrays([bad_text] * table.num_rows)
    for name, column, says in (
        ("arm", lists, "row 1: arm"), ("finish_reason", lists, "row 1: finish_reason"), ("reward", lists, "row 1: reward"),
        ("prompt_id", bad_text, "row 1: prompt_id"), ("arm", bad_text, "row 1: arm"),
        ("x" * 5000, lists, "row 1: columns"),
        ("rollout_logprobs", pa.array([[[0.1]]] * table.num_rows), "row 1: rollout_logprobs"),
    ):  # fmt: skip
        at = table.column_names.index(name) if name in table.column_names else None
        odd = table.append_column(name, column) if at is None else table.set_column(at, name, column)
        pq.write_table(odd, tmp_path / "odd.parquet")
        with pytest.raises(UserError, match=says) as problem:
            runs_of(make_task(), tmp_path / "odd.parquet")
        assert len(str(problem.value)) < 2000
    pq.write_table(table.append_column("arm", table["arm"]), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="arm: found two columns of this name"):
        runs_of(make_task(), tmp_path / "twice.parquet")


# ---- budgets ---------------------------------------------------------------------------------------------------------


def test_row_groups_and_rows_are_judged_before_their_columns_are_read(tmp_path, monkeypatch):
    pq.write_table(pa.Table.from_pylist(make_rows()), tmp_path / "dump.parquet")
    monkeypatch.setattr(dump_files, "MAX_GROUP_VALUES", 100)
    with pytest.raises(UserError, match="row group 0: .*values in 72 rows.*row_group_size"):
        runs_of(make_task(), tmp_path / "dump.parquet")
    monkeypatch.setattr(dump_files, "MAX_GROUP_VALUES", 10**6)
    monkeypatch.setattr(dump_files, "MAX_ROLLOUT_VALUES", 35)
    with pytest.raises(UserError, match=r"row \d+: .*found (3[6-9]|4[0-2]) values, allowed: at most 35"):
        runs_of(make_task(), tmp_path / "dump.parquet")
    monkeypatch.undo()
    monkeypatch.setattr(dump_files, "MAX_ROWS", 71)
    for name in ("dump.parquet", "dump.jsonl"):
        with pytest.raises(UserError, match="7[12] rows|rows: found 72, allowed: at most 71"):
            runs_of(make_task(), write(tmp_path / name, make_rows()))


@pytest.mark.parametrize("name", ["dump.parquet", "dump.jsonl"])
def test_a_flipped_byte_is_read_or_refused_and_never_a_traceback(tmp_path, name):
    whole, kinds = write(tmp_path / name, make_rows(num_prompts=1)).read_bytes(), set()
    # At the end of a parquet file stand its metadata: every 25th byte of them, and a few of the columns.
    places = [*range(0, len(whole) - 2000, len(whole) // 15), *range(max(0, len(whole) - 2000), len(whole), 25)]
    for at in places:
        flipped = bytearray(whole)
        flipped[at] ^= 0x81
        (tmp_path / name).write_bytes(flipped)
        try:
            dump.read_dump(make_task(), tmp_path / name)
            kinds.add("read")
        except UserError:
            kinds.add("refused")
    assert "refused" in kinds


LIMITED = """
import sys
from suite.dumps.dump import grade_evidence
from suite.errors import UserError
from suite.spec.reading import load_task
task = load_task("desk-offline-mismatch")
for path in sys.argv[1:]:
    try:
        print("graded", grade_evidence(task, path)["verdict"])
    except UserError as problem:
        print(str(problem).removeprefix(path)[:150], flush=True)
    print(peak_mib())
"""


def test_files_that_are_small_on_disk_only_are_refused_within_a_gibibyte(tmp_path):
    def bomb(name, lengths):
        lists = pa.ListArray.from_arrays(np.cumsum([0, *lengths]).astype(np.int32), pa.array(np.full(sum(lengths), -1.0)))
        ids = pa.ListArray.from_arrays(lists.offsets, pa.array(np.ones(sum(lengths), np.int64)))
        num = len(lengths)
        columns = {"arm": ["bf16"] * num, "seed": [10] * num, "num_terms": ["4-24"] * num, "prompt_id": ["p"] * num,
                   "response_token_ids": ids, "rollout_logprobs": lists, "trainer_logprobs": lists}  # fmt: skip
        pq.write_table(pa.table(columns), tmp_path / name, compression="zstd")
        assert (tmp_path / name).stat().st_size < 2**20

    bomb("even.parquet", [1_000_000] * 34)
    bomb("one.parquet", [0] * 100 + [30_000_000] + [0] * 100)
    with gzip.open(tmp_path / "line.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b'{"arm": "bf16", "rollout_logprobs": [')
        for _ in range(64):
            file.write(b"0.5," * 2**18)
    names = ("even.parquet", "one.parquet", "line.jsonl.gz")
    done = subprocess.run([sys.executable, "-c", PEAK_MIB + LIMITED, *(str(tmp_path / name) for name in names)], capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    lines = done.stdout.splitlines()
    answers, peaks = lines[::2], [int(line) for line in lines[1::2]]
    assert len(answers) == 3, done.stderr
    assert "34000000 values in 34 rows" in answers[0] and "30000000 values, allowed" in answers[1] and "line 1" in answers[2]
    assert max(peaks) < 1024, peaks
