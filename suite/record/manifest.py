"""MANIFEST.sha256: every file below a folder with its hash, in the format of `sha256sum`, sorted by path. No torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from suite.door import look_through, read_bytes
from suite.files import sha256_once, write_atomic

NAME = "MANIFEST.sha256"
LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_manifest(folder: Path, pending: Mapping[str, bytes] = {}, besides: tuple[str, ...] = ()) -> dict[str, str]:
    """Hash every file below `folder` and write the manifest; returns hashes by path.

    pending: files that are written next, with their content. besides: names at the top of the folder that are no part
    of it.
    """
    hashes = {name: sha256_once(folder / name) for name in _parts(look_through(folder).files, besides)}
    hashes |= {name: hashlib.sha256(content).hexdigest() for name, content in pending.items()}
    write_atomic(folder / NAME, "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode())
    return hashes


def check_manifest(folder: Path, besides: tuple[str, ...] = ()) -> list[str]:
    """What differs between the folder and its manifest, one sentence each; empty when all files are as written. A link, a
    FIFO or a device is a difference, and so is a manifest inside a folder below."""
    path = folder / NAME
    if not path.exists():
        return [f"{path}: missing"]
    listed, problems = _listed(path)
    there = look_through(folder)
    present, foreign = _parts(there.files, besides), _parts(there.foreign, besides)
    problems += [f"{folder / name}: {there.foreign[name]}, not a file" for name in foreign]
    problems += [f"{folder / name}: not in the manifest" for name in present if name not in listed]
    problems += [f"{folder / name}: in the manifest, but missing" for name in sorted(listed.keys() - {*present, *foreign})]
    for name in present:
        if name in listed and (found := sha256_once(folder / name)) != listed[name]:
            problems.append(f"{folder / name}: sha256 {found}, the manifest says {listed[name]}")
    return problems


def _listed(path: Path) -> tuple[dict[str, str], list[str]]:
    """(hashes by name, what is wrong with the lines)."""
    listed, problems = {}, []
    for number, line in enumerate(read_bytes(path).decode("utf-8", "replace").removesuffix("\n").split("\n"), 1):
        match = LINE.fullmatch(line)
        if match is None or match[2] in listed:
            what = "names a file again" if match else "is not `<sha256>  <file>`"
            problems.append(f"{path}: line {number} {what}")
        else:
            listed[match[2]] = match[1]
    return listed, problems


def _parts(names, besides: tuple[str, ...]) -> list[str]:
    return [name for name in names if name != NAME and name.split("/")[0] not in besides]
