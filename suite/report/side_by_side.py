"""`suite compare A B`: two runs, or two verdicts, beside each other: what was asked, what ran, what came out. No torch.

Of settings, machine and packages only what differs is shown; of results everything. Of the series of two runs it says
whether they are equal bit for bit and, if not, from which step on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from suite.archive.published import METRICS, RECORD, VERDICT, exists, read_published, read_verdict, records_of
from suite.errors import UserError
from suite.record.run import Run, read_run

ABSENT = "-"


@dataclass(frozen=True)
class Section:
    """A table: its title, the names of its columns, and its rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)


def side_by_side(a: Path, b: Path) -> list[Section]:
    """Sections for two run folders (with record.json) or two verdicts (verdict.json, or its folder); sections without rows
    are left out. Raises UserError where a path is neither, or the two are not of a kind.
    """
    first, second = read_either(Path(a)), read_either(Path(b))
    if isinstance(first, Run) != isinstance(second, Run):
        kinds = ["a run" if isinstance(one, Run) else "a verdict" for one in (first, second)]
        raise UserError(f"found {kinds[0]} and {kinds[1]}, allowed: two runs or two verdicts")
    with records_of(f"{a} and {b}"):
        sections = _runs(first, second) if isinstance(first, Run) else _verdicts(first, second)
    return [section for section in sections if section.rows]


def read_either(path: Path) -> Run | dict:
    """The run in a folder with record.json, or the verdict in a file or folder. UserError for a path that is neither."""
    file = path / VERDICT if path.is_dir() else path
    if exists(path / RECORD):
        return _read_run(path)
    if file.name == VERDICT and exists(file):
        return read_verdict(file)
    inside = sorted(found.parent for found in path.glob(f"**/{RECORD}")) if path.is_dir() else []
    if len(inside) == 1:
        return _read_run(inside[0])
    some = f" ({len(inside)} runs lie below it, such as {inside[0]})" if inside else ""
    raise UserError(f"found {path}, allowed: a folder with record.json or verdict.json{some}")


def _read_run(folder: Path) -> Run:
    return read_published(folder) if exists(folder / METRICS) else read_run(folder)


def _runs(a: Run, b: Run) -> list[Section]:
    asked = [{"task": run.record["task"]["id"], "version": run.record["task"]["version"], "arm": run.arm, "seed": run.seed}
             | run.record["cell"]["settings"] for run in (a, b)]  # fmt: skip
    where = [{"fingerprint": run.fingerprint} | (run.record.get("environment") or {}) for run in (a, b)]
    came_out = [{"status": run.status} | run.record["counts"] | run.record["series_summary"] for run in (a, b)]
    return [
        Section("asked for, where they differ", ("setting", "A", "B"), _differing(*asked)),
        Section("machine and packages, where they differ", ("", "A", "B"), _differing(*where)),
        Section("precision as executed", ("point", "A", "B"), _pairs(*(run.record["precision_executed"] for run in (a, b)))),
        Section("results", ("", "A", "B", "B / A"), [(*row, _ratio(*row[1:])) for row in _pairs(*came_out)]),
        Section(f"series, {len(a.metrics)} and {len(b.metrics)} steps", ("series", "", "largest relative difference"),
                _series(a.metrics, b.metrics)),
    ]  # fmt: skip


def _verdicts(a: dict, b: dict) -> list[Section]:
    heads = [{"task": v["task"], "version": v["task_version"], "fingerprint": v["fingerprint"], "verdict": v["verdict"],
              "reason": v["reason"]} for v in (a, b)]  # fmt: skip
    claims = [{row["id"]: _outcome(row, row["verdict"] or "reported") for row in v["claims"]} for v in (a, b)]
    controls = [{row["name"]: _outcome(row, row["outcome"]) for row in v["controls"]} for v in (a, b)]
    return [
        Section("verdicts", ("", "A", "B"), _pairs(*heads)),
        Section("claims", ("claim", "A", "B"), _pairs(*claims)),
        Section("controls", ("control", "A", "B"), _pairs(*controls)),
        Section("machine and packages, where they differ", ("", "A", "B"), _differing(a["environment"], b["environment"])),
    ]


def _outcome(row: dict, word: str) -> str:
    interval = f" [{_shown(row['interval'][0])}, {_shown(row['interval'][1])}]" if row["interval"] else ""
    return f"{_shown(row['estimate'])}{interval} {word}"


def _pairs(a: dict, b: dict) -> list[tuple[str, str, str]]:
    """Every leaf of either, in the order of A, then what B alone has."""
    left, right = _leaves(a), _leaves(b)
    return [(name, _shown(left.get(name, ABSENT)), _shown(right.get(name, ABSENT))) for name in {**left, **right}]


def _differing(a: dict, b: dict) -> list[tuple[str, str, str]]:
    left, right = _leaves(a), _leaves(b)
    differ = [name for name in {**left, **right} if left.get(name) != right.get(name)]
    return [(name, _shown(left.get(name, ABSENT)), _shown(right.get(name, ABSENT))) for name in differ]


def _leaves(value, path: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in _leaves(part, f"{path}.{name}" if path else str(name)).items()}
    return {path: value}


def _shown(value) -> str:
    if value is None:
        return ABSENT
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _ratio(left: str, right: str) -> str:
    try:
        return f"{float(right) / float(left):.4g}"
    except (ValueError, ZeroDivisionError):
        return ""


def _series(a: list[dict], b: list[dict]) -> list[tuple[str, str, str]]:
    """Wall times left out: they never repeat."""
    names = [name for name in dict.fromkeys(key for row in [*a, *b] for key in row) if not name.startswith("t_")]
    return [(name, *_agreement([row.get(name) for row in a], [row.get(name) for row in b])) for name in names]


def _agreement(left: list, right: list) -> tuple[str, str]:
    pairs = list(zip(left, right, strict=False))
    first = next((step for step, pair in enumerate(pairs) if not _same(*pair)), None)
    if first is None:
        return ("equal" if len(left) == len(right) else f"equal to step {len(pairs) - 1}, where one ends"), ""
    apart = [abs(x - y) / max(abs(x), abs(y)) for x, y in pairs if not _same(x, y) and _number(x) and _number(y)]
    return f"differ from step {first} on", f"{max(apart):.2g}" if apart else "one has no number there"


def _same(x, y) -> bool:
    return x == y or (_is_nan(x) and _is_nan(y))


def _is_nan(x) -> bool:
    return isinstance(x, float) and math.isnan(x)


def _number(x) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x)
