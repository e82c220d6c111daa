"""Reads one YAML file into plain dicts, lists and scalars, and refuses whatever could surprise a reader.

Refused, each with its place: duplicate keys, keys that are not text, tags (`!!python/...` and all others), anchors
and aliases (sharing is what `extends` is for, and an alias bomb needs them), merge keys, deep nesting, more than one
document, bytes that are not UTF-8, control characters, numbers that are not finite. Only `true`/`false` are booleans
and only plain decimals are numbers. Whatever else some YAML reader takes for a number, a boolean or null (`1e-9`, `010`,
`1:30`, `no`) is refused wherever it stands without quotes: it would be text here and a value there. Dates are text.
"""

import copy
import math
import re
import stat
from functools import lru_cache
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


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """SafeLoader with the short list of implicit types below; used for its scanner, parser and composer only. In C where
    PyYAML was built with libyaml: nine times as fast."""

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
# What the core schemas of YAML 1.1 and 1.2, or Python, read as a value and the types above do not.
_AMBIGUOUS = (
    (re.compile(r"[-+]?(?=[0-9.])[0-9][0-9_]*\.?[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"), "a number"),
    (re.compile(r"[-+]?0(?:x[0-9a-fA-F_]+|o[0-7_]+|b[01_]+)|[-+]?[0-9]+(?::[0-5]?[0-9])+(?:\.[0-9_]*)?"), "a number"),
    (re.compile(r"[-+]?\.?inf(?:inity)?|\.?nan", re.IGNORECASE), "a finite number"),
    (re.compile(r"true|false|yes|no|on|off|y|n", re.IGNORECASE), "true or false"),
    (re.compile(r"null", re.IGNORECASE), "null"),
)
_WITH_EXPONENT = re.compile(r"([-+]?)([0-9]*)(?:\.([0-9]*))?[eE]([-+]?)([0-9]+)")
# Also what turns the direction of a line, so that a person reads something else than the machine.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_LARGEST = 2**63  # of int64, in which steps and seeds are written


def read_yaml(path: str | Path) -> tuple[object, list[TaskError]]:
    """(plain value, errors) of the file at `path`. The value is None where the file cannot be understood at all.

    Raises nothing for bad content; OSError (no such file, no permission) becomes an error in the list as well.
    """
    value, errors = view_yaml(path)
    return copy.deepcopy(value), list(errors)


def view_yaml(path: str | Path) -> tuple[object, list[TaskError]]:
    """As `read_yaml`, of what is read again and again: the value is shared with everybody else who asks. Change nothing."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            return None, [TaskError(path, "(file)", "a folder, pipe or device", "a regular file")]
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as problem:  # ValueError: a name with NUL in it
        return None, [TaskError(path, "(file)", getattr(problem, "strerror", None) or str(problem), "a readable YAML file")]
    return _read_bytes(data, str(path))


@lru_cache(maxsize=512)  # by content: blocks and compared tasks are read again and again, and nothing here can be stale
def _read_bytes(data: bytes, path: str) -> tuple[object, list[TaskError]]:
    if len(data) > MAX_BYTES:
        return None, [TaskError(path, "(file)", f"over {MAX_BYTES} bytes", f"at most {MAX_BYTES} bytes")]
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
    except (ValueError, OverflowError) as problem:  # PyYAML without libyaml: an escape such as \UFFFFFFFF
        return None, [TaskError(path, "(file)", str(problem), "one well-formed YAML document")]
    if node is None:
        return None, [TaskError(path, "(file)", "an empty file", "a mapping of keys to values")]
    value = _plain(node, "", path, errors)
    if not isinstance(value, dict):
        errors.append(TaskError(path, "(file)", type(value).__name__, "a mapping of keys to values"))
        return None, errors
    return value, errors


def number_hint(text) -> str | None:
    """How to write a number that YAML 1.1 reads as text (1e-9); None for anything else."""
    match = _WITH_EXPONENT.fullmatch(text) if isinstance(text, str) else None
    if match is None or not (match[2] or match[3]):
        return None
    sign, whole, fraction, exponent_sign, exponent = match.groups()
    number = f"{sign}{whole or '0'}.{fraction or '0'}e{exponent_sign or '+'}{exponent}"
    return f"YAML 1.1 reads {text} as text; write {number}"


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
    return _scalar(node, key, path, errors)


def _scalar(node: yaml.ScalarNode, key: str, path, errors: list[TaskError]):
    """The value of one scalar. A refused one is kept as the text it is, for a type error at the same key would say no more."""
    kind, text = node.tag.rsplit(":", 1)[-1], node.value
    if kind == "null":
        return None
    if kind == "bool":
        return text == "true"
    if kind == "int" and len(text) < 30 and -_LARGEST <= int(text) < _LARGEST:
        return int(text)
    if kind == "float" and math.isfinite(_float(text)):
        return _float(text)
    if kind in ("int", "float"):
        allowed = "an integer of at most 63 bits" if kind == "int" else "a finite number"
        errors.append(TaskError(path, key, _short(text), allowed))
    elif found := _CONTROL.search(text):
        errors.append(TaskError(path, key, found.group(), "text without control characters"))
    elif not node.style and (meant := next((what for form, what in _AMBIGUOUS if form.fullmatch(text)), None)):
        hint = number_hint(text) or f"as text: '{_short(text)}'"
        errors.append(TaskError(path, key, _short(text), meant, hint))
    return text


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


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
        elif _CONTROL.search(name):
            errors.append(TaskError(path, ascii(where)[1:-1], name, "keys without control characters", f"line {line}"))
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
