"""What a claim says that the paper says, against the one list of the paper's numbers. No torch."""

import math

from suite.errors import TaskError
from suite.spec.checkout import base_folder
from suite.spec.strict_yaml import view_yaml
from suite.spec.task import Claim, Task


def paper_errors(task: Task, claim: Claim) -> list[TaskError]:
    """The dotted key must exist in baselines/paper.yaml, and a value must be the one that stands there."""
    path = base_folder(task.file).parent.parent / "baselines" / "paper.yaml"
    value, problems = view_yaml(path)
    if problems:
        return problems
    for part in claim.paper.baseline.split("."):
        if not isinstance(value, dict) or part not in value:
            here = ", ".join(value) if isinstance(value, dict) else value
            allowed = f"a key in baselines/paper.yaml; at this place: {here}"
            return [TaskError(task.file, f"claims.{claim.id}.paper.baseline", claim.paper.baseline, allowed)]
        value = value[part]
    value, found = (value.get("value") if isinstance(value, dict) else value), claim.paper.value
    listed = found if isinstance(found, list) else [found]
    numbers = [one for one in listed if isinstance(one, str) and _reads_as_number(one)]
    if found is None or _same(found, value) or (not numbers and any(_same(one, value) for one in listed)):
        return []  # a list may hold more than the one value, such as what a series begins with and what it ends with
    hint = f"{numbers[0]!r} is text: a number stands without quotes" if numbers else None
    return [TaskError(task.file, f"claims.{claim.id}.paper.value", found, f"{value} (baselines/paper.yaml)", hint)]


def _reads_as_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _same(found, value) -> bool:
    """Equal, and of one kind: 1 is neither true nor "1"."""
    kinds = [bool if isinstance(one, bool) else float if isinstance(one, (int, float)) else type(one) for one in (found, value)]
    if kinds[0] is not kinds[1]:
        return False
    return math.isclose(found, value) if kinds[0] is float else found == value
