"""Dense models beside mixtures of experts: mismatch and routing disagreement by precision, in one table per machine."""

from __future__ import annotations

from tabulate import tabulate

from suite.grade.arms import arm_label
from suite.report.escaping import escape_markdown
from suite.report.tables import number
from suite.spec.kinds import kind_of

ROUTING = "routing_disagreement"
METRICS = {"k3_nats_per_token": "k3, nats per token", "prob_diff_mean": "mean abs(π − μ)", ROUTING: "other experts, share of token-layer pairs"}


def mixtures_markdown(verdicts: list[dict], tasks: dict) -> list[str]:
    """One section per fingerprint on which a mixture was published: the mixtures' rows and, of dense models, those of the
    tasks whose arms are all arms of a mixture's. Empty without a mixture. Only of protocols in which no weight changes: two
    models then differ in nothing but themselves."""
    offline = [one for one in verdicts if one["task"] in tasks and kind_of(tasks[one["task"]]).trainer == "scores" and one.get("metrics")]
    sections = []
    for fingerprint in sorted({one["fingerprint"] for one in offline}):
        here = sorted((one for one in offline if one["fingerprint"] == fingerprint), key=lambda one: one["task"])
        mixed = [one for one in here if _is_mixture(one)]
        arms = {row["arm"] for one in mixed for row in one["metrics"]}
        dense = [one for one in here if not _is_mixture(one) and {row["arm"] for row in one["metrics"]} <= arms]
        if mixed:
            sections.append(_section(fingerprint, [("dense", one) for one in dense] + [("mixture of experts", one) for one in mixed]))
    return sections


def _is_mixture(verdict: dict) -> bool:
    return any(row["values"].get(ROUTING) is not None for row in verdict["metrics"])


def _section(fingerprint: str, found: list[tuple[str, dict]]) -> str:
    body = [
        [kind, escape_markdown(one["task"]), escape_markdown(arm_label(row)), *(number(row["values"].get(name)) for name in METRICS)]
        for kind, one in found
        for row in one["metrics"]
    ]
    table = tabulate(body, ["model", "task", "arm", *METRICS.values()], tablefmt="github", disable_numparse=True)
    title = f"## Dense models beside mixtures of experts, on {escape_markdown(fingerprint)}"
    return f"{title}\n\nMeans over launches, all tokens of a launch pooled.\n\n{table}"
