"""Time of collapse against dose: what counts as a launch, which launches belong together, and where levels lie on the line."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from suite.archive.doses import (
    Launch,
    Level,
    dose_rows,
    launch_of,
    level_rows,
    line_text,
    own_levels,
    responses,
    responses_of,
)  # fmt: skip

SETTINGS = {
    "data": {"seed": 0}, "rollout": {"max_tokens": 160}, "train": {"optimizer": {"lr": 2e-4}}, "algorithm": {"name": "GRPO", "perturb": None},
    "precision": {"rollout": "m1", "rollout_rounded": "weights", "train": "fp32"}, "schedule": {"steps": 100, "minibatches": 8},
}  # fmt: skip


def run(arm="fp32-m1", seed=0, fall=30, num=100, k3=1e-2, reward=0.8, status="success", control=False, **sections):
    metrics = [{"step": step, "reward_mean": reward if step < fall else 0.0, "k3_nats_per_token": k3 if step < 8 else 10 * k3} for step in range(num)]
    cell = {"arm": arm, "seed": seed, "is_control": control, "settings": SETTINGS | sections}
    return SimpleNamespace(arm=arm, seed=seed, is_control=control, status=status, metrics=metrics, record={"cell": cell})


def test_a_launch_has_the_dose_of_its_first_iterations_and_the_time_of_its_fall():
    launch = launch_of(run())
    assert (launch.k3, launch.time, launch.fell, launch.learned) == (pytest.approx(1e-2), 31, True, True)  # one of eight at 0 lies 0.1 below, two 0.2
    lasted = launch_of(run(fall=1000))
    assert (lasted.time, lasted.fell) == (99, False)
    unclear = launch_of(run(fall=95))
    assert (unclear.time, unclear.fell) == (99 - 8, False), "its end is not held: it is known to have lasted until before"


@pytest.mark.parametrize("changes", [{"control": True}, {"status": "failed"}, {"num": 12}, {"schedule": None}])
def test_what_is_no_launch_says_nothing(changes):
    assert launch_of(run(**changes)) is None


def test_launches_belong_together_if_they_differ_in_the_samplers_precision_and_in_the_horizon_alone():
    base = launch_of(run()).family
    alike = [run(precision=SETTINGS["precision"] | {"rollout": "m2"}), run(schedule=SETTINGS["schedule"] | {"steps": 200}),
             run(precision={"rollout": "fp32", "kv_cache": "fp8_e5m2", "train": "fp32"}), run(algorithm={"name": "GRPO"})]  # fmt: skip
    other = [run(precision={"rollout": "m1", "train": "bf16"}), run(algorithm={"name": "GRPO", "perturb": {"name": "aligned"}}),
             run(train={"optimizer": {"lr": 1e-4}}), run(schedule=SETTINGS["schedule"] | {"minibatches": 4})]  # fmt: skip
    assert all(launch_of(one).family == base for one in alike)
    assert all(launch_of(one).family != base for one in other)


def launches(slope=-0.5):
    """Five launches at each of three doses, times that scatter around a power of the dose, the smallest dose cut off at 200."""
    drawn = np.random.default_rng(0)
    for arm, k3 in (("fp32-m3", 1e-4), ("fp32-m2", 1e-3), ("fp32-m1", 1e-2)):
        for seed in range(5):
            time = 30 * (k3 / 1e-2) ** slope * np.exp(0.1 * drawn.standard_normal())
            yield Launch("f", "GRPO", arm, seed, k3, int(min(time, 200)), time < 200, True)
    yield Launch("f", "GRPO", "fp32", 0, 1e-13, 199, False, True)


def test_the_line_is_that_of_the_launches_and_an_exact_sampler_is_no_dose():
    response, = responses(launches())
    assert [dose.arm for dose in response.doses] == ["fp32", "fp32-m3", "fp32-m2", "fp32-m1"]
    assert response.line.slope == pytest.approx(-0.5, abs=0.06) and response.line.num_events == 10
    rows = {row[0]: row[1:] for row in dose_rows(response)}
    assert rows["fp32"] == ["none", "1", "0", "", "199"]
    assert rows["fp32-m3"][:4] == ["0.0001", "5", "0", ""] and rows["fp32-m3"][4] == "200, 200, 200, 200, 200"
    assert rows["fp32-m1"][2] == "5" and "Of 15 launches 10 fell" in line_text(response)


def test_levels_lie_on_the_line_and_those_beyond_the_doses_say_so():
    response, = responses(launches())
    inside, beyond = level_rows(response, [Level("a", 1e-3), Level("b", 1e-6)])
    assert inside[0] == "a" and float(inside[2].split()[0]) == pytest.approx(95, rel=0.1) and inside[3] == ""
    assert float(beyond[2].split()[0]) == pytest.approx(3000, rel=0.5) and beyond[3] == "beyond the doses"


def test_the_longer_of_two_runs_of_a_launch_counts_and_one_dose_alone_is_no_response():
    first = Launch("f", "GRPO", "fp32-m2", 0, 1e-3, 99, False, True)
    response, = responses([first, replace(first, time=150, fell=True), *launches()])
    m2 = next(dose for dose in response.doses if dose.arm == "fp32-m2")
    assert len(m2.launches) == 5 and m2.launches[0].fell
    assert responses([first, replace(first, arm="fp32", k3=1e-13)]) == []


def test_a_launch_that_learned_nothing_is_counted_and_stays_out_of_the_line():
    idle = Launch("f", "GRPO", "fp32-m0", 0, 1.0, 199, False, False)
    with_it, = responses([idle, *launches()])
    without, = responses(launches())
    assert with_it.line.slope == without.line.slope
    assert dose_rows(with_it)[-1] == ["fp32-m0", "1", "1, 1 learned nothing", "0", "", ""]


def test_without_falls_at_two_doses_there_is_no_line_and_the_text_says_why():
    few = [replace(one, fell=False) if one.arm == "fp32-m2" else one for one in launches()]
    response, = responses(few)
    assert response.line is None and level_rows(response, [Level("a", 1e-3)]) == []
    assert line_text(response) == "No line: 5 of 15 launches fell; three falls are needed, at two doses at least."


def test_the_levels_of_the_model_are_those_of_launches_in_that_precision():
    runs = [run(arm=arm, seed=seed, k3=k3 * 4**seed, fall=1000) for arm, k3 in (("bf16", 1e-5), ("fp16", 2e-7)) for seed in (0, 1)]
    assert [(level.label, level.k3) for level in own_levels(runs)] == [
        ("bf16 of this model", pytest.approx(2e-5)), ("fp16 of this model", pytest.approx(4e-7)),
    ]  # fmt: skip


def test_without_an_exact_trainer_there_is_no_dose():
    bf16 = launch_of(run(precision={"rollout": "m1", "train": "bf16"}))
    assert not bf16.exact_trainer and launch_of(run()).exact_trainer
    assert responses(replace(one, exact_trainer=False) for one in launches()) == []


def test_a_task_shows_the_families_of_its_own_launches_with_those_of_other_tasks_on_the_same_machine():
    mine = [one for one in launches() if one.arm != "fp32-m1"]
    others = [one for one in launches() if one.arm == "fp32-m1"]
    published = {("a", "cpu"): mine, ("b", "cpu"): others, ("b", "other-cpu"): [replace(one, time=1) for one in others],
                 ("c", "cpu"): [replace(one, family="g") for one in launches()]}  # fmt: skip
    response, = responses_of(published, "a", "cpu", min_doses=2)
    assert response.line.slope == responses(launches())[0].line.slope
    assert responses_of(published, "b", "cpu", min_doses=2) == [], "one dose of its own"
    assert len(responses_of(published, "b", "cpu")) == 1 and responses_of(published, "nobody", "cpu") == []


def test_the_section_has_both_tables_and_the_figure_its_line_and_levels():
    pytest.importorskip("matplotlib")
    from suite.report.doses import dose_sections
    from suite.report.figures.dose import dose_figures

    published = {("a", "cpu"): list(launches()), ("z", "cpu"): []}
    heading, section = dose_sections(published, [Level("bf16 of this model", 2e-5)])
    assert heading.startswith("## Time of collapse") and "### a: GRPO" in section
    assert section.count("beyond the doses") == 2 and "the paper's bf16" in section and "On cpu;" in section
    figure, = dose_figures(responses(launches()), [Level("bf16 of this model", 2e-5)])
    assert figure.name == "dose" and b"bf16 of this model" in figure.svg and "Of 15 launches 10 fell" in figure.caption
    assert dose_sections({("a", "cpu"): []}, []) == [] and dose_figures([], []) == []
