"""The figure of a collapse: what moved before the reward fell, and by how many iterations."""

from __future__ import annotations

from suite.measure.lead import DROP, HOLD, WATCHED, WINDOW, lead_of, over_launches
from suite.record.run import Run
from suite.report.figures.rl import draw_series, series_of, styles_of
from suite.report.figures.svg import plt, to_svg

PANELS = (("reward_mean", "training reward"), ("eval_reward_mean", "trainer's own policy, held-out problems"))
LOGARITHMIC = ("k3_nats_per_token", "bad_update_share_0p5", "grad_norm")  # what their names begin with


def plot_fall(runs: list[Run]) -> bytes:
    """A panel for the reward, for the trainer's own policy where it was evaluated, and for every watched series, over
    iterations: thin lines are launches, thick ones their mean."""
    panels = [*PANELS, *((one.name, one.label) for one in WATCHED)]
    drawn = [(name, label, series_of(runs, name)) for name, label in panels]
    drawn = [panel for panel in drawn if panel[2]]
    figure, axes = plt.subplots(-(-len(drawn) // 2), 2, figsize=(9.6, 2.5 * -(-len(drawn) // 2)), sharex=True, layout="constrained")
    styles = styles_of(sorted({run.arm for run in runs}))
    for panel, (name, label, series) in zip(axes.flat, drawn, strict=False):
        for arm, lines in series.items():
            draw_series(panel, arm, lines, styles[arm], label=name == "reward_mean")
        panel.set(title=label, yscale="log" if name.startswith(LOGARITHMIC) else "linear")
    for panel in axes.flat[len(drawn) :]:
        panel.set_visible(False)
    for panel in axes[-1]:
        panel.set(xlabel="iteration")
    axes.flat[0].legend(fontsize="small")
    return to_svg(figure)


def lead_text(runs: list[Run]) -> str | None:
    """What moved before the falls, in words, with the mean lead over launches and its 90 % interval; None where no reward
    fell."""
    found = over_launches([run.metrics for run in runs])
    if not found:
        return None
    parts = [f"{lead.watched.label} by a factor of {lead.watched.factor:g}: {lead_of(lead)}" for lead in found]
    rule = f"its {WINDOW}-iteration mean lies more than {DROP:g} below its peak, for {HOLD} iterations"
    return f"Iterations by which a series had moved before the reward fell ({rule}), over {found[0].num_fell} launches that fell: {'; '.join(parts)}."
