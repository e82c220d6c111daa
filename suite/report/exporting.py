"""`suite export TASK`: the metrics of every run as one table for a notebook, a row per step or batch. No torch.

Beside the metrics of metrics.jsonl a row names its cell, arm, seed, grid point, whether it is a control, the run's key and its
status, so that nothing needs to be parsed out of folder names.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow as pa

from suite.files import parquet_bytes, write_atomic
from suite.record.run import Run
from suite.report.escaping import escape_csv

FORMATS = ("csv", "parquet")
FIRST = ("task", "cell", "arm", "seed", "is_control", "run", "status", "fingerprint")


def metric_rows(runs: list[Run]) -> list[dict]:
    """A dictionary per line of metrics; all have the same keys, None where a run lacks one."""
    rows = [_head(run) | {name: _plain(value) for name, value in line.items()} for run in runs for line in run.metrics]
    names = list(dict.fromkeys(name for row in rows for name in row))
    order = [*(name for name in FIRST if name in names), *(name for name in names if name not in FIRST)]
    return [{name: row.get(name) for name in order} for row in rows]


def _head(run: Run) -> dict:
    record = run.record
    point = {axis: _plain(value) for axis, value in run.point.items()}
    return {"task": record["task"]["id"], "cell": record["cell"]["name"], "arm": run.arm, "seed": run.seed, "is_control": run.is_control,
            "run": run.folder.name, "status": run.status, "fingerprint": run.fingerprint} | point  # fmt: skip


def _plain(value):
    """A number or a text; lists and mappings as JSON."""
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else value


def write_export(rows: list[dict], format: str, out: Path) -> None:
    """rows: of metric_rows, at least one."""
    write_atomic(out, _csv(rows).encode() if format == "csv" else parquet_bytes(_table(rows)))


def _csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([escape_csv(value) for value in row.values()] for row in rows)
    return text.getvalue()


def _table(rows: list[dict]) -> pa.Table:
    return pa.table({name: _column([row[name] for row in rows]) for name in rows[0]})


def _column(values: list) -> pa.Array:
    """Numbers as numbers: whole ones stay whole where all are; a column of several kinds becomes text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and float in kinds:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array(values if len(kinds) < 2 else [None if value is None else str(value) for value in values])
