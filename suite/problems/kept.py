"""Kept problem sets: what the filter writes, what RL tasks train on, and what a re-run is compared with. No torch.

    {"schema": 1, "task": ..., "cell": ..., "data": {where the pool came from}, "samples_per_prompt": 40,
     "keep_accuracy": [0.2, 0.8], "problems": [{"prompt_id": ..., "problem": ..., "gold": [...], "num_correct": ...}]}

The file's sha256 is what a task names in `data.kept` or `data.reference`; problems are compared by their text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from suite import door
from suite.errors import DataError
from suite.files import write_json
from suite.problems.data import check_sha256, count_copies, locate, read_rows
from suite.spec.checkout import find_repo

SCHEMA = 1


@dataclass(frozen=True)
class KeptProblem:
    """One problem of a kept set, without its template; num_correct of samples_per_prompt responses were right."""

    prompt_id: str
    problem: str
    gold: tuple[str, ...]
    num_correct: int


_KeptRow = TypedDict("_KeptRow", {"prompt_id": str, "problem": str, "gold": list[str], "num_correct": int})
_KeptSet = TypedDict("_KeptSet", {"schema": int, "problems": list[_KeptRow]})


def in_band(num_correct: int, num_samples: int, band: Sequence[float]) -> bool:
    """Whether the accuracy lies in [low, high], ends included: 8 of 40 is 0.2, whatever its binary digits say."""
    low, high = (round(end * num_samples, 6) for end in band)
    return low <= num_correct <= high


def write_kept(path: Path, problems: Sequence[KeptProblem], **origin: Any) -> None:
    """Write a kept set; the same problems and origin give the same bytes on every machine."""
    write_json(path, {"schema": SCHEMA, **origin, "problems": [asdict(problem) for problem in problems]})


def read_kept(path: Path) -> list[KeptProblem]:
    """The problems of a kept set, in its order. Raises DataError for a file that is none, or an empty one."""
    try:
        content = door.read_json(path.resolve(), _KeptSet)
    except door.FileError as problem:
        raise DataError(f"not a kept set of schema {SCHEMA}: {problem}") from None
    if content["schema"] != SCHEMA:
        raise DataError(f"{path}: not a kept set of schema {SCHEMA}: found schema {content['schema']}")
    fields = KeptProblem.__dataclass_fields__
    problems = [KeptProblem(**{name: row[name] for name in fields} | {"gold": tuple(row["gold"])}) for row in content["problems"]]
    if not problems:
        raise DataError(f"{path}: found no problems, allowed: a kept set of schema {SCHEMA} with at least one")
    return problems


def problem_file(spec: Mapping[str, Any]) -> Path:
    """The local copy of a `data.kept` or `data.reference`, its hash checked. Raises DataError for another file or a
    path that does not exist, NotRunnable where a published one can be had nowhere.
    """
    wanted = dict(spec)
    if wanted.get("path"):
        wanted["path"] = str(find_repo() / Path(wanted["path"]).expanduser())
    path = locate(wanted, wanted.get("name"))
    check_sha256(path, wanted.get("sha256"))
    return path


def problem_texts(spec: Mapping[str, Any]) -> list[str]:
    """The distinct problems of such a file, kept set or published Parquet."""
    path = problem_file(spec)
    if path.suffix == ".json":
        return list(dict.fromkeys(problem.problem for problem in read_kept(path)))
    return list(dict.fromkeys(row.problem for row in count_copies(read_rows(path))))
