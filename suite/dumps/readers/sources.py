"""Rollouts as RL frameworks write them, as rows of suite/dumps/dump.py: `suite grade TASK --evidence FILE... --from FRAMEWORK`.

One module per file form, each with `rows(path) -> Iterator[(row number from 1, row)]`. The rows lack `arm` and `seed`, which
no framework writes: they come from --arm and --seed, or from folders called `arm=bf16/seed=0`. Every row has the ids of
its prompt, whose hash is its prompt_id, so that the same prompt has the same name in every arm and file. None of the
files says the temperature: both log-probs are taken to be at the one that was sampled with, as each module says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from suite.dumps.files import Shard
from suite.dumps.readers import nemo_rl, no_pairs, prime_rl, slime
from suite.errors import UserError

READ = {"nemo-rl": nemo_rl.rows, "prime-rl": prime_rl.rows, "slime": slime.rows}
FRAMEWORKS = tuple(sorted((*READ, *no_pairs.WHAT_TO_DO)))


@dataclass(frozen=True)
class Source:
    """Where files come from: a name of FRAMEWORKS, and the arm and seed of those that no folder names."""

    framework: str
    arm: str | None = None
    seed: int | None = None

    def read(self, shard: Shard) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows of one file, numbered from 1. UserError for a framework, file, field or launch that cannot be used."""
        if self.framework not in FRAMEWORKS:
            raise UserError(f"--from: found {self.framework!r}, allowed: {', '.join(FRAMEWORKS)}")
        if self.framework in no_pairs.WHAT_TO_DO:
            raise no_pairs.refusal(self.framework, shard.path)
        launch = self._launch(shard)
        for number, row in READ[self.framework](shard.path):
            yield number, row | launch

    def _launch(self, shard: Shard) -> dict[str, Any]:
        launch = {name: value for name in ("arm", "seed") if (value := getattr(self, name)) is not None}
        for name in ("arm", "seed"):
            said = shard.constants.get(name, launch.get(name))
            if said is None:
                raise UserError(f"{shard.path}: {name} is missing: files of {self.framework} do not hold it; "
                                f"give --{name}, or a folder called {name}=...")  # fmt: skip
            if launch.get(name, said) != said:
                raise UserError(f"{shard.path}: --{name} {launch[name]}, but its folder says {name}={said}")
        return launch | shard.constants
