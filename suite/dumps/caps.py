"""What flaws of a dump do to its verdict: a claim that rests on a flawed arm neither passes nor fails."""

from __future__ import annotations

from suite.dumps.signs import Flaw
from suite.grade.controls import control_points
from suite.grade.verdict import ORDER
from suite.spec.task import Task, axis_label

WITHOUT_TOKENS = ("reward_mean", "response_tokens_mean", "truncated_share")  # estimands that no log-prob enters


def cap_verdict(task: Task, verdict: dict, flaws: list[Flaw], absent: list) -> dict:
    """The verdict with what the flaws leave of it, and with controls that the dump does not hold listed.

    INVALID flaws make every claim on their arm INVALID. Other flaws, and absent controls, turn PASS and FAIL into
    INCONCLUSIVE, with what they would have been. A flaw of a control, or of an arm that a control looks at, touches
    every claim.
    """
    everywhere = [flaw for control in task.controls for flaw in flaws if _touches_control(task, control, flaw)]
    claims = []
    for row in verdict["claims"]:
        own = [flaw for flaw in flaws if row["verdict"] and _touches(task.grade[row["id"]], flaw)]
        claims.append(_capped(row, [*own, *everywhere], absent))
    capped = verdict | {"claims": claims, "controls": [*verdict["controls"], *map(_absent_row, absent)]}
    return capped | _word_of_task(verdict, [row for row in claims if row["kind"] != "report"])


def _touches(grade, flaw: Flaw) -> bool:
    at = {axis: axis_label(value) for axis, value in grade.at.items()}
    here = all(dict(flaw.point).get(axis) == label for axis, label in at.items())
    return here and flaw.arm in grade.contrast.names and not (flaw.tokens_only and grade.estimand in WITHOUT_TOKENS)


def _touches_control(task: Task, control, flaw: Flaw) -> bool:
    points = [{axis: axis_label(value) for axis, value in at.items()} for at in control_points(task, control)]
    wanted = dict(flaw.point) in points and flaw.arm in control.contrast.names
    return wanted and not (flaw.tokens_only and control.estimand in WITHOUT_TOKENS)


def _capped(row: dict, flaws: list[Flaw], absent: list) -> dict:
    if row["verdict"] not in ("PASS", "FAIL", "INCONCLUSIVE"):
        return dict(row)
    invalid = [flaw for flaw in flaws if flaw.word == "INVALID"]
    if invalid:
        return row | {"verdict": "INVALID", "reason": _listed(invalid), "resolve": "; ".join(dict.fromkeys(flaw.resolve for flaw in invalid))}
    names = ", ".join(control.name for control in absent)
    whys = ([_listed(flaws)] if flaws else []) + ([f"controls absent from the evidence file: {names}"] if absent else [])
    resolve = "; ".join(dict.fromkeys(flaw.resolve for flaw in flaws)) or f"add rows with arm {names}"
    if not whys or (row["verdict"] == "INCONCLUSIVE" and not flaws):
        return dict(row)
    before = "" if row["verdict"] == "INCONCLUSIVE" else f"; otherwise {row['verdict']}: {row['reason']}"
    return row | {"verdict": "INCONCLUSIVE", "reason": "; ".join(whys) + before, "resolve": resolve}


def _listed(flaws: list[Flaw]) -> str:
    """One sentence for each kind of flaw, which is known by what would mend it."""
    kinds: dict[str, list[str]] = {}
    for flaw in flaws:
        kinds.setdefault(flaw.resolve, []).append(flaw.reason)
    return "; ".join(one[0] + (f" (and {num} more like it)" if (num := len(set(one)) - 1) else "") for one in kinds.values())


def _word_of_task(verdict: dict, graded: list[dict]) -> dict:
    """The task's word and reason from its claims, unless they come from something that no claim shows."""
    if verdict["verdict"] in ("INVALID", "ERROR", "NOT_RUN") or not graded:
        return {}
    word = next(word for word in ORDER if any(row["verdict"] == word for row in graded))
    if word == verdict["verdict"]:
        graded = [] if word == "PASS" else graded
    reasons = [f"{row['id']}: {row['reason']}" for row in graded if row["verdict"] == word]
    if not reasons:
        return {}
    return {"verdict": word, "reason": reasons[0] + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")}


def _absent_row(control) -> dict:
    """A control in verdict.json, with an outcome of its own: neither held nor broken."""
    return {
        "name": control.name, "kind": control.kind, "estimand": control.estimand, "at": dict(control.at),
        "estimate": None, "interval": None, "accept": list(control.accept), "num_seeds": 0, "outcome": "absent",
        "reason": f"the evidence file has no rows with arm {control.name}",
    }  # fmt: skip
