"""The protocols, one row each: which module runs one, what it needs to be told, what it gives.

Everything that the suite knows of a protocol by name stands in its row and in its module below suite/protocols. Other code
asks the row (`kind_of(task)`) and branches on no name, so that a new protocol is one row and one module. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from suite.spec.estimands import DATASET_ESTIMANDS, ESTIMANDS, FILTER_ESTIMANDS, SAMPLER_ESTIMANDS, SCORING_ESTIMANDS, Estimand
from suite.spec.precision import CONTRACT

Trainer = Literal["none", "scores", "trains"]
Evidence = Literal["none", "sampled", "scored"]
ValueFrom = Literal["prompt_sums", "run", "series"]


@dataclass(frozen=True)
class Kind:
    """A protocol.

    module: has run(cells, session), which turns cells into finished run folders; None where the task runs nothing and is
    graded from the records of the tasks in `needs`. required: settings without which no cell resolves. must_say: points of
    the pipeline (precision.CONTRACT) at which a run says in which dtype it ran. estimands: what a task may name, by name.
    has_arms: at least one arm, each named after its precision. trainer: none (there is no pi, hence no mismatch), scores
    (pi stays where it is) or trains. evidence: none, responses as sampled (trainer_logprobs is null), or scored by the
    trainer too. value_from: what the value of a run is read from: the sums per prompt, the run's own summary, or its series
    by the reducer of the claim.
    """

    name: str
    module: str | None
    required: tuple[str, ...]
    estimands: Mapping[str, Estimand]
    must_say: tuple[str, ...] = ()
    has_arms: bool = True
    has_engines: bool = True
    trainer: Trainer = "none"
    evidence: Evidence = "none"
    value_from: ValueFrom = "series"

    @property
    def compares(self) -> bool:
        """Whether its tasks have no runs of their own, and name arms of other tasks as `<task>-<arm>`."""
        return self.module is None

    @property
    def has_trainer(self) -> bool:
        return self.trainer != "none"

    @property
    def trains(self) -> bool:
        """Whether its runs are series of iterations in which the policy changes, each cell with a sampler of its own."""
        return self.trainer == "trains"


_ASKED = ("model.family", "model.sha256", "data.id", "data.template")
_SAMPLED = (
    "rollout.engine", "rollout.samples_per_prompt", "rollout.temperature", "rollout.top_p", "rollout.max_tokens",
)  # fmt: skip
_SCORED = ("train.engine", "train.score_batch_size")
_TRAINED = (
    "train.optimizer", "algorithm.name", "schedule.steps", "schedule.prompts_per_step", "schedule.minibatches",
)  # fmt: skip
_BOTH = ("precision.rollout", "precision.train")
_OF_SAMPLER = ("rollout_weights", "kv_cache", "rollout_logits")

_ROWS = (
    Kind("offline_mismatch", "suite.protocols.offline", (*_ASKED, *_SAMPLED, *_SCORED, *_BOTH), SCORING_ESTIMANDS,
         (*_OF_SAMPLER, "compute", "trainer_head"), trainer="scores", evidence="scored", value_from="prompt_sums"),
    Kind("offline_accuracy", "suite.protocols.offline", (*_ASKED, *_SAMPLED, "precision.rollout"), SAMPLER_ESTIMANDS,
         _OF_SAMPLER, evidence="sampled", value_from="prompt_sums"),
    Kind("dataset", "suite.protocols.dataset", ("data.id",), DATASET_ESTIMANDS, has_arms=False, has_engines=False),
    Kind("rl", "suite.protocols.rl", (*_ASKED, *_SAMPLED, *_SCORED, *_TRAINED, *_BOTH), ESTIMANDS,
         (*CONTRACT, "master_weights"), trainer="trains", evidence="scored"),
    Kind("filter", "suite.protocols.filter", (*_ASKED, "data.keep_accuracy", *_SAMPLED, "precision.rollout"), FILTER_ESTIMANDS,
         _OF_SAMPLER, evidence="sampled", value_from="run"),
    Kind("compare", None, (), ESTIMANDS, has_arms=False, has_engines=False),
)  # fmt: skip
KINDS: dict[str, Kind] = {row.name: row for row in _ROWS}


def kind_of(task) -> Kind:
    """The row of a task's protocol."""
    return KINDS[task.protocol]
