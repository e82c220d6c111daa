"""suite watch, export and --log: what a run writes, shown, tabled and sent on."""

import csv
import json
import math
import time

import published as fakes
import pyarrow.parquet as pq
import pytest

from suite.cli import live
from suite.cli.main import main
from suite.cli.metrics_log import MetricsLog, logger, numbers
from suite.errors import UserError
from suite.record.run import find_runs
from suite.report.exporting import metric_rows, write_export
from suite.report.watching import GAP, Watched, lines, sparkline, time_left, watched


def test_bars_run_from_the_least_value_to_the_largest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█" and sparkline([5, 5], 8) == "▁▁"
    assert sparkline([1e-6, 1e-5, 1e-4], 8, is_log=True) in ("▁▄█", "▁▅█") and sparkline(list(range(100)), 4) == "▁▃▆█"


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "x", True])
def test_a_value_that_is_no_number_is_a_gap(value):
    assert sparkline([0, value, 1], 9) == f"▁{GAP}█" and sparkline([value], 9) == GAP


def test_no_log_of_zero_is_taken():
    assert sparkline([0.0, 1.0, 10.0], 9, is_log=True) == f"{GAP}▁█"


def running(num=50, total=100, **more):
    rows = [{"step": i, "reward_mean": i / 100, "k3_nats_per_token": 1e-5 * (i + 1), "prob_diff_mean": 1e-4, "grad_norm": 0.1, "t_train_s": 3.0, "t_sample_s": 3.0}
            for i in range(num)]  # fmt: skip
    return Watched(**{"task": "t", "cell": "bf16.s0", "status": "running", "metrics": rows, "total": total, "started": "1"} | more)


@pytest.mark.parametrize("width", [40, 80, 200, 5])
def test_what_is_shown_fits_the_terminal(width):
    shown = lines([running(500, 1000), running(status="success", cell="fp16.s0")], width)
    assert all(len(line) <= max(width, 24) for line in shown) and len(shown) == 6
    if width >= 40:
        assert "bf16.s0  running  500/1000" in shown[0] and [line.split()[0] for line in shown[1:5]] == ["reward", "k3", "|pi-mu|", "grad"]


def test_the_time_that_is_left_is_that_of_the_last_steps():
    assert time_left(running(50, 100)) == "5 min left" and time_left(running(90, 100)) == "60 s left"
    assert time_left(running(50, None)) == time_left(running(0)) == time_left(running(status="failed")) == ""


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    repo = fakes.checkout(tmp_path_factory.mktemp("watch") / "checkout")
    fakes.make_runs(repo)
    return repo


def test_the_newest_attempt_of_each_cell_is_watched(repo):
    found = watched(repo / "runs", None)
    assert {one.cell for one in found} == {run.record["cell"]["name"] for run in find_runs(repo / "runs", "desk-tiny")}
    assert watched(repo / "runs", "desk-tiny") == found and watched(repo / "runs", "other") == []


def test_watch_shows_once_where_there_is_no_terminal(repo, monkeypatch, capsys):
    monkeypatch.chdir(repo)
    assert main(["watch"]) == 0 and "success" in capsys.readouterr().out
    assert main(["watch", "nothing"]) == 14


def test_a_live_watch_ends_with_its_runs(monkeypatch, tmp_path):
    states = [[running()], [running(60)], [running(100, status="success")]]
    monkeypatch.setattr(live, "watched", lambda *_: states.pop(0))
    monkeypatch.setattr(live, "Console", lambda **_: _terminal())
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert live.watch(tmp_path, "t") == 0 and states == []


def _terminal():
    import io

    from rich.console import Console

    return Console(file=io.StringIO(), force_terminal=True, width=40, height=12)


def test_an_export_has_every_line_with_its_cell_and_reads_back(repo, tmp_path, monkeypatch):
    runs = find_runs(repo / "runs", "desk-tiny")
    rows = metric_rows(runs)
    assert len(rows) == sum(len(run.metrics) for run in runs) and len({tuple(row) for row in rows}) == 1
    monkeypatch.chdir(repo)
    for format in ("csv", "parquet"):
        assert main(["export", "desk-tiny", "--format", format, "--out", str(tmp_path / f"x.{format}")]) == 0
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.num_rows == len(rows) and table["k3_nats_per_token"].to_pylist() == [row["k3_nats_per_token"] for row in rows]
    with open(tmp_path / "x.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(row["k3_nats_per_token"]) for row in read] == [row["k3_nats_per_token"] for row in rows]
    assert read[0]["cell"] == rows[0]["cell"] and read[0]["task"] == "desk-tiny"


def test_columns_keep_their_kind_and_lists_become_text(tmp_path):
    rows = [{"a": 1, "b": 1, "c": json.dumps([1]), "d": None}, {"a": 2, "b": 2.5, "c": None, "d": None}]
    write_export(rows, "parquet", tmp_path / "x.parquet")
    assert pq.read_table(tmp_path / "x.parquet").to_pydict() == {"a": [1, 2], "b": [1.0, 2.5], "c": ["[1]", None], "d": [None, None]}


def test_a_logger_gets_each_row_once_and_its_failure_ends_nothing(repo, capsys):
    (cell,) = {run.record["cell"]["name"] for run in find_runs(repo / "runs", "desk-tiny") if run.arm == "bf16" and run.seed == 0}
    told, sent = [], []
    log = MetricsLog(lambda *done: told.append(done), repo / "runs" / "desk-tiny", lambda *row: sent.append(row))
    log(cell, 1, 2), log(cell, 2, 2)
    rows = [row for run in find_runs(repo / "runs", "desk-tiny") if run.record["cell"]["name"] == cell for row in run.metrics]
    assert len(sent) == len(rows) and sent[0][1] == 0 and sent[0][2]["k3_nats_per_token"] == rows[0]["k3_nats_per_token"] and len(told) == 2

    def broken(*row):
        raise ConnectionError("no network")

    failing = MetricsLog(lambda *done: told.append(done), repo / "runs" / "desk-tiny", broken)
    failing(cell, 1, 1), failing(cell, 1, 1)
    assert capsys.readouterr().err.count("no network; the run goes on without it") == 1 and len(told) == 4


def test_a_logger_is_given_finite_numbers():
    assert numbers({"step": 3, "a": 1, "b": math.nan, "c": None, "d": True, "e": "x", "f": 0.5}) == {"a": 1.0, "f": 0.5}


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_refused_before_the_run(kind, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {kind}"):
        logger(kind, "t", tmp_path)
