"""Reads one YAML file into plain dicts, lists and scalars, and refuses whatever could surprise a reader.

Refused, each with its place: duplicate keys, keys that are not text, tags (`!!python/...` and all others), anchors
and aliases (sharing is what `extends` is for, and an alias bomb needs them), merge keys, deep nesting, more than one
document, bytes that are not UTF-8. Only `true`/`false` are booleans and only plain decimals are integers, so `no`,
`on`, `010`, `1:30` and dates stay text and then meet a type error where a number was wanted.
"""

import re
from pathlib import Path

import yaml

from suite.errors import TaskError

MAX_BYTES, MAX_NODES, MAX_DEPTH = 1_000_000, 20_000, 24


class TaskErrors(TaskError):
    """Every error found in one go; `errors` lists them, the fields inherited from TaskError are those of the first."""

    def __init__(self, errors: list[TaskError]):
        first = errors[0]
        super().__init__(first.file, first.key, first.found, first.allowed, first.hint)
        self.errors = list(errors)

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the short list of implicit types below; used for its scanner, parser and composer only."""

    yaml_implicit_resolvers: dict = {}


_NUMBER_START = list("-+0123456789.")
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:null|~|)$"), ["n", "~", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), _NUMBER_START)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",  # as YAML 1.1: a dot and a signed exponent, so that other readers see the same value
    re.compile(r"^[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?$|^[-+]?\.inf$|^\.nan$"),
    _NUMBER_START,
)


def read_yaml(path: str | Path) -> tuple[object, list[TaskError]]:
    """(plain value, errors) of the file at `path`. The value is None where the file cannot be understood at all.

    Raises nothing for bad content; OSError (no such file, no permission) becomes an error in the list as well.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as problem:
        return None, [TaskError(path, "(file)", problem.strerror or str(problem), "a readable YAML file")]
    if len(data) > MAX_BYTES:
        return None, [TaskError(path, "(file)", f"{len(data)} bytes", f"at most {MAX_BYTES} bytes")]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as problem:
        return None, [TaskError(path, "(file)", f"byte 0x{data[problem.start]:02x} at {problem.start}", "UTF-8 text")]
    return parse_yaml(text, path)


def parse_yaml(text: str, path: str | Path) -> tuple[object, list[TaskError]]:
    """As `read_yaml`, for text already in hand; `path` only names it in errors."""
    try:
        errors = _check_events(text, path)
        if errors:
            return None, errors
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as problem:
        return None, [_syntax_error(problem, path)]
    if node is None:
        return None, [TaskError(path, "(file)", "an empty file", "a mapping of keys to values")]
    value = _plain(node, "", path, errors)
    if not isinstance(value, dict):
        errors.append(TaskError(path, "(file)", type(value).__name__, "a mapping of keys to values"))
        return None, errors
    return value, errors


def _check_events(text: str, path) -> list[TaskError]:
    """Anchors, aliases, tags, depth and size, looked at before anything is expanded or recursed into."""
    errors, depth, nodes = [], 0, 0
    for event in yaml.parse(text, Loader=_Loader):
        line = f"(line {event.start_mark.line + 1})"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            mark = "*" if isinstance(event, yaml.AliasEvent) else "&"
            errors.append(
                TaskError(path, line, mark + event.anchor, "no anchors or aliases", "share blocks with extends")
            )
        if getattr(event, "tag", None):
            errors.append(TaskError(path, line, event.tag, "no tags: plain text, numbers, lists and mappings"))
        nodes += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if nodes > MAX_NODES or depth > MAX_DEPTH:
            found = f"{nodes} nodes at depth {depth}"
            return [*errors[:10], TaskError(path, line, found, f"at most {MAX_NODES} nodes, {MAX_DEPTH} deep")]
        if len(errors) >= 10:
            break
    return errors


def _plain(node: yaml.Node, key: str, path, errors: list[TaskError]):
    if isinstance(node, yaml.MappingNode):
        return _plain_mapping(node, key, path, errors)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, f"{key}.{i}" if key else str(i), path, errors) for i, item in enumerate(node.value)]
    kind = node.tag.rsplit(":", 1)[-1]
    if kind == "int" and len(node.value) > 30:
        errors.append(TaskError(path, key, node.value[:30] + "...", "an integer of at most 30 digits"))
        return 0
    return {"null": lambda _: None, "bool": lambda v: v == "true", "int": int, "float": _float}.get(kind, str)(
        node.value
    )


def _float(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _plain_mapping(node: yaml.MappingNode, key: str, path, errors: list[TaskError]) -> dict:
    result: dict = {}
    for key_node, value_node in node.value:
        name = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        where = f"{key}.{name}" if key else str(name)
        line = key_node.start_mark.line + 1
        if name is None or key_node.tag != "tag:yaml.org,2002:str":
            shown = name if name is not None else "a list or mapping as key"
            errors.append(
                TaskError(path, where, shown, "keys that are text", f"line {line}; quote it if it is meant as text")
            )
        elif name in result:
            errors.append(TaskError(path, where, f"a second time in line {line}", "each key once"))
        else:
            result[name] = _plain(value_node, where, path, errors)
    return result


def _syntax_error(problem: yaml.YAMLError, path) -> TaskError:
    mark = getattr(problem, "problem_mark", None)
    where = f"(line {mark.line + 1}, column {mark.column + 1})" if mark else "(file)"
    found = getattr(problem, "problem", None) or getattr(problem, "reason", None) or str(problem).splitlines()[0]
    return TaskError(path, where, found, "one well-formed YAML document")
