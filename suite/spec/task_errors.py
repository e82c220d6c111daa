"""Turns what pydantic found into the suite's own errors: file, dotted key, value found, values allowed, and what to
write instead.
"""

import difflib
import re
from typing import get_args

from pydantic import BaseModel, ValidationError

from suite.errors import TaskError
from suite.spec.strict_yaml import number_hint

_ALLOWED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "finite_number": "a finite number",
    "model_attributes_type": "a mapping",
}


def explain(
    problem: ValidationError, raw: dict, model: type[BaseModel], layers: list[tuple], prefix: str = ""
) -> list[TaskError]:
    """One TaskError per finding. `layers`: (file, its mapping) from the task to the farthest block; the error names
    the file it came from.
    """
    found = [_explain_one(error, raw, model, layers, prefix) for error in problem.errors(include_url=False)]
    found = list({error.key: error for error in found}.values())  # a list that lacks several entries is said once
    return [error for error in found if not any(other.key.startswith(f"{error.key}.") for other in found)]  # nor for its content


def field_locations(problem: ValidationError) -> list[tuple]:
    """Every faulty place once; of a list the later entries first, so that taking one out moves no other."""
    found = {_location(error) for error in problem.errors(include_url=False)}
    return sorted(found, key=lambda location: [(isinstance(part, str), part) for part in location], reverse=True)


def take_out(raw, location: tuple) -> bool:
    """Delete what stands at a location: the whole list where it lacks the entry. False where there is nothing to take
    out (a required key is missing)."""
    if not location:
        return False
    *above, last = location
    inside = raw
    for part in above:
        if not _holds(inside, part):
            return False
        inside = inside[part]
    if _holds(inside, last):
        del inside[last]
        return True
    return isinstance(inside, list) and take_out(raw, tuple(above))


def _holds(value, part) -> bool:
    return part in value if isinstance(value, dict) else isinstance(value, list) and part in range(len(value))


def _location(error: dict) -> tuple:
    """Where pydantic found it, without its mark for "the key itself": (arms, "a b", [key]) is (arms, "a b")."""
    return tuple(part for part in error["loc"] if part != "[key]")


def origin(layers: list[tuple], location: tuple):
    """The nearest layer that has most of the location; the task file when no layer has any of it."""
    return max(layers, key=lambda layer: _depth(layer[1], location))[0]


def _depth(value, location: tuple) -> int:
    depth = 0
    for part in location:
        if not _holds(value, part):
            break
        value, depth = value[part], depth + 1
    return depth


def _explain_one(error: dict, raw: dict, model: type[BaseModel], layers: list[tuple], prefix: str) -> TaskError:
    location, kind, found = _location(error), error["type"], error.get("input")
    key = prefix + ".".join(str(part) for part in location) or "(file)"
    hint = number_hint(found)
    if kind == "missing" and isinstance(location[-1], int):
        where, count = location[:-1], location[-1] + 1  # of the last entry that is missing, since that is the one kept
        return TaskError(origin(layers, where), key.rpartition(".")[0], found, f"a list of {count} entries")
    if kind == "missing":
        return TaskError(origin(layers, location[:-1]), key, "nothing", _field_text(model, location))
    if kind == "extra_forbidden":
        allowed = _fields_at(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else None
        return TaskError(origin(layers, location), key, location[-1], "one of the keys " + ", ".join(allowed), hint)
    allowed = _ALLOWED.get(kind) or _allowed_from(error)
    return TaskError(origin(layers, location), key, found, allowed, hint)


def _allowed_from(error: dict) -> str:
    context, kind = error.get("ctx") or {}, error["type"]
    if kind == "literal_error":
        return context["expected"].replace("'", "")
    if kind == "string_pattern_mismatch":
        return f"text that matches {context['pattern']}"
    if kind in ("too_short", "too_long", "missing_positional_only_argument"):
        size = context.get("min_length", context.get("max_length"))
        return f"{'at least' if kind == 'too_short' else 'at most'} {size} entries"
    return error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")


def _models_in(annotation) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _model_at(model: type[BaseModel], location: tuple) -> type[BaseModel]:
    """The nested model in which a location ends; indices and names of mappings are stepped over."""
    for part in location:
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        if part in fields:
            inner = _models_in(fields[part].annotation)
            model = inner[0] if inner else model
    return model


def _fields_at(model: type[BaseModel], location: tuple) -> list[str]:
    return [field.alias or name for name, field in _model_at(model, location).model_fields.items()]


def _field_text(model: type[BaseModel], location: tuple) -> str:
    for name, field in _model_at(model, location[:-1]).model_fields.items():
        if location[-1] in (name, field.alias):
            inner = _models_in(field.annotation)
            kind = (
                "a mapping"
                if inner
                else re.sub(r"typing\.|<class '|'>|Annotated\[|, FieldInfo.*", "", str(field.annotation))
            )
            return f"{kind} (required)"
    return "a value (required)"
