"""The rows of a dump: read one at a time from parquet or JSON lines, and checked before anything is computed from them.

The format is described in suite/dump.py. Every refusal is a TaskError with file, row (from 1), field, what was found,
what is allowed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from suite.errors import TaskError
from suite.task import Task, axis_label

REQUIRED = ("arm", "seed", "prompt_id", "rollout_logprobs", "trainer_logprobs")
OPTIONAL = ("sample_id", "token_ids", "num_prompt_tokens", "response_token_ids", "finish_reason", "reward", "step")
ROUNDING = 1e-6  # a log-probability may exceed 0 by this much: float32 log-softmax of a sure token
MAX_LINE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Rollout:
    """One checked row. point: grid axis -> value; log-probs of the response tokens, float64, nats."""

    arm: str
    seed: int
    point: tuple[tuple[str, str], ...]  # (dotted path, label of the grid value)
    prompt_id: str
    sample_id: int | None
    rollout_logprobs: np.ndarray
    trainer_logprobs: np.ndarray
    truncated: bool
    reward: float

    @property
    def cell(self) -> tuple:
        return self.arm, self.point, self.seed


# ---- one row -------------------------------------------------------------------------------------------------------


def check_row(task: Task, path: Path, row_number: int, row: dict[str, Any]) -> Rollout:
    """A row as a Rollout, or a TaskError that names row, field, what was found and what is allowed."""
    axes = {axis.rsplit(".", 1)[-1]: axis for axis in task.grid}
    known = (*REQUIRED, *OPTIONAL, *axes)
    if unknown := sorted(set(row) - set(known)):
        raise row_error(path, row_number, "columns", unknown, ", ".join(known), "unknown columns")
    if missing := [name for name in REQUIRED if row.get(name) is None]:
        raise row_error(path, row_number, missing[0], None, "a value", f"missing or null: {', '.join(missing)}")

    def refuse(name: str, found: Any, allowed: str) -> TaskError:
        return row_error(path, row_number, name, found, allowed)

    arms = [*task.arms, *(control.name for control in task.controls)]
    if row["arm"] not in arms:
        raise refuse("arm", row["arm"], ", ".join(arms))
    if isinstance(row["prompt_id"], bool) or not isinstance(row["prompt_id"], (str, int)):
        raise refuse("prompt_id", row["prompt_id"], "a string or an integer")
    if row.get("finish_reason") not in (None, "stop", "length"):
        raise refuse("finish_reason", row["finish_reason"], "stop, length")
    num_tokens = _num_response_tokens(row, refuse)
    mu, pi = (_logprobs(row[name], name, num_tokens, refuse) for name in ("rollout_logprobs", "trainer_logprobs"))
    return Rollout(
        arm=row["arm"], seed=_count(row["seed"], "seed", refuse),
        point=tuple((axis, _grid_label(task, axis, name, row.get(name), refuse)) for name, axis in axes.items()),
        prompt_id=str(row["prompt_id"]),
        sample_id=None if row.get("sample_id") is None else _count(row["sample_id"], "sample_id", refuse),
        rollout_logprobs=mu, trainer_logprobs=pi,
        truncated=row.get("finish_reason") == "length", reward=_reward(row.get("reward"), refuse),
    )  # fmt: skip


def row_error(path: Path, row_number: int, name: str, found: Any, allowed: str, hint: str | None = None) -> TaskError:
    shown = found if len(repr(found)) <= 200 else repr(found)[:200] + "..."
    return TaskError(path, f"row {row_number}: {name}", shown, allowed, hint)


def _count(value: Any, name: str, refuse) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < 2**63:
        raise refuse(name, value, "an integer >= 0")
    return int(value)


def _reward(value: Any, refuse) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isinf(value):
        raise refuse("reward", value, "a finite number, or null")
    return float(value)


def _num_response_tokens(row: dict[str, Any], refuse) -> int:
    if row.get("response_token_ids") is not None:
        if row.get("token_ids") is not None or row.get("num_prompt_tokens") is not None:
            raise refuse(
                "response_token_ids", "both forms", "either response_token_ids, or token_ids with num_prompt_tokens"
            )
        return _token_ids(row["response_token_ids"], "response_token_ids", refuse)
    for name in ("token_ids", "num_prompt_tokens"):
        if row.get(name) is None:
            raise refuse(name, None, "token_ids with num_prompt_tokens, or response_token_ids")
    total, prompt = (
        _token_ids(row["token_ids"], "token_ids", refuse),
        _count(row["num_prompt_tokens"], "num_prompt_tokens", refuse),
    )
    if prompt > total:
        raise refuse("num_prompt_tokens", prompt, f"at most the {total} token_ids")
    return total - prompt


def _token_ids(values: Any, name: str, refuse) -> int:
    ids = _flat(values, name, "integers >= 0", refuse)
    if ids.dtype.kind == "f" and ids.size:
        raise refuse(name, next((v for v in ids.tolist() if not v.is_integer()), ids.tolist()[0]), "integers >= 0")
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0):
        raise refuse(name, f"{ids.min()}" if ids.dtype.kind in "iu" else f"values of type {ids.dtype}", "integers >= 0")
    return ids.size


def _logprobs(values: Any, name: str, num_tokens: int, refuse) -> np.ndarray:
    logprobs = _flat(values, name, "numbers <= 0", refuse)
    if logprobs.size and logprobs.dtype.kind not in "iuf":
        raise refuse(name, f"values of type {logprobs.dtype}", "numbers <= 0")
    if logprobs.size != num_tokens:
        raise refuse(name, f"{logprobs.size} values", f"{num_tokens} values, one per response token")
    logprobs = logprobs.astype(np.float64)
    bad = np.flatnonzero(~(np.isfinite(logprobs) & (logprobs <= ROUNDING)))
    if bad.size:
        what = "finite natural logs of probabilities, <= 0"
        raise refuse(name, f"{logprobs[bad[0]]} at response token {bad[0]}", what)
    return logprobs


def _flat(values: Any, name: str, what: str, refuse) -> np.ndarray:
    """A list or array as a flat array. Mixed lists come out as dtype object or str and are refused by their kind."""
    if isinstance(values, np.ndarray):
        return values
    if not isinstance(values, list):
        raise refuse(name, values, f"a list of {what}")
    odd = next((v for v in values if isinstance(v, bool) or not isinstance(v, (int, float))), None)
    if odd is not None or None in values or any(isinstance(v, int) and abs(v) >= 2**63 for v in values):
        raise refuse(name, "an entry that is no number" if odd is None else odd, f"a list of {what}")
    return np.asarray(values)


def _grid_label(task: Task, axis: str, name: str, value: Any, refuse) -> str:
    labels = [axis_label(v) for v in task.grid[axis]]
    if value is None:
        if len(labels) > 1:
            raise refuse(name, None, ", ".join(labels))
        return labels[0]
    value = value.tolist() if isinstance(value, np.ndarray) else value
    label = value if isinstance(value, str) and value in labels else axis_label(value)
    if label not in labels:
        raise refuse(name, value, ", ".join(labels))
    return label


# ---- the file ------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, row) of a parquet or JSON lines file, told apart by its first bytes, one row in memory at a
    time."""
    if not path.is_file():
        raise TaskError(path, "--evidence", "no such file", "a parquet or JSON lines file")
    with open(path, "rb") as file:
        head = file.read(4)
    if not head:
        raise TaskError(path, "rows", "an empty file", "one row per rollout")
    return _parquet_rows(path) if head == b"PAR1" else _json_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise TaskError(
                    path, f"row {number}", f"a line of more than {MAX_LINE_BYTES} bytes", "one rollout per line"
                )
            if line.strip():
                yield number, _json_row(path, number, line)


def _json_row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_no_duplicate_keys)
    except (ValueError, RecursionError) as problem:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise TaskError(
            path, f"row {number}", line[:40], "parquet, or one JSON object per line", str(problem)[:200]
        ) from None
    if not isinstance(row, dict):
        raise TaskError(path, f"row {number}", type(row).__name__, "a JSON object")
    return row


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} is given twice")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=64):
                columns = {name: batch.column(i) for i, name in enumerate(batch.schema.names)}
                for i in range(batch.num_rows):
                    number += 1
                    yield number, {name: _cell_value(column, i) for name, column in columns.items()}
    except (pa.ArrowException, OSError) as problem:
        raise TaskError(path, "file", "not readable as parquet", "parquet or JSON lines", str(problem)[:200]) from None


def _cell_value(column: pa.Array, i: int) -> Any:
    """A plain value; a list without nulls as a numpy array, which keeps long rows cheap."""
    value = column[i]
    if not value.is_valid or not isinstance(value, (pa.ListScalar, pa.LargeListScalar, pa.FixedSizeListScalar)):
        return value.as_py()
    items = value.values
    plain = pa.types.is_integer(items.type) or pa.types.is_floating(items.type)
    return items.to_numpy(zero_copy_only=False) if plain and items.null_count == 0 else items.to_pylist()
