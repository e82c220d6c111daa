"""A task written out in full, as text: what lies in tasks/_resolved (lock.py) and in every record. It is a task file itself,
with nothing left to follow from elsewhere. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml

from suite.spec.claims import OF_THE_CLAIM

PAPER = ("baseline", "value", "unit", "source", "level")


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):
    def ignore_aliases(self, data):
        return True


# What strict_yaml would take for a number, true, false or null and PyYAML would write without quotes.
_NEEDS_QUOTES = re.compile(r"[-+.]*[0-9].*|[-+]?\.?(?:inf|infinity|nan)|true|false|yes|no|on|off|y|n|null", re.IGNORECASE)


def _text(dumper: _Dumper, value: str):
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="'" if _NEEDS_QUOTES.fullmatch(value) else None)


_Dumper.add_representer(str, _text)


def resolved_text(expanded: dict, order: Sequence[str], grade_order: Sequence[str]) -> str:
    """The text of a task from its expanded mapping (claims.expand). order, grade_order: the keys of Task and Grade."""
    claims = {claim["id"]: _whole_claim(claim, expanded.get("grade", {}).get(claim["id"]), grade_order) for claim in expanded["claims"]}
    whole = expanded | {"claims": claims}
    kept = {name: whole[name] for name in order if name in whole and name not in ("grade", "extends")}
    return yaml.dump(kept, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


def _whole_claim(claim: dict, grade: dict | None, order: Sequence[str]) -> dict:
    """A claim of the map, with the interval and the number of seeds even where they are those of its kind."""
    said = {name: claim[name] for name in OF_THE_CLAIM if claim.get(name) is not None}
    said = said if "paper" not in said else said | {"paper": {name: said["paper"][name] for name in PAPER if name in said["paper"]}}
    whole = {} if grade is None else {"interval": None, "min_seeds": 1} | grade
    return said | {name: whole[name] for name in order if whole.get(name) is not None or name in whole and name == "interval"}
