"""Fields of one foreign record, and the row of suite/dumps/dump.py that they make. Values are checked later, in dump_rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.dumps.rows import row_error
from suite.errors import TaskError


@dataclass(frozen=True)
class Record:
    """A record of a file: `row` counts from 1, `switch` says what makes the framework write all fields."""

    path: Path
    row: int
    values: dict[str, Any]
    switch: str

    def refuse(self, name: str, found: Any, allowed: str, hint: str | None = None) -> TaskError:
        return row_error(self.path, self.row, name, found, allowed, hint or self.switch)

    def list(self, name: str, length: int | None = None) -> list:
        values = self.values.get(name)
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, list):
            raise self.refuse(name, values, "a list, one entry per token")
        if length is not None and len(values) != length:
            raise self.refuse(name, f"{len(values)} entries", f"{length}, one per token")
        return values

    def whole(self, name: str, most: int) -> int:
        value = self.values.get(name)
        value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise self.refuse(name, value, f"an integer from 1 to {most}")
        return value


def prompt_name(prompt_ids: list) -> str:
    """The same name for the same prompt, whoever sampled from it."""
    return hashlib.blake2b(repr(prompt_ids).encode(), digest_size=16).hexdigest()


def row_of(prompt: list, response: list, mask: list, mu: list, pi: list, **rest: Any) -> dict[str, Any]:
    """A row from lists over the T response tokens, and the ids of the prompt."""
    return {"prompt_id": prompt_name(prompt), "token_ids": prompt + response, "num_prompt_tokens": len(prompt),
            "loss_mask": mask, "rollout_logprobs": mu, "trainer_logprobs": pi, **rest}  # fmt: skip


def row_of_sequence(record: Record, ids: list, mask_field: str, mask: list, mu: list, pi: list, **rest: Any) -> dict:
    """A row from lists over prompt and response, entry t of each log-prob being that of token t."""
    start = next((i for i, sampled in enumerate(mask) if sampled), 0)
    if start == 0:
        found = "1 at token 0" if mask and mask[0] else "no 1"
        raise record.refuse(mask_field, found, "0 for the prompt, then 1 for each sampled token", "no prompt, or no response")
    return row_of(ids[:start], ids[start:], mask[start:], mu[start:], pi[start:], **rest)
