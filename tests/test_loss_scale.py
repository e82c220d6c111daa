"""The loss scaler against a schedule worked by hand, against torch.amp.GradScaler, and across two processes."""

import json
import math

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from suite.engines.trainers.loss_scale import LossScaler


def parameter_with_grad(*values, dtype=torch.float32):
    parameter = torch.nn.Parameter(torch.zeros(len(values), dtype=dtype))
    parameter.grad = torch.tensor(values, dtype=dtype)
    return parameter


# --- the schedule ----------------------------------------------------------------------------------------------------

# (found_inf, then expected: scale, growth tracker, skipped, skips in a row, of them at the minimum), worked by hand for
# init 8, growth x2 after 3 good steps, backoff x0.5, minimum 2.
BY_HAND = [
    (False, 8.0, 1, 0, 0, 0),
    (False, 8.0, 2, 0, 0, 0),
    (False, 16.0, 0, 0, 0, 0),  # third good step: grow
    (False, 16.0, 1, 0, 0, 0),
    (True, 8.0, 0, 1, 1, 0),  # a skip halves the scale and starts the count again
    (False, 8.0, 1, 1, 0, 0),
    (True, 4.0, 0, 2, 1, 0),
    (True, 2.0, 0, 3, 2, 0),  # at the minimum now, but this skip still lowered it
    (True, 2.0, 0, 4, 3, 1),  # no room left below
    (True, 2.0, 0, 5, 4, 2),
    (False, 2.0, 1, 5, 0, 0),
    (False, 2.0, 2, 5, 0, 0),
    (False, 4.0, 0, 5, 0, 0),
]


def test_scale_and_counters_follow_the_schedule_worked_by_hand():
    scaler = LossScaler(init_scale=8, growth_interval=3, min_scale=2)
    for number, (found_inf, *expected) in enumerate(BY_HAND, 1):
        scaler.update(found_inf)
        found = [scaler.scale_value, scaler.growth_tracker, scaler.num_skipped]
        found += [scaler.consecutive_skips, scaler.consecutive_skips_at_min]
        assert (number, found) == (number, expected) and scaler.num_steps == number


def test_the_same_gradients_take_the_same_course_as_in_torchs_grad_scaler():
    """Scale, skipped steps and resulting weights, over 300 steps of which one in six overflows."""
    overflow = torch.rand(300, generator=torch.Generator().manual_seed(0)) < 1 / 6
    ours, theirs = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    our_sgd, their_sgd = torch.optim.SGD([ours], lr=0.01), torch.optim.SGD([theirs], lr=0.01)
    scaler = LossScaler(init_scale=1024, growth_interval=4, min_scale=2.0**-100)
    peer = torch.amp.GradScaler("cpu", init_scale=1024, growth_interval=4)
    for bad in overflow.tolist():
        factor = math.inf if bad else 1.0
        our_sgd.zero_grad(), their_sgd.zero_grad()
        scaler.scale((ours**2).sum() * factor).backward()
        found_inf = scaler.unscale_and_check([ours])
        if not found_inf:
            our_sgd.step()
        scaler.update(found_inf)
        peer.scale((theirs**2).sum() * factor).backward()
        peer.step(their_sgd)
        peer.update()
        assert found_inf == bad and scaler.scale_value == peer.get_scale() and torch.equal(ours, theirs)
    assert 0 < scaler.num_skipped == int(overflow.sum()) and scaler.scale_value != 1024


def test_defaults_are_those_of_the_paper():
    scaler = LossScaler()
    settings = (scaler.scale_value, scaler.growth_factor, scaler.backoff_factor, scaler.growth_interval)
    assert settings == (65536.0, 2.0, 0.5, 400)


def test_the_scale_never_grows_beyond_fp32():
    scaler = LossScaler(init_scale=2.0**127, growth_interval=1)
    scaler.update(False)
    assert scaler.scale_value == 2.0**127


# --- gradients -------------------------------------------------------------------------------------------------------


def test_scaling_rescues_a_gradient_that_underflows_in_fp16():
    """d loss / d weight = 2^-30 is 0 in fp16 (smallest positive value 2^-24) and survives a scale of 2^16."""

    def gradient(scaler):
        weight = torch.nn.Parameter(torch.ones(1))
        loss = (weight.half() * 2.0**-10).float().sum() * 2.0**-20
        scaler.scale(loss).backward()
        assert not scaler.unscale_and_check([weight])
        return weight.grad.item()

    assert gradient(LossScaler(enabled=False)) == 0.0
    assert gradient(LossScaler()) == 2.0**-30


def test_unscaling_is_exact_and_reports_the_largest_scaled_gradient():
    scaler = LossScaler(init_scale=1024)
    first, second = parameter_with_grad(1024.0, -2048.0), parameter_with_grad(3.0)
    assert not scaler.unscale_and_check([first, torch.nn.Parameter(torch.zeros(2)), second])
    assert first.grad.tolist() == [1.0, -2.0] and second.grad.tolist() == [3.0 / 1024]
    assert scaler.max_abs_scaled_grad == 2048.0


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 1])
def test_one_bad_element_anywhere_is_found(enabled, bad, where):
    grads = [[1.0, 2.0], [3.0, 4.0]]
    grads[where][1] = bad
    scaler = LossScaler(enabled=enabled)
    assert scaler.unscale_and_check([parameter_with_grad(*values) for values in grads])
    assert scaler.max_abs_scaled_grad == math.inf


def test_large_finite_gradients_are_not_mistaken_for_overflow():
    """Their squares overflow fp32, so a check by the 2-norm would skip this step."""
    assert not LossScaler(enabled=False).unscale_and_check([parameter_with_grad(1e30, -3e38)])


def test_a_scaled_fp16_loss_is_not_cast_back_to_fp16():
    scaled = LossScaler().scale(torch.tensor(2.0, dtype=torch.float16))
    assert scaled.dtype == torch.float32 and scaled.item() == 131072.0


def test_disabled_is_the_identity_but_still_counts_skips():
    scaler = LossScaler(enabled=False, min_scale=0.25)
    loss, parameter = torch.tensor(3.0), parameter_with_grad(1.5)
    assert scaler.scale(loss) is loss and scaler.scale_value == 1.0
    assert not scaler.unscale_and_check([parameter]) and parameter.grad.item() == 1.5
    for found_inf in (False, True, True):
        scaler.update(found_inf)
    assert (scaler.scale_value, scaler.num_skipped, scaler.consecutive_skips) == (1.0, 2, 2)
    assert scaler.consecutive_skips_at_min == 2, "without a scale there is never room below"


def test_no_gradient_at_all_is_a_finite_step():
    scaler = LossScaler()
    assert not scaler.unscale_and_check([torch.nn.Parameter(torch.zeros(2))]) and scaler.max_abs_scaled_grad == 0.0
    assert not LossScaler().unscale_and_check([torch.nn.Parameter(torch.zeros(0))])


def test_fp16_gradients_and_a_second_unscaling_are_refused():
    with pytest.raises(ValueError, match="fp16"):
        LossScaler().unscale_and_check([parameter_with_grad(1.0, dtype=torch.float16)])
    scaler, parameter = LossScaler(init_scale=2), parameter_with_grad(2.0)
    scaler.unscale_and_check([parameter])
    with pytest.raises(RuntimeError, match="divided twice"):
        scaler.unscale_and_check([parameter])
    scaler.update(False)
    assert not scaler.unscale_and_check([parameter])


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"growth_factor": 1.0}, "growth_factor"),
        ({"backoff_factor": 1.0}, "backoff_factor"),
        ({"growth_interval": 0}, "growth_interval"),
        ({"min_scale": 0.0}, "min_scale"),
        ({"init_scale": 0.5}, "init_scale"),
        ({"init_scale": math.inf}, "init_scale"),
        ({"init_scale": math.nan}, "init_scale"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=f"{name} is .* must be"):
        LossScaler(**settings)


# --- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", range(len(BY_HAND) + 1))
def test_a_resumed_scaler_continues_as_the_uninterrupted_one(stop):
    settings = {"init_scale": 8, "growth_interval": 3, "min_scale": 2}
    whole, first, resumed = LossScaler(**settings), LossScaler(**settings), LossScaler(**settings)
    for found_inf, *_ in BY_HAND:
        whole.update(found_inf)
    for found_inf, *_ in BY_HAND[:stop]:
        first.update(found_inf)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed == first
    for found_inf, *_ in BY_HAND[stop:]:
        resumed.update(found_inf)
    assert resumed.state_dict() == whole.state_dict()


def test_a_state_of_other_settings_or_with_missing_keys_is_refused():
    state = LossScaler(growth_interval=1000).state_dict()
    with pytest.raises(ValueError, match="growth_interval is 1000, this run has 400"):
        LossScaler().load_state_dict(state)
    del state["scale_value"]
    with pytest.raises(ValueError, match="scale_value"):
        LossScaler().load_state_dict(state)


# --- ranks -----------------------------------------------------------------------------------------------------------


def sharded_parameter(*values):
    """Its gradient is a DTensor as under FSDP2, split over the ranks; three values on two ranks, so unevenly."""
    mesh = init_device_mesh("cpu", (2,))
    parameter = torch.nn.Parameter(distribute_tensor(torch.zeros(len(values)), mesh, [Shard(0)]))
    parameter.grad = distribute_tensor(torch.tensor(values), mesh, [Shard(0)])
    return parameter


def check_agreement(rank, store):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        parameter, scaler = sharded_parameter(2.0, 4.0, -6.0), LossScaler(init_scale=2)
        assert scaler.unscale_and_check([parameter]) is False and scaler.max_abs_scaled_grad == 6.0
        assert parameter.grad.full_tensor().tolist() == [1.0, 2.0, -3.0]
        assert LossScaler().unscale_and_check([sharded_parameter(2.0, 4.0, math.inf)]) is True
        for bad, expected in ((math.nan, True), (math.inf, True), (5.0, False)):
            scaler = LossScaler(init_scale=2)
            parameters = [parameter_with_grad(bad)] if rank == 1 else []  # rank 0 holds no gradient at all
            assert scaler.unscale_and_check(parameters) is expected
            assert scaler.max_abs_scaled_grad == (math.inf if expected else 5.0)
            scaler.update(expected)
            assert scaler.scale_value == (1.0 if expected else 2.0)
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_agree_when_only_one_of_them_overflows(tmp_path):
    torch.multiprocessing.spawn(check_agreement, args=(tmp_path / "store",), nprocs=2)
