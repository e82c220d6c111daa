"""When a watched series has moved, and by how much it leads the fall of the reward: series made by hand."""

import pytest

from suite.measure.lead import WATCHED, in_order, lead_of, leads, moved_at, over_launches


def run(num=60, fall=40, rise=30):
    """Reward 0.8 that is 0.1 from `fall` on; k3 that is tenfold from `rise` on; everything else stands still."""
    return [
        {"step": step, "reward_mean": 0.8 if step < fall else 0.1, "k3_nats_per_token": 1e-2 if step < rise else 1e-1,
         "entropy_nats": 0.3, "grad_norm": 0.1, "grad_norm_head": 0.05, "response_tokens_mean": 60.0, "bad_update_share_0p5": 0.0}
        for step in range(num)
    ]  # fmt: skip


def test_a_series_has_moved_when_its_window_mean_stays_away_by_the_factor():
    steps = list(range(40))
    values = [1.0] * 20 + [9.0] * 20
    assert moved_at(steps, values, 2.0) == 20  # one value of 9 in eight makes a mean of 2
    assert moved_at(steps, values, 9.0) == 27  # all eight
    assert moved_at(steps, [1 / value for value in values], 2.0) == 24  # five of eight at 1/9: below a half
    assert moved_at(steps, [1.0] * 20 + [9.0] * 4 + [1.0] * 16, 2.0) == 20  # seen through eight means, then gone
    assert moved_at(steps, [1.0] * 20 + [9.0] + [1.0] * 19, 2.5) is None
    assert moved_at(steps, [0.0] * 20 + [9.0] * 20, 2.0) is None and moved_at(steps[:4], values[:4], 2.0) is None


def test_the_lead_is_the_time_from_the_move_to_the_fall():
    found = leads(run())
    # k3: 2 of 8 values tenfold give a mean of 3.25, one gives 2.1: moved at 30. Reward: two of eight at 0.1 lie 0.175 below: 41
    recorded = [one.name for one in WATCHED if one.name in run()[0]]
    assert found == dict.fromkeys(recorded) | {"k3_nats_per_token": 41 - 30}
    assert "grad_norm_head" in recorded and "argmax_flip_share" not in recorded
    assert leads(run(fall=40, rise=50))["k3_nats_per_token"] == 41 - 50


def test_a_run_that_does_not_fall_has_no_leads():
    assert leads(run(fall=60)) is None


def test_the_text_counts_launches_and_says_what_never_moved():
    pytest.importorskip("matplotlib")
    from types import SimpleNamespace

    from suite.report.figures.fall import lead_text

    runs = [SimpleNamespace(metrics=run(rise=rise)) for rise in (30, 31, 32)] + [SimpleNamespace(metrics=run(fall=60))]
    text = lead_text(runs)
    assert "over 3 launches" in text and "k3 (nats per token) by a factor of 2: 10.0 [" in text and "entropy (nats) by a factor of 1.5: never moved" in text
    assert lead_text(runs[-1:]) is None


def test_leads_over_launches_have_an_interval_and_come_in_the_order_of_who_moved_first():
    early = [run(rise=30) for _ in range(3)]
    for metrics, start in zip(early, (35, 36, 37), strict=True):
        for row in metrics[start:]:
            row["entropy_nats"] = 3.0
    for row in early[0][20:]:
        row["grad_norm"] = 10.0  # first of all, and in one launch alone
    found = {lead.watched.name: lead for lead in over_launches(early)}
    k3, entropy, norm = (found[name] for name in ("k3_nats_per_token", "entropy_nats", "grad_norm"))
    assert (k3.mean, k3.interval, k3.num_moved, k3.num_fell) == (11, None, 3, 3)  # equal leads have no spread
    assert entropy.mean == pytest.approx(41 - 36) and entropy.interval == pytest.approx((5 - 1.6859, 5 + 1.6859), abs=1e-3)
    assert norm.num_moved == 1 and norm.mean == 21
    assert [lead.watched.name for lead in in_order(list(found.values()))][:3] == ["k3_nats_per_token", "entropy_nats", "grad_norm"]
    assert lead_of(norm) == "21.0 (in 2 it never moved)" and lead_of(entropy) == "5.0 [3.3, 6.7]"
    assert over_launches([run(fall=60)]) == []
