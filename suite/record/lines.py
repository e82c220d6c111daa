"""The lines of a growing metrics.jsonl, each sealed: it holds the hash of its part's evidence, and the hash of itself and
of all lines before it. So a resume, and whoever reads a run that has no manifest yet, sees the first bad one.

    {"evidence_sha256": "...", "k3_nats_per_token": 4.9e-06, "step": 0, "line_sha256": "..."}

`line_sha256` is that of the `line_sha256` before it (nothing before the first) followed by the line without its own. Lines
of older runs have neither. No torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from suite.door import FileError, parse_json, typed
from suite.files import json_safe, with_numbers

EVIDENCE, SEAL = "evidence_sha256", "line_sha256"
_SEALED = re.compile(rb'(\{.+), "line_sha256": "([0-9a-f]{64})"\}')


@dataclass(frozen=True)
class Line:
    """One part as metrics.jsonl has it: its bytes, what was measured, the hash of its evidence, its own hash. Hashes are
    None where it has none."""

    data: bytes
    row: dict
    evidence: str | None
    seal: str | None


def sealed(row: dict, before: str | None, evidence: str | None = None) -> Line:
    """The line of a part, to be written after the line whose hash is `before`."""
    content = json_safe(row) | ({EVIDENCE: evidence} if evidence else {})
    body = json.dumps(content, sort_keys=True).encode()[:-1]
    seal = _chained(before, body)
    return Line(body + f', "{SEAL}": "{seal}"}}\n'.encode(), with_numbers(json_safe(row)), evidence, seal)


def read_lines(data: bytes, path: Path) -> tuple[list[Line], str | None]:
    """(the lines up to the first that cannot be used, what is wrong there or None). A last line without its end was cut
    short by a kill, or is being written."""
    lines: list[Line] = []
    *whole, cut = data.split(b"\n")
    for number, text in enumerate(whole, 1):
        try:
            lines.append(_read(text, path, f"line {number}", lines[-1].seal if lines else None))
        except FileError as problem:
            return lines, str(problem).removeprefix(f"{path}: ")
    return lines, f"a line cut short after line {len(lines)}" if cut else None


def _read(text: bytes, path: Path, place: str, before: str | None) -> Line:
    match = _SEALED.fullmatch(text)
    if match and _chained(before, match[1]) != match[2].decode():
        raise FileError(path, place, "a line that its hash does not fit", "the line as it was written")
    if before and not match:
        raise FileError(path, place, f"no {SEAL} at its end", "one, as the lines before it have")
    row = with_numbers(typed(parse_json(text, path, place), dict, path, place))
    row.pop(SEAL, None)
    return Line(text + b"\n", row, row.pop(EVIDENCE, None), match[2].decode() if match else None)


def _chained(before: str | None, body: bytes) -> str:
    return hashlib.sha256((before or "").encode() + body).hexdigest()
