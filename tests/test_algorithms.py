"""The table of algorithms against the paper's table of formulas, and the overrides a task may put in."""

import math
from dataclasses import replace

import pytest

from suite.errors import TaskError
from suite.spec import algorithms
from suite.spec.algorithms import ALGORITHMS, resolve

ROWS = {  # name: (ratio level, weight, correction level, correction, cap, needs pi(theta'))
    "GRPO": ("token", "none", "none", "none", None, True),
    "GRPO-std": ("token", "none", "none", "none", None, True),
    "GRPO-Token-TIS": ("token", "old/rollout", "token", "truncate", 3.0, True),
    "GRPO-Seq-TIS": ("token", "old/rollout", "sequence", "truncate", 3.0, True),
    "GRPO-Seq-MIS": ("token", "old/rollout", "sequence", "mask", 3.0, True),
    "GSPO": ("sequence_mean", "none", "none", "none", None, True),
    "PG-Seq-IS": ("none", "new/rollout", "sequence", "none", None, False),
    "PG-Seq-TIS": ("none", "new/rollout", "sequence", "truncate", 3.0, False),
    "PG-Seq-MIS": ("none", "new/rollout", "sequence", "mask", 3.0, False),
    "Token-IS-PG": ("none", "new/rollout", "token", "truncate", math.inf, False),
    "REINFORCE": ("none", "none", "none", "none", None, False),
    "DAPO": ("token", "none", "none", "none", None, True),
    "DPPO-TV": ("none", "new/old", "token", "truncate", 20.0, False),
    "DPPO-KL": ("none", "new/old", "token", "truncate", 20.0, False),
    "IcePop": ("token", "old/rollout", "token", "mask", 5.0, True),
    "CISPO": ("none", "new/old", "token", "truncate", 5.0, True),
    "GRPO-Geo-RS": ("token", "old/rollout", "sequence_mean", "reject", 1.001, True),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_says_what_its_source_says(name):
    row = ALGORITHMS[name]
    found = (row.ratio_level, row.weight, row.correction_level, row.correction, row.cap, row.needs_old_trainer_logprobs)
    assert found == ROWS[name]


def test_no_row_is_missing():
    assert set(ALGORITHMS) == set(ROWS)


@pytest.mark.parametrize("row", ALGORITHMS.values(), ids=ALGORITHMS)
def test_every_row_uses_only_words_of_the_closed_lists_and_cites_its_equation(row):
    assert row.advantage in algorithms.ADVANTAGES
    assert row.ratio_level in algorithms.RATIO_LEVELS
    assert row.weight in algorithms.WEIGHTS
    assert row.correction in algorithms.CORRECTIONS
    assert row.correction_level in algorithms.CORRECTION_LEVELS
    assert row.aggregation in algorithms.AGGREGATIONS
    assert row.formula and row.source
    assert (row.weight == "none") == (row.correction_level == "none"), "a weight is taken per token or per sequence"
    assert (row.clip_low is None) == (row.clip_high is None) == (row.ratio_level == "none"), "a clip bounds a ratio"
    assert (row.cap is None) == (row.correction == "none"), "a cap without a correction would be ignored"
    assert row.floor is None or row.floor <= row.cap
    assert row.divergence in algorithms.DIVERGENCES
    assert (row.divergence == "none") == (row.divergence_low is None) == (row.divergence_high is None)
    assert row.anchor is None or row.anchor in algorithms.ANCHORS
    uses_old = row.ratio_level != "none" or "old" in row.weight.split("/")
    assert (row.anchor is not None) == uses_old, "an anchor stands for pi(theta')"


def test_defaults_are_the_papers_numbers():
    assert (ALGORITHMS["GRPO"].clip_low, ALGORITHMS["GRPO"].clip_high) == (0.2, 0.28)
    assert (ALGORITHMS["GSPO"].clip_low, ALGORITHMS["GSPO"].clip_high) == (3e-4, 4e-4)
    assert ALGORITHMS["DAPO"].dual_clip == 10.0 and ALGORITHMS["DAPO"].aggregation == "token_mean"
    assert ALGORITHMS["PG-Seq-IS"].log_ratio_limit == 20.0
    assert ALGORITHMS["GRPO"].advantage == "group_mean", "what the paper labels GRPO is not std-normalised"
    assert ALGORITHMS["REINFORCE"].advantage == "reward"


def test_overrides_change_what_they_name_and_nothing_else():
    row = resolve("GRPO-Token-TIS", clip_high=0.2, cap=2, aggregation_length=8192, advantage=None)
    expected = replace(ALGORITHMS["GRPO-Token-TIS"], clip_high=0.2, cap=2, aggregation_length=8192)
    assert row == expected
    assert resolve("GRPO") is not None and resolve("GRPO") == ALGORITHMS["GRPO"]


def test_settings_hold_every_choice_that_can_be_overridden():
    settings = resolve("GRPO-Seq-MIS", cap=10).settings()
    assert set(algorithms.OVERRIDES) <= set(settings) and settings["cap"] == 10 and settings["name"] == "GRPO-Seq-MIS"


@pytest.mark.parametrize(
    "name, overrides, key, says",
    [
        ("PPO", {}, "algorithm.name", "GRPO-Seq-MIS"),
        ("GRPO", {"klip": 1}, "algorithm.klip", "clip_low"),
        ("GRPO", {"clip_low": 1.5}, "algorithm.clip_low", "(0, 1]"),
        ("GRPO", {"clip_high": True}, "algorithm.clip_high", "above 0"),
        ("GRPO", {"clip_high": "0.28"}, "algorithm.clip_high", "above 0"),
        ("GRPO-Seq-MIS", {"cap": 0}, "algorithm.cap", "above 0"),
        ("GRPO-Seq-MIS", {"cap": math.nan}, "algorithm.cap", "above 0"),
        ("GRPO", {"advantage": "gae"}, "algorithm.advantage", "group_mean_std"),
        ("GRPO", {"aggregation": "mean"}, "algorithm.aggregation", "token_mean_per_sequence"),
        ("GRPO", {"aggregation_length": 0}, "algorithm.aggregation_length", "whole number"),
        ("PG-Seq-IS", {"log_ratio_limit": 100}, "algorithm.log_ratio_limit", "fp32"),
        ("GRPO", {"cap": 3.0}, "algorithm.cap", "GRPO has no cap"),
        ("PG-Seq-IS", {"cap": 3.0}, "algorithm.cap", "PG-Seq-IS has no cap"),
        ("PG-Seq-IS", {"clip_low": 0.2}, "algorithm.clip_low", "PG-Seq-IS has no clip_low"),
        ("GSPO", {"dual_clip": 10.0}, "algorithm.dual_clip", "GSPO has no dual_clip"),
        ("DAPO", {"aggregation_length": 8192}, "algorithm.aggregation_length", "DAPO has no aggregation_length"),
        ("GRPO", {"anchor": "sampler"}, "algorithm.anchor", "one of trainer, rollout"),
        ("PG-Seq-IS", {"anchor": "rollout"}, "algorithm.anchor", "PG-Seq-IS has no anchor"),
        ("GRPO-Token-TIS", {"anchor": "rollout"}, "algorithm.anchor", "rho would be 1 for every token"),
        ("GRPO", {"floor": 0.5}, "algorithm.floor", "GRPO has no floor"),
        ("IcePop", {"floor": 6.0}, "algorithm.floor", "at most the cap (floor 6.0, cap 5.0)"),
        ("IcePop", {"cap": 0.4}, "algorithm.cap", "at most the cap (floor 0.5, cap 0.4)"),
        ("GRPO", {"divergence_low": 0.5}, "algorithm.divergence_low", "GRPO has no divergence_low"),
        ("DPPO-TV", {"divergence_high": 0}, "algorithm.divergence_high", "above 0"),
        ("DPPO-TV", {"clip_low": 0.2}, "algorithm.clip_low", "DPPO-TV has no clip_low"),
        ("REINFORCE", {"log_ratio_limit": 10.0}, "algorithm.log_ratio_limit", "REINFORCE has no log_ratio_limit"),
    ],
)
def test_a_bad_setting_is_refused_with_its_key_and_what_is_allowed(name, overrides, key, says):
    with pytest.raises(TaskError) as caught:
        resolve(name, file="tasks/desk/x.yaml", **overrides)
    assert caught.value.key == key and caught.value.file == "tasks/desk/x.yaml" and says in str(caught.value)


def test_an_aggregation_chosen_by_the_task_may_bring_its_length():
    row = resolve("DAPO", aggregation="sum_over_length", aggregation_length=100)
    assert (row.aggregation, row.aggregation_length) == ("sum_over_length", 100)
    with pytest.raises(TaskError, match="aggregation_length"):
        resolve("GRPO", aggregation="token_mean", aggregation_length=100)
