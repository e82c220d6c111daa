"""What decides numbers where a task says nothing, in one table: settings that engines fill in, and constants of theirs that
no task can set. Engines take these values from here; resolving a task puts them into its settings, and every record says
which ones it relied on. No torch.

The run key leaves out what a task did not say, so a new setting with a default changes no key. `value` may change, and then
every key that relied on it does; `unsaid` is the value that was in force when the row was written, and never changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from suite.spec.kinds import Kind


@dataclass(frozen=True)
class Default:
    """One row. path: of the setting, or `constants.<name>`. applies: whether cells of this kind with these (plain) settings
    rely on it where they do not say it."""

    path: str
    value: Any
    unsaid: Any
    applies: Callable[[Kind, dict], bool]

    @property
    def is_constant(self) -> bool:
        return self.path.startswith("constants.")


_ROWS = (
    Default("rollout.prompts_per_batch", 32, 32, lambda kind, _: kind.has_engines and not kind.trains),
    Default("rollout.max_num_seqs", 64, 64, lambda _, settings: (settings.get("rollout") or {}).get("engine") == "hf"),
    Default("train.micro_batch_size", 32, 32, lambda kind, _: kind.trains),  # sequences
    Default("train.attention", "sdpa", "sdpa", lambda kind, _: kind.has_trainer),
    # Logits at a time where train.head_chunk_tokens does not say how many tokens: 256 MiB in fp32, whatever the vocabulary.
    Default("constants.head_chunk_logits", 2**26, 2**26, lambda kind, _: kind.has_trainer),
    # Lengths of trainer batches are rounded up to this, so that few distinct shapes occur.
    Default("constants.pad_to_tokens", 16, 16, lambda kind, _: kind.has_trainer),
)
DEFAULTS: dict[str, Default] = {row.path: row for row in _ROWS}


def default(path: str) -> Any:
    """The value in force."""
    return DEFAULTS[path].value


def relied_on(kind: Kind, settings: dict) -> dict[str, Any]:
    """path -> value of every default that cells with these plain settings rely on: rows that apply and that are not said."""
    return {row.path: row.value for row in DEFAULTS.values() if row.applies(kind, settings) and (row.is_constant or _is_open(settings, row.path))}


def fill(settings: dict, defaults: dict[str, Any]) -> dict:
    """Plain settings with these defaults in their places; constants have none."""
    filled = dict(settings)
    for path, value in defaults.items():
        section, name = path.split(".", 1)
        if filled.get(section):
            filled[section] = filled[section] | {name: value}
    return filled


def as_it_ran(settings: dict, defaults: dict[str, Any] | None) -> dict:
    """Settings of a cell with all that it relied on, the constants as a section of their own. A record that does not say
    (defaults None) is older than this table and ran with the values that are `unsaid`, so that it compares with newer ones."""
    known = {row.path: row.unsaid for row in DEFAULTS.values() if row.is_constant or _is_open(settings, row.path)} | (defaults or {})
    constants = {path.split(".", 1)[1]: value for path, value in known.items() if path.startswith("constants.")}
    return fill(settings, known) | {"constants": constants}


def said(settings: dict, defaults: dict[str, Any]) -> tuple[dict, dict[str, Any]]:
    """What a run key holds of settings that were filled: (the settings as the task says them, the defaults relied on that are
    no longer what they were)."""
    own = {section: dict(values) if isinstance(values, dict) else values for section, values in settings.items()}
    for path, value in defaults.items():
        section, name = path.split(".", 1)
        if own.get(section) and own[section].get(name) == value:
            own[section][name] = None
    return own, {path: value for path, value in defaults.items() if path not in DEFAULTS or value != DEFAULTS[path].unsaid}


def _is_open(settings: dict, path: str) -> bool:
    """Whether the section is there and does not say it."""
    section, name = path.split(".", 1)
    return bool(settings.get(section)) and settings[section].get(name) is None
