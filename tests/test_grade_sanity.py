"""The sanity tasks of this repository, fed the paper's digitised curves, return what the paper states."""

import pytest
from fakes import curve, jittered, series_run

from suite.grade.verdict import grade_task
from suite.spec.checkout import find_repo
from suite.spec.reading import load_task

PANELS = {"grpo": "a", "grpo-token-tis": "b", "grpo-seq-mis": "c", "gspo": "d", "pg-seq-is": "e", "pg-seq-mis": "f"}
ON_REWARD = ("reward_mean",)


def verdicts(name: str, panel: str, swap: bool = False) -> dict[str, dict]:
    """claim id -> its row, for five jittered seeds of both curves of a panel (swapped: each in the other arm)."""
    folder = "desk" if name.startswith("desk") else "paper"
    task = load_task(find_repo() / "tasks" / folder / f"{name}.yaml")
    task = task.model_copy(update={"schedule": task.schedule.model_copy(update={"steps": 2000})})  # a desk run has 32
    runs, num_rollouts = [], task.schedule.prompts_per_step * task.rollout.samples_per_prompt
    for i, (arm, precision) in enumerate((("bf16", "FP16" if swap else "BF16"), ("fp16", "BF16" if swap else "FP16"))):
        for seed in task.seeds:
            values = curve(panel, precision)
            runs.append(series_run(task, arm, seed, jittered(values, [seed, i]), num_rollouts=[num_rollouts]))
    rows = grade_task(task, runs)["claims"]
    return {row["id"]: row for row in rows if row["estimand"] in ON_REWARD and row["kind"] != "report"}


def says(row: dict, word: str) -> bool:
    """The verdict, or what it would be if the weights were pinned and the controls had run."""
    return row["verdict"] == word or f"otherwise {word}" in row["reason"]


@pytest.mark.parametrize("algorithm", PANELS)
@pytest.mark.parametrize("tier", ["", "desk-"])
def test_the_papers_curves_pass_every_claim_about_accuracy(algorithm, tier):
    found = verdicts(f"{tier}sanity-{algorithm}", PANELS[algorithm])
    assert len(found) >= 3
    for claim_id, row in found.items():
        assert says(row, "PASS"), (claim_id, row["reason"])
        assert row["consistent_with_paper"] is True


@pytest.mark.parametrize("algorithm", ["grpo", "grpo-token-tis", "gspo"])
def test_with_the_curves_swapped_every_collapse_is_in_the_wrong_arm(algorithm):
    found = verdicts(f"desk-sanity-{algorithm}", PANELS[algorithm], swap=True)
    events = [row for row in found.values() if row["kind"] == "event"]
    assert len(events) == 2 and all(says(row, "FAIL") for row in events)
    assert says(found["C6-fp16-accuracy"], "FAIL")
