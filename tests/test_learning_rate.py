"""Learning-rate schedules against their closed forms, in the optimizer that uses them, and across a resume."""

import pytest

torch = pytest.importorskip("torch")

from suite.engines.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from suite.engines.trainers.loss_scale import LossScaler  # noqa: E402
from suite.engines.trainers.masters import MasterWeights  # noqa: E402
from suite.spec.learning_rate import learning_rate  # noqa: E402

OPTIMIZER = {"name": "adamw", "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
STEP = {"kind": "step", "every": 3, "factor": 0.5}
LINEAR = {"kind": "linear", "steps": 4, "final": 0.2}


def rates(num: int, **more) -> list[float]:
    return [learning_rate(OPTIMIZER | more, n) for n in range(num)]


def test_without_a_schedule_the_rate_is_the_tasks_own_to_the_bit():
    assert rates(5) == [1e-3] * 5
    assert rates(5, warmup_steps=0, lr_schedule=None) == rates(5, lr_schedule={"kind": "constant"}) == [1e-3] * 5


def test_warm_up_rises_by_equal_steps_to_the_rate_and_stays():
    assert rates(6, warmup_steps=4) == [1e-3 * share for share in (0.25, 0.5, 0.75, 1, 1, 1)]


def test_step_decay_halves_the_rate_every_so_many_updates():
    assert rates(8, lr_schedule=STEP) == [1e-3 * share for share in (1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25)]


def test_linear_decay_falls_to_its_final_share_and_stays_there():
    expected = [1e-3 * share for share in (1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2)]
    assert rates(7, lr_schedule=LINEAR) == pytest.approx(expected, rel=1e-12)
    assert rates(6, lr_schedule=LINEAR | {"final": 0.0})[4:] == [0.0, 0.0]


@pytest.mark.parametrize("schedule", [STEP, LINEAR])
def test_a_decay_begins_when_the_warm_up_is_over(schedule):
    found = rates(9, warmup_steps=2, lr_schedule=schedule)
    assert found[:2] == [0.5e-3, 1e-3] and found[2:] == rates(7, lr_schedule=schedule)


def masters_of(**more) -> MasterWeights:
    return MasterWeights({"w": torch.nn.Parameter(torch.tensor([1.0]))}, torch.float32, OPTIMIZER | more)


def steps(masters: MasterWeights, scaler: LossScaler, gradients: list[float]) -> list[dict]:
    reports = []
    for gradient in gradients:
        masters.masters["w"].grad = torch.tensor([gradient])
        reports.append(masters.step(scaler, grad_clip=None))
    return reports


def test_an_update_moves_the_weights_by_the_rate_that_it_reports():
    """AdamW with one and the same gradient moves each weight by lr, whatever the gradient's size."""
    masters, scaler = masters_of(lr_schedule=STEP, warmup_steps=2), LossScaler(enabled=False)
    for expected in (0.5e-3, 1e-3, 1e-3, 1e-3, 1e-3, 0.5e-3):
        before = masters.masters["w"].item()
        (report,) = steps(masters, scaler, [0.3])
        assert report["learning_rate"] == expected
        assert before - masters.masters["w"].item() == pytest.approx(expected, rel=1e-3)


def test_a_skipped_step_does_not_count():
    reports = steps(masters_of(lr_schedule=STEP | {"every": 2}), LossScaler(enabled=False), [1.0, float("inf"), 1.0, 1.0])
    assert [report["step_skipped"] for report in reports] == [0, 1, 0, 0]
    assert [report["learning_rate"] for report in reports] == [1e-3, 1e-3, 1e-3, 0.5e-3]


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_resumed_optimizer_goes_on_with_the_same_rates_and_weights_bit_for_bit(tmp_path, stop):
    settings = {"lr_schedule": STEP | {"every": 2}, "warmup_steps": 2}
    gradients = [0.3, -0.1, float("inf"), 0.2, 0.05, 0.4, -0.3]
    straight, scaler = masters_of(**settings), LossScaler(enabled=False)
    expected = steps(straight, scaler, gradients)

    first, first_scaler = masters_of(**settings), LossScaler(enabled=False)
    before = steps(first, first_scaler, gradients[:stop])
    second, second_scaler = masters_of(**settings), LossScaler(enabled=False)
    save_checkpoint(tmp_path, stop, *first.held())
    second.take_over(load_checkpoint(tmp_path, stop)[1])
    second_scaler.load_state_dict(first_scaler.state_dict())
    after = steps(second, second_scaler, gradients[stop:])
    assert [r["learning_rate"] for r in before + after] == [r["learning_rate"] for r in expected]
    assert torch.equal(second.masters["w"], straight.masters["w"])
