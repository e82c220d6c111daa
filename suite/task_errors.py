"""Turns what pydantic found into the suite's own errors: file, dotted key, value found, values allowed, and what to
write instead.
"""

import difflib
import re
from typing import get_args

from pydantic import BaseModel, ValidationError

from suite.errors import TaskError

_NUMBER_AS_TEXT = re.compile(r"^([-+]?)(\d+)(?:\.(\d*))?[eE]([-+]?)(\d+)$")
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
    return [_explain_one(error, raw, model, layers, prefix) for error in problem.errors(include_url=False)]


def origin(layers: list[tuple], location: tuple):
    """The nearest layer that has most of the location; the task file when no layer has any of it."""
    return max(layers, key=lambda layer: _depth(layer[1], location))[0]


def _depth(value, location: tuple) -> int:
    depth = 0
    for part in location:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            break
        depth += 1
    return depth


def _explain_one(error: dict, raw: dict, model: type[BaseModel], layers: list[tuple], prefix: str) -> TaskError:
    location, kind, found = error["loc"], error["type"], error.get("input")
    key = prefix + ".".join(str(part) for part in location)
    hint = _number_hint(found)
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


def _number_hint(found) -> str | None:
    match = _NUMBER_AS_TEXT.match(found) if isinstance(found, str) else None
    if match is None:
        return None
    sign, whole, fraction, exponent_sign, exponent = match.groups()
    number = f"{sign}{whole}.{fraction or '0'}e{exponent_sign or '+'}{exponent}"
    return f"YAML 1.1 reads {found} as text; write {number}"


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
