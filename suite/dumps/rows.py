"""One row of a dump, checked before anything is computed from it.

The format is described in suite/dumps/dump.py. Every refusal is a TaskError with file, row (from 1), field, what was found,
what is allowed, and, where there is one, what to do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from suite.errors import TaskError
from suite.spec.task import Task, axis_label

REQUIRED = ("arm", "seed", "prompt_id", "rollout_logprobs", "trainer_logprobs")
OPTIONAL = (
    "sample_id", "token_ids", "num_prompt_tokens", "response_token_ids", "loss_mask", "finish_reason", "reward",
)  # fmt: skip
NOT_USED = ("step", "trainer_entropies")  # the suite's own evidence has them
LONGEST_NAME = 500  # letters of a prompt_id
LARGEST_REWARD = 1e9  # its square is summed
ROUNDING = 1e-5  # nats by which a log-softmax in fp32 may exceed 0
# No sampler draws a token of probability e^-50. A trainer may think that little of one; at e^-1000 nobody computes, and
# a whole number below -50 was written, not computed.
LEAST_SAMPLED, LEAST_SCORED = -50.0, -1000.0
# Entries of one id with probability exactly 1 on both sides that end a row. After "stop" nothing follows the last
# token; a response that was cut may go round in circles, of which 32 are beyond doubt.
LONGEST_TAIL = {"stop": 1, None: 3, "length": 31}
LONGEST_HEAD, LONGEST_INSIDE = 3, 31  # the same where such entries begin a row (padding on the left), or stand inside

PLACEHOLDER = "a placeholder for a log-prob that was not there; take that of the sampled token, or mask the token out"
FINISHED = (
    "an aborted rollout is no sample: sample it again, or leave its prompt out of every arm; "
    "tool_calls, eos and a dictionary of type stop are stop"
)
GUIDE = "suite/dumps/README.md shows how to convert an export"


@dataclass(frozen=True)
class Rollout:
    """One checked row. Arrays hold the T response tokens that were sampled: log-probs float64 in nats, ids int64.

    point: grid axis -> label. positions: where those tokens stood in the response, where a loss mask took others out.
    num_rounded: log-probs barely above 0 that were taken as 0.
    """

    arm: str
    seed: int
    point: tuple[tuple[str, str], ...]  # (dotted path, label of the grid value)
    prompt_id: str
    sample_id: int | None
    rollout_logprobs: np.ndarray
    trainer_logprobs: np.ndarray
    truncated: bool
    reward: float
    response_ids: np.ndarray
    prompt_ids: np.ndarray | None = None
    positions: np.ndarray | None = None
    num_rounded: int = 0
    path: Path = Path()
    row: int = 0

    @property
    def cell(self) -> tuple:
        return self.arm, self.point, self.seed

    def place(self, token: int) -> str:
        """Where a token stands, for a message: file, row, and position in the response from 0."""
        at = token if self.positions is None else self.positions[token]
        return f"{self.path.name} row {self.row}, response token {at}"


@dataclass(frozen=True)
class _Place:
    """Where one is, for refusals."""

    path: Path
    row: int

    def refuse(self, name: str, found: Any, allowed: str, hint: str | None = None) -> TaskError:
        return row_error(self.path, self.row, name, found, allowed, hint)


def row_error(path: Path, row_number: int, name: str, found: Any, allowed: str, hint: str | None = None) -> TaskError:
    shown = found if len(repr(found)) <= 200 else repr(found)[:200] + "..."
    return TaskError(path, f"row {row_number}: {name}", shown, allowed, hint)


def check_row(task: Task, path: Path, row_number: int, row: dict[str, Any]) -> Rollout:
    """A row as a Rollout, or a TaskError that names row, field, what was found and what is allowed."""
    at, axes = _Place(path, row_number), {axis.rsplit(".", 1)[-1]: axis for axis in task.grid}
    row = {name: value for name, value in row.items() if not _is_nan(name, value)}
    known = (*REQUIRED, *OPTIONAL, *axes)
    if unknown := sorted(set(row) - {*known, *NOT_USED}):
        raise at.refuse("columns", [name[:80] for name in unknown], ", ".join(known), f"unknown columns; {GUIDE}")
    if missing := [name for name in REQUIRED if row.get(name) is None]:
        raise at.refuse(missing[0], None, "a value", f"missing or null: {', '.join(missing)}; {GUIDE}")
    point = tuple((axis, _grid_label(task, axis, name, row.get(name), at)) for name, axis in axes.items())
    arm, seed = _arm_and_seed(task, row, dict(point), at)
    finish = _finish_reason(row.get("finish_reason"), at)
    prompt_ids, response_ids = _tokens(row, at)
    kept = _mask(row.get("loss_mask"), response_ids.size, at)
    mu, pi = (_Column(row[name], name, kept, at).logprobs(least) for name, least in
              (("rollout_logprobs", LEAST_SAMPLED), ("trainer_logprobs", LEAST_SCORED)))  # fmt: skip
    response_ids = response_ids[kept]
    _refuse_made_up_tokens(response_ids, mu, pi, finish, at)
    return Rollout(
        arm, seed, point, _prompt_id(row["prompt_id"], at),
        None if row.get("sample_id") is None else _count(row["sample_id"], "sample_id", at),
        np.minimum(mu, 0.0), np.minimum(pi, 0.0), finish == "length", _reward(row.get("reward"), at),
        response_ids, prompt_ids, None if kept.all() else np.flatnonzero(kept),
        int((mu > 0).sum() + (pi > 0).sum()), path, row_number,
    )  # fmt: skip


def _is_nan(name: str, value: Any) -> bool:
    """pandas writes a missing value as nan, whatever the column."""
    return name not in ("rollout_logprobs", "trainer_logprobs") and isinstance(value, float) and math.isnan(value)


# ---- scalars -------------------------------------------------------------------------------------------------------


def _arm_and_seed(task: Task, row: dict, point: dict[str, str], at: _Place) -> tuple[str, int]:
    """An arm with one of the task's seeds, or a control with one of its own at its own grid point."""
    controls = {control.name: control for control in task.controls}
    arm, seed = row["arm"], _count(row["seed"], "seed", at)
    if not isinstance(arm, str) or arm not in (*task.arms, *controls):
        raise at.refuse("arm", arm, ", ".join((*task.arms, *controls)))
    planned = controls[arm].seeds if arm in controls else task.seeds
    if seed not in planned:
        hint = f"the launches that {task.id} plans for {arm}; more would be a way to a false pass"
        raise at.refuse("seed", seed, ", ".join(map(str, planned)), hint)
    for axis, value in (controls[arm].at if arm in controls else {}).items():
        if axis in point and point[axis] != axis_label(value):
            raise at.refuse(axis.rsplit(".", 1)[-1], point[axis], f"{axis_label(value)}, where {arm} stands")
    return arm, seed


def _whole(value: Any) -> Any:
    """A whole number that pandas made a float, because its column has gaps, as the integer that it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _count(value: Any, name: str, at: _Place) -> int:
    value = _whole(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise at.refuse(name, value, "an integer >= 0")
    return value


def _prompt_id(value: Any, at: _Place) -> str:
    value = _whole(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or len(str(value)) > LONGEST_NAME:
        raise at.refuse("prompt_id", value, f"an integer, or a string of at most {LONGEST_NAME} letters")
    return str(value)


def _finish_reason(value: Any, at: _Place) -> str | None:
    if value is not None and (not isinstance(value, str) or value not in ("stop", "length")):
        raise at.refuse("finish_reason", value, "stop, length", FINISHED)
    return value


def _reward(value: Any, at: _Place) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > LARGEST_REWARD:
        raise at.refuse("reward", value, f"a finite number of at most {LARGEST_REWARD:g}, or null")
    return float(value)


def _grid_label(task: Task, axis: str, name: str, value: Any, at: _Place) -> str:
    labels = [axis_label(v) for v in task.grid[axis]]
    if value is None:
        if len(labels) > 1:
            raise at.refuse(name, None, ", ".join(labels))
        return labels[0]
    value = value.tolist() if isinstance(value, np.ndarray) else _whole(value)
    label = value if isinstance(value, str) and value in labels else axis_label(value)
    if label not in labels:
        raise at.refuse(name, value, ", ".join(labels))
    return label


# ---- tokens and their log-probs --------------------------------------------------------------------------------------


def _tokens(row: dict[str, Any], at: _Place) -> tuple[np.ndarray | None, np.ndarray]:
    """Ids of the prompt, where they are given, and of the response."""
    if row.get("response_token_ids") is not None:
        if row.get("token_ids") is not None or row.get("num_prompt_tokens") is not None:
            allowed = "either response_token_ids, or token_ids with num_prompt_tokens"
            raise at.refuse("response_token_ids", "both forms", allowed)
        return None, _token_ids(row["response_token_ids"], "response_token_ids", at)
    for name in ("token_ids", "num_prompt_tokens"):
        if row.get(name) is None:
            raise at.refuse(name, None, "token_ids with num_prompt_tokens, or response_token_ids")
    ids = _token_ids(row["token_ids"], "token_ids", at)
    num_prompt = _count(row["num_prompt_tokens"], "num_prompt_tokens", at)
    if num_prompt > ids.size:
        raise at.refuse("num_prompt_tokens", num_prompt, f"at most the {ids.size} token_ids")
    return ids[:num_prompt], ids[num_prompt:]


def _token_ids(values: Any, name: str, at: _Place) -> np.ndarray:
    ids = _Column(values, name, None, at).numbers("integers >= 0")
    whole = True if ids.dtype.kind in "iu" else ids == np.floor(ids)
    bad = np.flatnonzero(~((ids >= 0) & (ids < 2**63) & whole))
    if bad.size:
        raise at.refuse(name, f"{ids[bad[0]]} at token {bad[0]}", "integers >= 0", "padding does not belong in a row")
    return ids.astype(np.int64)


def _mask(values: Any, num_tokens: int, at: _Place) -> np.ndarray:
    """Which response tokens count, (T,) bool: all without a loss mask."""
    if values is None:
        return np.ones(num_tokens, dtype=bool)
    allowed = "0 (not sampled: tool output, a user's turn) and 1 (sampled), one per response token"
    if isinstance(values, np.ndarray) and values.dtype.kind == "b":
        values = values.astype(np.int64)
    if isinstance(values, list):
        values = [int(value) if isinstance(value, bool) else value for value in values]
    mask = _Column(values, "loss_mask", None, at).numbers(allowed)
    if mask.size != num_tokens:
        raise at.refuse("loss_mask", f"{mask.size} values", f"{num_tokens} values, one per response token")
    bad = np.flatnonzero((mask != 0) & (mask != 1))
    if bad.size:
        raise at.refuse("loss_mask", f"{mask[bad[0]]} at response token {bad[0]}", allowed)
    if num_tokens and not mask.any():
        raise at.refuse("loss_mask", "no 1", allowed, "a rollout has at least one sampled token")
    return mask.astype(bool)


@dataclass(frozen=True)
class _Column:
    """A list of a row before it is trusted. kept: which of its entries count; None where all do."""

    values: Any
    name: str
    kept: np.ndarray | None
    at: _Place

    def logprobs(self, least: float) -> np.ndarray:
        """Log-probs of the tokens that count, float64, as they stand in the file."""
        what = "one finite number <= 0 per response token, the natural log of its probability"
        num_tokens = self.kept.size
        if isinstance(self.values, (list, np.ndarray)) and len(self.values) != num_tokens:
            raise self._refuse(f"{len(self.values)} values", f"{num_tokens} values, one per response token")
        logprobs = self.numbers(what)
        bad = np.flatnonzero(~(np.isfinite(logprobs) & (logprobs <= ROUNDING)))
        if bad.size:
            raise self._refuse_token(logprobs, bad[0], what, None if np.isfinite(logprobs[bad[0]]) else PLACEHOLDER)
        written = (logprobs < least) | ((logprobs < LEAST_SAMPLED) & (logprobs == np.floor(logprobs)))
        if written.any():
            raise self._refuse_token(logprobs, np.flatnonzero(written)[0], f"{what}, above {least:g}", PLACEHOLDER)
        return logprobs

    def numbers(self, what: str) -> np.ndarray:
        """The entries that count, as a flat float64 or integer array; null, text, pairs and dictionaries are refused."""
        if not isinstance(self.values, (list, np.ndarray)):
            raise self._refuse(self.values, f"a list of {what}")
        if isinstance(self.values, np.ndarray) and self.values.dtype.kind in "iuf":
            values = self.values if self.kept is None else self.values[self.kept]
            return values if values.dtype.kind in "iu" and self.kept is None else values.astype(np.float64)
        return self._from_list(what)

    def _from_list(self, what: str) -> np.ndarray:
        pairs = zip(self.values, self.kept, strict=True) if self.kept is not None else ()
        values = [value for value, keep in pairs if keep] if self.kept is not None else self.values
        types = set(map(type, values))
        if not types <= {int, float} or int in types and max(map(abs, values)) >= 2**63:
            raise self._refuse_entry(what)
        return np.array(values, dtype=np.int64 if types == {int} else np.float64)

    def _refuse_entry(self, what: str) -> TaskError:
        """The first entry that is no number, or a whole number beyond all ids."""
        for i, value in enumerate(self.values):
            odd = type(value) not in (int, float) or (type(value) is int and abs(value) >= 2**63)
            if odd and (self.kept is None or self.kept[i]):
                found = "null" if value is None else repr(value)[:80]
                return self._refuse(f"{found} at {self._token} {i}", f"a list of {what}", _hint(value))
        raise AssertionError("unreachable: some entry was odd")

    @property
    def _token(self) -> str:
        return "token" if self.name == "token_ids" else "response token"

    def _refuse_token(self, values: np.ndarray, i: int, allowed: str, hint: str | None) -> TaskError:
        return self._refuse(f"{values[i]} at {self._token} {np.flatnonzero(self.kept)[i]}", allowed, hint)

    def _refuse(self, found: Any, allowed: str, hint: str | None = None) -> TaskError:
        return self.at.refuse(self.name, found, allowed, hint)


def _hint(entry: Any) -> str | None:
    if entry is None:
        return "no log-prob was computed there; give the response tokens alone, and mask out those that were not sampled"
    return "take the number that belongs to the sampled token" if isinstance(entry, (dict, list)) else None


def _runs_of_certain_tokens(ids: np.ndarray, mu: np.ndarray, pi: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of every run of several entries of one id whose log-probs are exactly 0 on both sides."""
    certain = (mu == 0) & (pi == 0)
    changes = np.flatnonzero((ids[1:] != ids[:-1]) | (certain[1:] != certain[:-1])) + 1
    starts, stops = np.append(0, changes), np.append(changes, ids.size)
    several = certain[starts] & (stops - starts > 1)
    return list(zip(starts[several].tolist(), stops[several].tolist(), strict=True))


def _refuse_made_up_tokens(ids: np.ndarray, mu: np.ndarray, pi: np.ndarray, finish: str | None, at: _Place) -> None:
    """Padding that was left in the row, and ids that cannot have been drawn with the log-probs beside them."""
    if ids.size < 2:
        return
    for start, stop in _runs_of_certain_tokens(ids, mu, pi):
        longest = LONGEST_TAIL[finish] if stop == ids.size else LONGEST_HEAD if start == 0 else LONGEST_INSIDE
        if stop - start > longest:
            found = f"token {ids[start]}, log-prob 0.0 on both sides, {stop - start} times from response token {start}"
            raise at.refuse("rollout_logprobs", found, "the sampled tokens alone", "padding: cut all lists to their length")
    if (ids == ids[0]).all() and -mu.sum() > -LEAST_SAMPLED:
        found = f"token {ids[0]} {ids.size} times, in all of probability e^{mu.sum():.0f}"
        raise at.refuse("token ids", found, "the ids of the sampled tokens", "a placeholder for ids")
