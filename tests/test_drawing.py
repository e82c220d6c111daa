"""Dynamic sampling: which groups a step trains on, what is recorded, and that a resumed run draws the same ones."""

from functools import partial

import pytest

from suite.problems.data import Prompt
from suite.protocols.drawing import draw, rounds_before

torch = pytest.importorskip("torch")
from suite.protocols import rl  # noqa: E402

PROMPTS = [Prompt(f"p{i:02d}", ("1",)) for i in range(20)]
SAMPLES = 4


class Sampler:
    """Responses are (problem, sample); each problem has one right answer among four, but those named, which agree."""

    def __init__(self, agreeing=()):
        self.agreeing, self.asked = set(agreeing), []

    def __call__(self, prompts):
        self.asked.append([prompt.prompt_id for prompt in prompts])
        rollouts = [(prompt.prompt_id, sample) for prompt in prompts for sample in range(SAMPLES)]
        return rollouts, [float(sample == 0 or name in self.agreeing) for name, sample in rollouts]


def order(number: int, num: int = 4) -> list[Prompt]:
    return [PROMPTS[i % len(PROMPTS)] for i in range(num * number, num * (number + 1))]


def names(drawn) -> list[str]:
    return [prompt.prompt_id for prompt in drawn.prompts]


def whole(drawn) -> bool:
    """Whether the rollouts and rewards are those of the prompts, each group in one piece."""
    wanted = [(name, sample) for name in names(drawn) for sample in range(SAMPLES)]
    return drawn.rollouts == wanted and len(drawn.rewards) == len(wanted)


def test_without_dynamic_sampling_a_step_is_its_round_whatever_it_brings():
    sampler = Sampler(agreeing=["p04", "p05"])
    drawn = draw(order, sampler, 1, None)
    assert names(drawn) == ["p04", "p05", "p06", "p07"] and drawn.metrics == {} and drawn.num_rounds == 1 and whole(drawn)


def test_a_round_in_which_every_group_disagrees_is_the_step():
    drawn = draw(order, Sampler(), 2, 5)
    assert names(drawn) == ["p08", "p09", "p10", "p11"] and whole(drawn)
    assert drawn.metrics == {"sampling_rounds": 1, "sampling_limit_reached": 0, "disagreeing_groups_share": 1.0, "drawn_reward_mean": 0.25}


def test_groups_that_agree_are_replaced_by_the_next_ones_that_do_not():
    sampler = Sampler(agreeing=["p00", "p02", "p05"])
    drawn = draw(order, sampler, 0, 5)
    assert names(drawn) == ["p01", "p03", "p04", "p06"] and whole(drawn)
    assert sampler.asked == [["p00", "p01", "p02", "p03"], ["p04", "p05", "p06", "p07"]]
    assert drawn.metrics["sampling_rounds"] == 2 and drawn.metrics["disagreeing_groups_share"] == 5 / 8
    assert drawn.metrics["drawn_reward_mean"] == (3 * 1 + 5 * 0.25) / 8, "of all that was drawn, not of what was kept"


@pytest.mark.parametrize("max_rounds", [1, 2, 3])
def test_a_limit_that_is_reached_is_recorded_and_the_step_is_filled_up_with_groups_that_agree(max_rounds):
    everything_agrees_but = {"p01", "p06"}
    sampler = Sampler(agreeing={prompt.prompt_id for prompt in PROMPTS} - everything_agrees_but)
    drawn = draw(order, sampler, 0, max_rounds)
    kept = ["p01", "p06"][: min(2, max_rounds)]
    assert set(kept) <= set(names(drawn)) and len(names(drawn)) == 4 and whole(drawn)
    assert [name for name in names(drawn) if name not in kept] == [n for n in ("p00", "p02", "p03") if n in names(drawn)], "first drawn"
    assert drawn.metrics["sampling_rounds"] == max_rounds == len(sampler.asked) and drawn.metrics["sampling_limit_reached"] == 1


def test_a_limit_that_was_just_enough_is_not_reached():
    drawn = draw(order, Sampler(agreeing=["p00"]), 0, 2)
    assert drawn.metrics["sampling_limit_reached"] == 0 and drawn.metrics["sampling_rounds"] == 2


def test_groups_that_are_all_wrong_agree_as_those_that_are_all_right_do():
    def take(prompts):
        return [(p.prompt_id, s) for p in prompts for s in range(SAMPLES)], [0.0] * SAMPLES * len(prompts)

    assert draw(order, take, 0, 3).metrics == {
        "sampling_rounds": 3, "sampling_limit_reached": 1, "disagreeing_groups_share": 0.0, "drawn_reward_mean": 0.0,
    }  # fmt: skip


def test_a_problem_is_drawn_once_a_step_even_where_a_pass_over_the_set_ends_within_it():
    few = PROMPTS[:6]

    def round_of(number):  # two rounds a pass of three problems; passes begin anew
        return rl._prompts_of_round(few, 3, 7, number)

    sampler = Sampler(agreeing={prompt.prompt_id for prompt in few})
    drawn = draw(round_of, sampler, 0, 9)
    asked = [name for part in sampler.asked for name in part]
    assert sorted(asked) == sorted(prompt.prompt_id for prompt in few), "each of them once, although nine rounds were allowed"
    assert drawn.metrics["sampling_rounds"] == 9 and whole(drawn)


def test_the_order_goes_on_where_the_rounds_before_ended_also_in_a_resumed_run():
    """What a run has drawn follows from its seed and the rounds that its metrics hold."""
    next_prompts = partial(rl._prompts_of_round, PROMPTS, 4, 3)

    def steps(metrics, num):
        sampler = Sampler(agreeing=[f"p{i:02d}" for i in range(0, 20, 3)])
        for _ in range(num):
            drawn = draw(next_prompts, sampler, rounds_before(metrics), 3)
            metrics.append(drawn.metrics)
            yield names(drawn)

    straight = list(steps([], 6))
    metrics: list[dict] = []
    before = list(steps(metrics, 2))
    assert before + list(steps(metrics[:2], 4)) == straight
    assert rounds_before(metrics) == 2 * 2 > len(metrics)


def test_runs_without_dynamic_sampling_take_a_round_a_step():
    assert rounds_before([{"step": 0}, {"step": 1}]) == 2 and rounds_before([]) == 0
