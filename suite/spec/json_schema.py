"""The JSON Schema of a task file, from which editors complete keys: tasks/schema.json. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from suite.spec import claim_library
from suite.spec.strict_yaml import TaskErrors
from suite.spec.task import Task


def json_schema(folder: Path) -> str:
    """The schema as text; `suite lock` writes it. folder: tasks/, for the types of claims.

    Only `id` is required in it, because blocks named in `extends` may supply the rest.
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Task.model_json_schema(by_alias=True)}
    schema["required"] = ["id"]
    claims = {"type": "object", "additionalProperties": {"anyOf": [*_type_schemas(folder), _claim_schema(schema["$defs"])]}}
    schema["properties"] |= {
        "claims": {"anyOf": [claims, schema["properties"]["claims"]]},
        "fixed": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
        "claim_defaults": {"type": "object"},
    }
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


def _claim_schema(definitions: dict) -> dict:
    """A claim of the map in full."""
    parts = {name: part for kind in ("Claim", "Grade") for name, part in definitions[kind]["properties"].items() if name != "id"}
    paper = {"anyOf": [{"type": "string"}, definitions["Paper"] | {"required": ["baseline"]}]}
    tolerance = definitions["Tolerance"] | {"required": []}  # `fixed` gives the date
    return {"type": "object", "properties": parts | {"paper": paper, "tolerance": tolerance}, "additionalProperties": False}


def _type_schemas(folder: Path) -> list[dict]:
    """A claim of each type of the library. No parameter is required: claim_defaults may give any."""
    found = []
    for name in claim_library.names(folder / "_claims"):
        kind, errors = claim_library.claim_type(folder / "_claims" / f"{name}.yaml")
        if kind is None:
            raise TaskErrors(errors)
        said = {key: parameter.schema for key, parameter in kind.parameters.items()}
        parts = {"use": {"const": name}} | {key: {} for key in claim_library.BESIDE} | said
        found.append({"type": "object", "properties": parts, "required": ["use"], "additionalProperties": False})
    return found
