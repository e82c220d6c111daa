"""The paper's claims by tier: what each came to, and on how many machines."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from suite.report.rows import GRADED, TIERS, Row, claim_number
from suite.spec.strict_yaml import read_yaml


@dataclass(frozen=True)
class TierCell:
    """words: (verdict, number of graded claims), gravest last as in GRADED. num_machines: fingerprints behind them; 0 where nothing
    was run. num_claims: graded claims that tasks of the tier make, 0 for none."""

    tier: str
    words: tuple[tuple[str, int], ...]
    num_machines: int
    num_claims: int


@dataclass(frozen=True)
class ClaimLine:
    """One claim of the paper."""

    claim: str
    title: str
    cells: tuple[TierCell, ...]
    tasks: tuple[str, ...]


def claim_lines(rows: list[Row], titles: dict[str, str]) -> list[ClaimLine]:
    """Every claim that a task is about, in the order of their numbers."""
    claims = sorted({row.claim for row in rows}, key=claim_number)
    return [_line(claim, [row for row in rows if row.claim == claim], titles) for claim in claims]


def _line(claim: str, rows: list[Row], titles: dict[str, str]) -> ClaimLine:
    cells = tuple(_cell(tier, [row for row in rows if row.tier == tier]) for tier in TIERS)
    return ClaimLine(claim, titles.get(claim) or rows[0].statement, cells, tuple(dict.fromkeys(row.task for row in rows if row.fingerprint)))


def _cell(tier: str, rows: list[Row]) -> TierCell:
    run = [row for row in rows if row.fingerprint]
    counts = Counter(row.verdict for row in run if row.verdict)
    words = tuple((word, counts[word]) for word in GRADED if counts[word])
    return TierCell(tier, words, len({row.fingerprint for row in run}), len({(row.task, row.claim_id) for row in rows}))


def claim_titles(repo: Path) -> dict[str, str]:
    """C1 -> its title in baselines/paper.yaml; {} in a checkout without the file."""
    file = repo / "baselines" / "paper.yaml"
    entries = (read_yaml(file)[0] or {}) if file.is_file() else {}
    return {name: str(entry["title"]) for name, entry in entries.items() if isinstance(entry, dict) and "title" in entry}
