"""The picture of accuracy, speed and states of recurrences across input sizes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from sequencer.analysis.change_plots import TEST, add_heading, colour_of, draw_points, marker_of
from sequencer.analysis.memory import MOST_SEQUENCES, SATURATED
from sequencer.analysis.plots import INK, STYLE, add_caption, save
from sequencer.analysis.resolution import STATE_IMAGES, Resolution

STAGES: tuple[Any, ...] = ("-", "--", "-.", ":")  # lines of the stages, which repeat


@rc_context(STYLE)
def plot_resolution(found: Mapping[str, Resolution], title: str, speed: str, output: Path) -> Figure:
    """Plots accuracy and speed of models over the size of the images, and below the states of their recurrences.

    Args:
        found: The results by name of the model.
        title: Names the images.
        speed: Says how the speed was measured, such as `batches of 8 on cpu`.
        output: The image file that is written; its suffix decides the format.

    Returns:
        The figure.
    """
    has_states = any(states for model in found.values() for states in model.states.values())
    figure = Figure(figsize=(11, 7.6 if has_states else 4.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    panels = figure.subplots(2 if has_states else 1, 2, squeeze=False)
    top1, rate = panels[0]
    for number, model in enumerate(found.values()):
        _draw_accuracy(top1, model, number)
        _draw_line(rate, model.images_per_s, model.own_size, number)
    top1.set_title("Accuracy without retraining")
    top1.set_ylabel("top-1 accuracy")
    top1.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    highest = max(top.high for model in found.values() for top in model.top1.values())
    top1.set_ylim(-0.03 * highest, 1.06 * highest)  # room for the marks at 0 and at 100%
    rate.set_title("Speed")
    rate.set_ylabel("images a second")
    rate.set_yscale("log")
    rate.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    _plain_ticks(rate.yaxis)
    for axes in panels[0]:
        axes.set_xlabel("input size, pixels")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if has_states:
        _draw_states(panels[1], list(found.values()))
    add_heading(figure, title, list(found))
    caption = (
        "Images are resized and cropped for each size by the preprocessing of the model. Ringed and dashed: the size "
        "of the model. Bars: 95% intervals (Wilson's score). Filled marks: the accuracy differs from that at the size "
        f"of the model ({TEST}, for each model over its sizes). Speed: forward passes alone, without loading; median "
        f"over full batches after one warm-up pass; {speed}."
    )
    if has_states:
        low, high = SATURATED
        caption += (
            f" States: root mean square over units of the cell state (hidden state of a GRU or plain RNN) after the "
            f"last step, and share of gates below {low:g} or above {high:g} over all steps; means over blocks and "
            f"directions of a stage and at most {MOST_SEQUENCES} rows or columns of the first {STATE_IMAGES} images."
        )
    add_caption(figure, caption)
    save(figure, output)
    return figure


def _draw_accuracy(axes: Axes, model: Resolution, number: int) -> None:
    filled = [size == model.own_size or model.changes[size].is_significant for size in model.top1]
    axes.plot(list(model.top1), [top.value for top in model.top1.values()], color=colour_of(number), linewidth=1.2)
    draw_points(axes, model.top1, list(model.top1.values()), filled, number)
    own = model.top1[model.own_size].value
    axes.axhline(own, color=colour_of(number), linewidth=0.9, linestyle="--", zorder=1)
    _ring(axes, model.own_size, own, number)


def _draw_line(axes: Axes, values: Mapping[int, float], own: int, number: int, linestyle: str = "-") -> None:
    """Draws values by size or number of steps, and a ring at that of the model."""
    style: dict[str, Any] = {"marker": marker_of(number), "markersize": 4, "linestyle": linestyle}
    axes.plot(list(values), list(values.values()), color=colour_of(number), **style)
    _ring(axes, own, values[own], number)


def _ring(axes: Axes, x: float, y: float, number: int) -> None:
    axes.plot([x], [y], "o", markersize=11, markerfacecolor="none", markeredgecolor=colour_of(number))


def _draw_states(panels: Iterable[Axes], models: list[Resolution]) -> None:
    """Draws the root mean square of states, and the share of saturated gates, over the steps of a scan."""
    rms, saturated = panels
    stages = list(dict.fromkeys(entry.stage for model in models for entry in model.states[model.own_size]))
    for number, model in enumerate(models):
        for stage in (entry.stage for entry in model.states[model.own_size]):
            entries = [entry for states in model.states.values() for entry in states if entry.stage == stage]
            own = next(entry.steps for entry in model.states[model.own_size] if entry.stage == stage)
            line = STAGES[stages.index(stage) % len(STAGES)]
            for axes, name in ((rms, "state_rms"), (saturated, "saturated")):
                values = {entry.steps: getattr(entry, name) for entry in entries}
                _draw_line(axes, values, own, number, line)
    rms.set_title("State after the last step")
    rms.set_ylabel("root mean square over units")
    saturated.set_title("Saturated gates")
    saturated.set_ylabel("share of gates")
    saturated.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (rms, saturated):
        axes.set_ylim(0, 1.08 * axes.dataLim.y1)
        axes.set_xlabel("steps of a scan, tokens")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5)))
        _plain_ticks(axes.xaxis)
    if len(stages) > 1:
        lines = [Line2D([], [], color=INK, linestyle=STAGES[i % len(STAGES)]) for i in range(len(stages))]
        rms.legend(lines, stages, loc="best", handlelength=3)


def _plain_ticks(axis: Axis) -> None:
    """Labels a logarithmic axis with plain numbers."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())
