"""Every value of every published verdict, recomputed from the published records, before and after a change of the code.

    python -m tests.verdict_numbers write before.json      in the checkout as it was
    python -m tests.verdict_numbers against before.json    after the change: exit 0 where every value is the same, bit for bit

`suite verify` compares with the published file up to 1e-9 and accepts a verdict that was published again; this compares
two states of the code with each other and accepts nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from suite.archive.publishing import compute_verdict, fingerprint_folders
from suite.spec.checkout import find_repo
from suite.spec.reading import load_all


def recomputed(results_dir: Path) -> dict[str, object]:
    """{"<task>/<machine>: claims.0.estimate": value} of all published verdicts; floats as repr gives them."""
    tasks, found = load_all(), {}
    for folder in fingerprint_folders(results_dir):
        verdict = compute_verdict(tasks[folder.parent.name], folder.name, results_dir)
        place = folder.relative_to(results_dir).as_posix()
        found |= {f"{place}: {name}": value for name, value in leaves(json.loads(json.dumps(verdict)))}
    return found


def leaves(value, path: str = ""):
    """(dotted path, leaf) of nested JSON; an empty list or mapping is a leaf."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not parts:
        yield path, value
    for name, part in parts:
        yield from leaves(part, f"{path}.{name}" if path else str(name))


def differences(before: dict, after: dict) -> list[str]:
    """One line per value that is not the same in both."""
    names = sorted(before.keys() | after.keys())
    pairs = [(name, repr(before.get(name, "(absent)")), repr(after.get(name, "(absent)"))) for name in names]
    return [f"{name}: {one} before, {other} after" for name, one, other in pairs if one != other]


def main(words: list[str]) -> int:
    verb, file = words
    found = recomputed(find_repo() / "results")
    if verb == "write":
        Path(file).write_text(json.dumps(found, indent=0))
        print(f"{len(found)} values written")
        return 0
    differing = differences(json.loads(Path(file).read_text()), found)
    numbers = sum(isinstance(value, (int, float)) and not isinstance(value, bool) for value in found.values())
    print("\n".join([*differing, f"{len(found)} values compared, {numbers} of them numbers: {len(differing)} differ"]))
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
