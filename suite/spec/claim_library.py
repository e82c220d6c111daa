"""The types of claims in tasks/_claims: a file each, named after what is claimed, with its parameters and the claim they
make. The library is closed: a task names a type with `use` and gives its parameters, and cannot say something else.

    parameters:
      arm: arm                                # a parameter and its type
      at_least: share
      window: {type: count, default: 4}       # one that may be left out; null: nothing
    claim:
      statement: In $arm training accuracy is at least $at_least.
      accept: [$at_least, 1.0]

A value that is `$name` stands for the parameter; within a longer text it is written as words of its type (0.95 as 95 %).
There is nothing else: no condition, no arithmetic, no default that depends on another. A parameter that a claim does not
give is taken from `claim_defaults` of the task or of its blocks, then from the type. Beside its parameters a claim may
say the keys of BESIDE, which replace what the type says (of a mapping, key by key). No torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.errors import TaskError
from suite.spec.kinds import KINDS
from suite.spec.strict_yaml import view_yaml
from suite.spec.task_errors import origin

BESIDE = ("about", "statement", "paper", "at", "until", "remark_band", "min_seeds", "floor", "tolerance")
_PARAMETER = re.compile(r"\$([a-z][a-z0-9_]*)")
_NOTHING = object()


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Type:
    """What a parameter may be: in words, as a test, in a JSON Schema, and how a value reads in a sentence."""

    allowed: str
    fits: Callable[[Any], bool]
    schema: dict
    words: Callable[[Any], str]


TYPES = {
    "arm": Type("the name of an arm or of a control", lambda v: isinstance(v, str), {"type": "string"}, str),
    "number": Type("a number", _number, {"type": "number"}, lambda v: f"{v:.10g}"),
    "share": Type("a number from 0 to 1", lambda v: _number(v) and 0 <= v <= 1,
                  {"type": "number", "minimum": 0, "maximum": 1}, lambda v: f"{100 * v:.10g} %"),
    "count": Type("a whole number from 1", lambda v: _number(v) and isinstance(v, int) and v >= 1,
                  {"type": "integer", "minimum": 1}, lambda v: f"{v:,}"),
    "text": Type("text", lambda v: isinstance(v, str), {"type": "string"}, str),
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """type: a key of TYPES. default: _NOTHING where it must be given."""

    type: str
    default: Any = _NOTHING

    def refusal(self, value: Any) -> str | None:
        """What would be allowed, where the value is not."""
        fits = TYPES[self.type].fits(value) or value is None and self.default is None
        return None if fits else TYPES[self.type].allowed

    @property
    def schema(self) -> dict:
        """For editors."""
        return TYPES[self.type].schema if self.default is not None else {"anyOf": [TYPES[self.type].schema, {"type": "null"}]}


@dataclass(frozen=True)
class ClaimType:
    """One file of the library: parameters by name, and the claim with `$name` where they go."""

    name: str
    parameters: dict[str, Parameter]
    claim: dict


def names(folder: Path) -> list[str]:
    """The types there are, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def claim_type(path: Path) -> tuple[ClaimType | None, list[TaskError]]:
    """(type, errors) of one file of the library; None with errors."""
    raw, errors = view_yaml(path)
    if errors or not isinstance(raw, dict):
        return None, errors
    errors = [TaskError(path, key, key, "parameters and claim") for key in sorted(raw.keys() - {"parameters", "claim"})]
    parameters, problems = _parameters(raw.get("parameters", {}), path)
    claim = raw.get("claim")
    if not isinstance(claim, dict):
        return None, [*errors, *problems, TaskError(path, "claim", claim, "a mapping: the claim that the parameters make")]
    errors += problems or _uses(claim, parameters, path)
    return (None, errors) if errors else (ClaimType(path.stem, parameters, claim), [])


def written_out(body: dict, task: dict, layers: list, claim_id: str, folder: Path) -> tuple[dict, list[TaskError]]:
    """(the claim in full, errors) of a claim that says `use`. task: the merged task; layers: its files, for errors."""
    file, key, there = layers[0][0], f"claims.{claim_id}", names(folder)
    if body["use"] not in there:
        near = difflib.get_close_matches(str(body["use"]), there, n=1)
        hint = f"did you mean {near[0]}?" if near else None
        return {}, [TaskError(file, f"{key}.use", body["use"], "a type in tasks/_claims: " + ", ".join(there), hint)]
    kind, errors = claim_type(folder / f"{body['use']}.yaml")
    if kind is None:
        return {}, errors
    values, errors = _values(kind, body, task, layers, key)
    if errors:
        return {}, errors
    beside = {name: body[name] for name in BESIDE if name in body and name not in kind.parameters}
    claim = kind.claim if "statement" not in beside else kind.claim | {"statement": ""}  # so that it asks for no parameter
    filled, empty = _filled(claim, kind, values)
    if empty:
        allowed = f"{TYPES[kind.parameters[empty].type].allowed}: the statement of {kind.name} names it; or a statement"
        return {}, [TaskError(file, f"{key}.{empty}", "nothing", allowed)]
    return _merged(filled, beside), []


def strange_defaults(defaults: Any, layers: list, folder: Path) -> list[TaskError]:
    """What of `claim_defaults` no type of the library has as a parameter."""
    if not isinstance(defaults, dict):
        return [TaskError(origin(layers, ("claim_defaults",)), "claim_defaults", defaults, "a mapping of parameters to values")]
    kinds = [claim_type(path)[0] for path in sorted(folder.glob("*.yaml"))] if defaults else []
    known = None if None in kinds else {name for kind in kinds for name in kind.parameters}
    if known is None:  # a type that cannot be read may be what a default is for
        return []
    allowed = "a parameter of a type in tasks/_claims: " + ", ".join(sorted(known))
    return [TaskError(origin(layers, ("claim_defaults", name)), f"claim_defaults.{name}", name, allowed) for name in sorted(defaults.keys() - known)]


def _merged(claim: dict, beside: dict) -> dict:
    both = {name: claim[name] | part for name, part in beside.items() if isinstance(part, dict) and isinstance(claim.get(name), dict)}
    return claim | beside | both


def _parameters(raw: Any, path: Path) -> tuple[dict[str, Parameter], list[TaskError]]:
    if not isinstance(raw, dict):
        return {}, [TaskError(path, "parameters", raw, "a mapping of names to types")]
    found, errors = {}, []
    for name, said in raw.items():
        said = {"type": said} if isinstance(said, str) else said
        if not isinstance(said, dict) or said.get("type") not in list(TYPES) or said.keys() - {"type", "default"}:
            errors.append(TaskError(path, f"parameters.{name}", said, f"one of {', '.join(TYPES)}, or {{type: ..., default: ...}}"))
            continue
        found[name] = Parameter(said["type"], said.get("default", _NOTHING))
        if "default" in said and (allowed := found[name].refusal(said["default"])):
            errors.append(TaskError(path, f"parameters.{name}.default", said["default"], f"{allowed}, or null"))
    return found, errors


def _uses(claim: dict, parameters: dict[str, Parameter], path: Path) -> list[TaskError]:
    """Every `$name` is a parameter, and every parameter is used."""
    used = {name: key for key, text in _texts(claim, "claim") for name in _PARAMETER.findall(text)}
    unknown = [TaskError(path, used[name], f"${name}", f"a parameter: {', '.join(parameters)}") for name in sorted(used.keys() - parameters.keys())]
    return unknown + [TaskError(path, f"parameters.{name}", name, f"a parameter that the claim uses, as ${name}") for name in parameters if name not in used]


def _texts(value: Any, key: str):
    if isinstance(value, str):
        yield key, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inner:
        yield from _texts(part, f"{key}.{name}")


def _values(kind: ClaimType, body: dict, task: dict, layers: list, key: str) -> tuple[dict, list[TaskError]]:
    """The parameters of a claim: its own, the task's defaults, the type's; each of its type."""
    file, values, errors = layers[0][0], {}, []
    defaults = task.get("claim_defaults") if isinstance(task.get("claim_defaults"), dict) else {}
    for name in sorted(body.keys() - {"use", *BESIDE, *kind.parameters}):
        allowed = [*kind.parameters, *(one for one in BESIDE if one not in kind.parameters)]
        near = difflib.get_close_matches(name, allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else None
        errors.append(TaskError(file, f"{key}.{name}", name, f"one of the keys of {kind.name}: {', '.join(allowed)}", hint))
    for name, parameter in kind.parameters.items():
        value = body[name] if name in body else defaults.get(name, parameter.default)
        where = (file, f"{key}.{name}") if name in body or name not in defaults else (origin(layers, ("claim_defaults", name)), f"claim_defaults.{name}")
        if value is _NOTHING:
            errors.append(TaskError(*where, "nothing", f"{TYPES[parameter.type].allowed} ({kind.name} needs it)"))
        elif allowed := parameter.refusal(value) or _no_arm(parameter, value, task):
            errors.append(TaskError(*where, value, allowed))
        values[name] = value
    return values, errors


def _no_arm(parameter: Parameter, value: Any, task: dict) -> str | None:
    """The arms and controls there are, where this is none of them. Those of a comparison stand in other files."""
    arms, controls = task.get("arms"), task.get("controls", [])
    elsewhere = any(kind.compares and kind.name == task.get("protocol") for kind in KINDS.values())
    if parameter.type != "arm" or elsewhere or not isinstance(arms, dict):
        return None
    there = [*arms, *(one.get("name") for one in controls if isinstance(one, dict))] if isinstance(controls, list) else [*arms]
    return None if value in there else f"an arm or control: {', '.join(map(str, there))}"


def _filled(value: Any, kind: ClaimType, values: dict) -> tuple[Any, str | None]:
    """(the value with its parameters in place, a parameter that is null where a sentence names it)."""
    empty = []

    def words(found: re.Match) -> str:
        if values[found[1]] is None:
            empty.append(found[1])
            return ""
        return TYPES[kind.parameters[found[1]].type].words(values[found[1]])

    def fill(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: fill(inner) for name, inner in part.items()}
        if isinstance(part, list):
            return [fill(inner) for inner in part]
        if isinstance(part, str) and (whole := _PARAMETER.fullmatch(part)):
            return values[whole[1]]
        return _PARAMETER.sub(words, part) if isinstance(part, str) else part

    return fill(value), (empty or [None])[0]
