"""What a run adds up to while it goes on: the same as its evidence read back, in memory that does not grow with it."""

import math
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from test_record import OneTask

from suite.archive import views
from suite.archive.points import plot_points
from suite.engines.batch import Request, Rollout
from suite.measure.mismatch import RunningSums, concat_sums, estimates, rollout_sums, token_statistics
from suite.protocols.evidence import evidence_table
from suite.record import evidence as ev
from suite.record.run import EVIDENCE_SCHEMA, read_evidence, read_part
from suite.record.writer import open_run
from suite.spec.plan import Cell


def part(step: int, num: int = 40, seed: int = 0) -> pa.Table:
    """Rollouts of 16 prompts that come back in other steps; some are empty, some cut short, some not rewarded."""
    rng = np.random.default_rng([seed, step])
    lengths = rng.integers(0, 9, num)
    mu = [np.log(rng.uniform(0.01, 1, n)).astype(np.float32) for n in lengths]
    pi = [(one + 0.1 * rng.standard_normal(len(one))).astype(np.float32) for one in mu]
    rollouts = [
        Rollout(Request(f"p{rng.integers(16)}", i, (1, 2), 0), list(range(n)), one, "length" if n == 8 else "stop")
        for i, (n, one) in enumerate(zip(lengths, mu, strict=True))
    ]
    return evidence_table(rollouts, pi, step, [float(reward) for reward in rng.choice([0, 1, np.nan], num)])


def tally_of(parts) -> ev.Tally:
    tally = ev.Tally()
    for one in parts:
        tally.add(one)
    return tally


def bits(table) -> dict:
    return {name: np.asarray(column).tolist() if name == "prompt_id" else np.asarray(column).tobytes() for name, column in table.items()}


def test_parts_taken_in_one_by_one_give_the_bits_of_all_of_them_read_back():
    parts = [part(step) for step in range(30)]
    whole = pa.concat_tables(parts)
    tally = tally_of(parts)
    assert bits(tally.sums()) == bits(ev.summarise(whole))
    logprobs = ev.flat(whole, "rollout_logprobs"), ev.flat(whole, "trainer_logprobs")
    assert tally.token_statistics() == token_statistics(*logprobs, ev.num_response_tokens(whole))
    subtotals = estimates(concat_sums([ev.summarise(one) for one in parts]))
    assert estimates(tally.sums()) == pytest.approx(subtotals, rel=1e-12, nan_ok=True)


def test_a_running_sum_is_the_loop_that_adds_row_by_row():
    one = part(0)
    keys, rows = ev.rollout_rows(one)
    slow: dict[str, float] = {}
    for key, value in zip(keys, rows["sum_k3"].tolist(), strict=True):
        slow[key] = slow.get(key, 0.0) + value
    table = tally_of([one]).sums()
    assert dict(zip(table["prompt_id"], table["sum_k3"].tolist(), strict=True)) == slow


def test_rows_without_tokens_add_up_to_the_same_bits():
    parts = [part(step) for step in range(6)]
    thin = [ev.thinned(one, 5, seed=step) for step, one in enumerate(parts)]
    assert bits(tally_of(thin).sums()) == bits(tally_of(parts).sums()) == bits(ev.summarise(pa.concat_tables(thin)))
    for one, whole in zip(thin, parts, strict=True):
        kept = ev.whole_rows(one)
        assert one.num_rows == whole.num_rows and kept.num_rows == 5
        rows = whole.filter(pa.array(np.isin(whole["sample_id"].to_numpy(), kept["sample_id"].to_numpy())))
        names = [name for name in EVIDENCE_SCHEMA.names if name != "reward"]  # which may be nan, and equals nothing
        assert kept.select(names).equals(rows.select(names))


@pytest.mark.parametrize("num_rows", [40, 1000])
def test_a_sample_as_large_as_the_step_keeps_every_row(num_rows):
    assert ev.whole_rows(ev.thinned(part(0), num_rows, seed=0)).num_rows == 40


def test_statistics_of_all_tokens_are_left_out_where_tokens_are_and_never_made_of_a_sample():
    parts = [part(0), part(1)]
    assert tally_of([parts[0], ev.thinned(parts[1], 40, seed=0)]).token_statistics() == {}
    assert set(tally_of([]).token_statistics().values()) == {None}


def test_a_run_of_more_tokens_than_are_held_has_sums_and_no_statistics_of_all_tokens(monkeypatch):
    parts = [part(step) for step in range(4)]
    num = sum(int(ev.num_response_tokens(one).sum()) for one in parts)
    monkeypatch.setattr(ev, "MOST_TOKENS_HELD", num)
    assert tally_of(parts).token_statistics()
    monkeypatch.setattr(ev, "MOST_TOKENS_HELD", num - 1)
    assert tally_of(parts).token_statistics() == {}
    assert bits(tally_of(parts).sums()) == bits(ev.summarise(pa.concat_tables(parts)))


def opened(folder):
    return open_run(folder, OneTask(), Cell("t", 1, "fp16", (), 0, {}), {"packages": {}}, "cpu")


def test_thinned_parts_are_written_read_back_and_drawn_from(tmp_path):
    writer = opened(tmp_path)
    for step in range(3):
        writer.append({"step": step}, ev.thinned(part(step), 8, seed=step))
    assert bits(tally_of(writer.read_parts()).sums()) == bits(tally_of(map(part, range(3))).sums())
    kept = ev.whole_rows(read_evidence(writer.folder))
    assert kept.num_rows == 24
    points = plot_points(writer.folder / "evidence")
    assert points["by_position"]["count"].sum() == ev.num_response_tokens(kept).sum()
    writer.close()


def test_points_of_a_sample_are_held_against_the_sums_of_all_from_below(tmp_path):
    writer = opened(tmp_path)
    writer.append({"step": 0}, ev.thinned(part(0), 8, seed=0))
    sums, points = tally_of(writer.read_parts()).sums(), plot_points(writer.folder / "evidence")
    writer.close()
    assert list(views._points(sums, points, keeps_all=False)) == []
    assert any("plot_points, by_position" in line for line in views._points(sums, points)), "of a run that keeps all"
    points["by_prob"]["count"] = points["by_prob"]["count"] * 100
    assert [line for line in views._points(sums, points, keeps_all=False) if "by_prob" in line]


def test_parts_with_and_without_tokens_read_together_stand_for_all_rollouts(tmp_path):
    writer = opened(tmp_path)
    writer.append({"step": 0}, part(0))
    writer.append({"step": 1}, ev.thinned(part(1), 8, seed=0))
    assert bits(tally_of(writer.read_parts()).sums()) == bits(tally_of([part(0), part(1)]).sums())
    assert read_part(writer.folder / "evidence" / "part-00000.parquet").schema.equals(EVIDENCE_SCHEMA)
    writer.close()


def test_two_hundred_steps_of_ten_thousand_rows_need_the_memory_of_twenty(tmp_path, monkeypatch):
    """The loop's own road without its engines: tally, thin, write, sum up."""
    table = part(0, num=10_000)
    monkeypatch.setattr(ev, "MOST_TOKENS_HELD", 5 * int(ev.num_response_tokens(table).sum()))  # dropped within the first 20
    writer, tally, peaks = opened(tmp_path), ev.Tally(), []
    tracemalloc.start()
    try:
        for step in range(200):
            tally.add(table)
            if step % 50 == 19:  # writing is the same for every step, and slow
                writer.append({"step": step}, ev.thinned(table, 64, seed=step))
            if step % 20 == 19:
                peaks.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.reset_peak()
        assert tally.sums()["num_rollouts"].sum() == 2_000_000 and tally.token_statistics() == {}
        held, last = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        writer.close()
    assert max(*peaks, last) <= peaks[0] + 2**20 and held < 2**20


def test_what_is_added_up_is_counted_once_per_row_and_extremes_are_those_of_tokens():
    keys, rows = ["a", "b", "a"], rollout_sums([1, 1, 2], np.log([0.5, 0.5, 0.25, 0.5]), np.log([0.25, 0.5, 0.5, 0.5]), None, None)
    running = RunningSums()
    running.add(keys[:1], {name: column[:1] for name, column in rows.items()})
    running.add(keys[1:], {name: column[1:] for name, column in rows.items()})
    table = running.table()
    assert table["prompt_id"].tolist() == ["a", "b"] and table["num_rollouts"].tolist() == [2, 1]
    assert table["max_prob_diff"].tolist() == pytest.approx([0.25, 0.0]) and table["min_prob_diff"][0] == pytest.approx(-0.25)
    assert table["sum_k1"][0] == pytest.approx(math.log(2) - math.log(2), abs=1e-12)
