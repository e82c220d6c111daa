"""The claims of a task as its file says them: one map, in which a claim holds what is stated, what the paper reports and
how it is judged. `expand` turns it into the two parts that Task holds, `claims` and `grade`.

    claims:
      C6-fp16-accuracy: {use: accuracy-at-least, arm: fp16, at_least: 0.95, paper: C6.last.gspo}
      C24-underflow:
        statement: Without loss scaling a larger share of the fp16 weight gradients is zero or subnormal.
        kind: threshold
        paper: C24.smallest_normal_fp16
        estimand: grad_underflow_share
        contrast: {difference: [fp16-unscaled, fp16]}
        accept: [0.0, 1.0]
        tolerance: {level: P0, derivation: the claim is the sign}

What a claim does not say follows from what it is: `about` from its id, the interval and the number of seeds from its
kind, the paper's value, unit, source and level from baselines/paper.yaml, the date of a tolerance from the task's `fixed`.
`use` names a type of claim in tasks/_claims (claim_library.py). No torch.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from suite.errors import TaskError
from suite.spec.claim_library import strange_defaults, written_out
from suite.spec.strict_yaml import view_yaml

OF_THE_CLAIM = ("about", "statement", "kind", "paper")
INTERVAL = {"method": "student_t", "level": 0.90, "unit": "seed"}
INTERVALS = {"event": INTERVAL | {"method": "clopper_pearson"}, "count": INTERVAL | {"method": "exact"}}
MIN_SEEDS = {"event": 5, "count": 1, "report": 1}  # 3 for any other kind
A_DATE = "the date on which the accept regions were fixed, as 2026-11-20"
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")


def is_date(text: str) -> bool:
    """A day that the calendar has, as 2026-11-20."""
    try:
        return bool(_DATE.fullmatch(text) and date.fromisoformat(text))
    except ValueError:
        return False


@dataclass(frozen=True)
class Form:
    """How a file with a map of claims says them. ids: the claims in the order of Task. types: claim -> (the type that it
    uses, the keys that it says itself)."""

    ids: list[str]
    types: dict[str, tuple[str, frozenset[str]]]


@dataclass(frozen=True)
class Expanded:
    """raw: the mapping that Task validates. form: None if the file keeps `claims` and `grade` apart. left_out: keys of the
    file about which nothing more can be said."""

    raw: dict
    form: Form | None = None
    errors: list[TaskError] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """Where a claim stands: `file` and dotted `key`, for errors."""

    file: Path
    key: str

    def error(self, name: str, found, allowed: str, hint: str | None = None) -> TaskError:
        return TaskError(self.file, f"{self.key}.{name}" if name else self.key, found, allowed, hint)


class Refused(Exception):
    """A claim that cannot be expanded; `errors` say why."""

    def __init__(self, *errors: TaskError):
        super().__init__(*errors)
        self.errors = list(errors)


def expand(raw: dict, layers: list[tuple[Path, dict]], grade_keys: tuple[str, ...], folder: Path) -> Expanded:
    """A merged task mapping with `claims` as a list and `grade` beside it. layers: the task file and its blocks, for
    errors; grade_keys: the fields of a grade; folder: tasks/. A file whose claims are a list already comes back as it is,
    without the defaults of its blocks.
    """
    if not isinstance(raw.get("claims"), dict):
        blocks_alone = "claim_defaults" not in layers[0][1]
        return Expanded({name: part for name, part in raw.items() if name != "claim_defaults"} if blocks_alone else raw)
    rest = {name: part for name, part in raw.items() if name not in ("fixed", "claim_defaults")}
    errors, left_out, claims, grades = _of_the_task(raw, layers, folder), [], [], {}
    for claim_id, body in raw["claims"].items():
        try:
            claim, grade = _expand_one(claim_id, body, raw, layers, grade_keys, folder)
        except Refused as refused:
            errors += refused.errors
            left_out.append(f"claims.{claim_id}")
            continue
        claims.append(claim)
        grades |= {claim_id: grade} if grade else {}
    errors += _undated(grades, raw, layers[0][0])
    left_out += ["claims"] if left_out and not claims else []
    bodies = {claim["id"]: raw["claims"][claim["id"]] for claim in claims}
    types = {name: (body["use"], frozenset(body)) for name, body in bodies.items() if "use" in body}
    return Expanded(rest | {"claims": claims, "grade": grades}, Form(list(bodies), types), errors, left_out)


def written_key(key: str, form: Form | None) -> str:
    """The key as it stands in the file: `grade.C1.accept` and `claims.0.kind` are `claims.C1.accept` and `claims.C1.kind`
    where claims are a map."""
    if form is None:
        return key
    if key == "grade" or key.startswith("grade."):
        return "claims" + key.removeprefix("grade")
    found = re.match(r"claims\.(\d+)(?=\.|$)", key)
    return f"claims.{form.ids[int(found[1])]}{key[found.end():]}" if found and int(found[1]) < len(form.ids) else key


def as_written(error: TaskError, form: Form | None) -> TaskError:
    """The error under the key that stands in the file; of what a type says, with the type's file."""
    key, hint = written_key(error.key, form), error.hint
    _, claim, name, *_ = f"{key}...".split(".")
    if form is not None and key.startswith("claims.") and claim in form.types and name not in form.types[claim][1]:
        hint = "; ".join(filter(None, (hint, f"said by tasks/_claims/{form.types[claim][0]}.yaml")))
    return TaskError(error.file, key, error.found, error.allowed, hint)


def interval_of(kind: str) -> dict:
    """The interval of a kind of claim, where the file does not say another."""
    return dict(INTERVALS.get(kind, INTERVAL))


def _of_the_task(raw: dict, layers: list, folder: Path) -> list[TaskError]:
    file, errors = layers[0][0], strange_defaults(raw.get("claim_defaults", {}), layers, folder / "_claims")
    if "grade" in raw:
        errors.append(TaskError(file, "grade", "a map of its own", "nothing: where claims are a map, each holds its grade"))
    fixed = raw.get("fixed")
    if fixed is not None and not (isinstance(fixed, str) and is_date(fixed)):
        errors.append(TaskError(file, "fixed", fixed, A_DATE))
    return errors


def _undated(grades: dict[str, dict], raw: dict, file: Path) -> list[TaskError]:
    """Tolerances without a date in a task without one, said once. They get one that stands for none, so that nothing more is
    said about them."""
    bare = [name for name, grade in grades.items() if isinstance(grade.get("tolerance"), dict) and "date" not in grade["tolerance"]]
    for name in bare:
        grades[name]["tolerance"] = grades[name]["tolerance"] | {"date": "2000-01-01"}
    allowed = f"{A_DATE} (or tolerance.date in {', '.join(bare)})"
    return [TaskError(file, "fixed", "nothing", allowed)] if bare and "fixed" not in raw else []


def _expand_one(claim_id: str, body: Any, raw: dict, layers: list, grade_keys: tuple[str, ...], folder: Path) -> tuple[dict, dict]:
    """(claim, grade) of one entry of the map; the grade is empty where nothing of one is said. Raises Refused."""
    place = Place(layers[0][0], f"claims.{claim_id}")
    if not _ID.fullmatch(claim_id):
        raise Refused(place.error("", claim_id, f"an id that matches {_ID.pattern}"))
    if not isinstance(body, dict):
        raise Refused(place.error("", body, "a mapping: {use: ..., ...}, or statement, kind, estimand, ..."))
    if "use" in body:
        kind, (body, problems) = body["use"], written_out(body, raw, layers, claim_id, folder / "_claims")
        problems = problems or _unknown(body, Place(folder / "_claims" / f"{kind}.yaml", "claim"), (*OF_THE_CLAIM, *grade_keys))
    else:
        problems = _unknown(body, place, ("use", *OF_THE_CLAIM, *grade_keys))
    if problems:
        raise Refused(*problems)
    claim = {"id": claim_id, "about": claim_id.partition("-")[0]} | {name: body[name] for name in OF_THE_CLAIM if name in body}
    if "paper" in claim:
        claim["paper"] = _paper(claim["paper"], place, folder)
    return claim, _grade({name: body[name] for name in grade_keys if name in body}, claim.get("kind"), raw.get("fixed"))


def _unknown(body: dict, place: Place, allowed: tuple[str, ...]) -> list[TaskError]:
    errors = []
    for name in body.keys() - set(allowed):
        near = difflib.get_close_matches(name, allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else None
        errors.append(place.error(name, name, "one of the keys " + ", ".join(allowed), hint))
    return sorted(errors, key=lambda error: error.key)


def _grade(said: dict, kind: Any, fixed: Any) -> dict:
    if not said:
        return {}
    kind = kind if isinstance(kind, str) else ""
    grade = {"interval": interval_of(kind), "min_seeds": MIN_SEEDS.get(kind, 3)} | said
    if isinstance(grade.get("tolerance"), dict) and isinstance(fixed, str) and is_date(fixed):
        grade["tolerance"] = grade["tolerance"] | {"date": grade["tolerance"].get("date", fixed)}
    return {name: value for name, value in grade.items() if value is not None or name == "interval"}


def _paper(said: Any, place: Place, folder: Path) -> Any:
    """What the paper reports, from its key: `C6.last.gspo`, or a mapping with that key as `baseline` and what is said
    otherwise than baselines/paper.yaml says it."""
    given = {"baseline": said} if isinstance(said, str) else said
    if not isinstance(given, dict) or not isinstance(given.get("baseline"), str):
        return given  # Task says what is wrong with it
    ledger, problems = view_yaml(folder.parent / "baselines" / "paper.yaml")
    if problems:
        raise Refused(*problems)
    entry, (name, *inner) = ledger, given["baseline"].split(".")
    for part in (name, *inner):
        if not isinstance(entry, dict) or part not in entry:
            here = ", ".join(entry) if isinstance(entry, dict) else entry
            allowed = f"a key in baselines/paper.yaml; at this place: {here}"
            raise Refused(place.error("paper" if isinstance(said, str) else "paper.baseline", given["baseline"], allowed))
        entry = entry[part]
    return _reported(ledger[name], inner, entry) | given


def _reported(claim: Any, inner: list[str], value: Any) -> dict:
    """value, unit, source and level of one number of the ledger; the nearest of `units` and `sources` holds for it."""
    found = {"value": value, **{name: claim[name] for name in ("unit", "source", "level") if name in claim}} if isinstance(claim, dict) else {}
    for length in range(1, len(inner) + 1):
        key = ".".join(inner[:length])
        found |= {"unit": claim["units"][key]} if key in claim.get("units", {}) else {}
        found |= claim.get("sources", {}).get(key, {})
    return found
