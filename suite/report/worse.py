"""`suite compare A B --fail-on worse`: where verdict B is worse than verdict A, such as after an upgrade of an engine. No torch.

A graded claim is worse where its word is graver. A reported mismatch is worse where its interval lies wholly above the one
before: numbers that differ by noise alone are not.
"""

from __future__ import annotations

from pathlib import Path

from suite.errors import UserError
from suite.report.side_by_side import read_either

GRAVER = ("PASS", "INCONCLUSIVE", "NOT_RUN", "ERROR", "INVALID", "FAIL")
LESS_IS_BETTER = (
    "k2_nats_per_token", "k3_nats_per_token", "reverse_k3_nats_per_token", "prob_diff_mean", "prob_diff_p999", "logprob_diff_mean",
    "mult_prob_error", "out_of_band_share", "full_vocab_kl_nats_per_token",
)  # fmt: skip


def what_is_worse(a: Path, b: Path) -> list[str]:
    """One sentence per claim of A that came out worse in B. UserError where they are not two verdicts of one task, or B lacks a
    claim of A."""
    first, second = (read_either(Path(path)) for path in (a, b))
    if not isinstance(first, dict) or not isinstance(second, dict):
        raise UserError("--fail-on worse: found a run, allowed: two verdicts; a run alone has no interval to tell noise by")
    if first["task"] != second["task"]:
        raise UserError(f"--fail-on worse: found verdicts of {first['task']} and {second['task']}, allowed: two of one task")
    after = {row["id"]: row for row in second["claims"]}
    if lost := [row["id"] for row in first["claims"] if row["id"] not in after]:
        raise UserError(f"--fail-on worse: found no claim {lost[0]} in {b}, allowed: every claim of {a}")
    return [line for row in first["claims"] for line in _of_claim(row, after[row["id"]])]


def _of_claim(before: dict, after: dict) -> list[str]:
    if before["verdict"] is not None or after["verdict"] is not None:
        words = [GRAVER.index(row["verdict"] or "NOT_RUN") for row in (before, after)]
        return [f"{before['id']}: {before['verdict']} before, {after['verdict']} after: {after['reason']}"] if words[1] > words[0] else []
    if before["estimand"] not in LESS_IS_BETTER or before["unit"] == "ratio" and before["estimand"] != "mult_prob_error":
        return []
    if before["estimate"] is not None and after["estimate"] is None:
        return [f"{before['id']}: {before['estimate']:.4g} before, no value after"]
    if not before["interval"] or not after["interval"] or not after["interval"][0] > before["interval"][1]:
        return []
    shown = [f"{row['estimate']:.4g} [{row['interval'][0]:.4g}, {row['interval'][1]:.4g}]" for row in (before, after)]
    return [f"{before['id']}: {shown[0]} before, {shown[1]} after"]
