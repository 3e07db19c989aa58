"""Pictures of changes of accuracy: without single scan directions, and under changes of the images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from sequencer.analysis.attribution_plots import SIGNED, signed
from sequencer.analysis.changes import Change
from sequencer.analysis.knock_out import KnockOuts
from sequencer.analysis.plots import FAMILIES, INK, STYLE, add_caption, drawable, save, shorten
from sequencer.analysis.statistics import Interval
from sequencer.analysis.symmetry import GRID, PATTERNS, SHIFTS, TURNS, Condition, Symmetry

TEST = "McNemar's exact test with Holm's correction, p < 0.05"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LONGEST_NAME = 40  # characters of a model


@rc_context(STYLE | {"axes.grid": False})
def plot_knock_outs(found: KnockOuts, title: str, output: Path) -> Figure:
    """Plots the change of top-1 without each direction (columns) of each block (rows), in percentage points.

    Args:
        found: What is drawn.
        title: Names the model and the images.
        output: The image file that is written; its suffix decides the format.

    Returns:
        The figure.
    """
    blocks = list(dict.fromkeys((place.stage, place.block) for place in found.changes))
    columns = list(dict.fromkeys(place.direction for place in found.changes))
    points = {place: 100 * change.comparison.difference.value for place, change in found.changes.items()}
    limit = max(map(abs, points.values())) or 1.0
    size = (2.6 + max(0.85 * len(columns), 2.6), 2.1 + 0.3 * len(blocks))
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    axes = figure.subplots()
    table = np.full((len(blocks), len(columns)), np.nan)
    for place, value in points.items():
        row, column = blocks.index(place[:2]), columns.index(place.direction)
        table[row, column] = value
        colour = "white" if abs(value) > 0.6 * limit else INK
        weight = "bold" if found.changes[place].is_significant else "normal"
        label: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7.5, "color": colour, "fontweight": weight}
        axes.text(column, row, signed(value), **label)
        if found.changes[place].is_significant:
            axes.add_patch(Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, edgecolor=INK, linewidth=1.6))
    colours = colormaps[SIGNED].with_extremes(bad="#eeeeee")
    image = axes.imshow(table, cmap=colours, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_xlabel("scan direction")
    axes.set_yticks(range(len(blocks)), [f"stage {stage}, block {block}" for stage, block in blocks])
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, shrink=0.8, aspect=25).set_label("change of top-1, points")
    figure.suptitle(drawable(title), x=0.01, ha="left", fontsize=10, fontweight="bold", wrap=True)
    framed = sum(change.is_significant for change in found.changes.values())
    caption = (
        f"The output of one direction is replaced by its mean over the same {found.images:,} images at each position. "
        f"Top-1 of the whole model: {found.clean.value:.2%}. Framed: {TEST} ({framed} of {len(points)})."
    )
    add_caption(figure, caption)
    save(figure, output)
    return figure


@rc_context(STYLE)
def plot_symmetry(found: Mapping[str, Symmetry], title: str, output: Path) -> Figure:
    """Plots the accuracy of models under each change of the images, with 95% intervals.

    Args:
        found: The results by name of the model.
        title: Names the images.
        output: The image file that is written; its suffix decides the format.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(13, 7.4), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.1))
    grid = figure.add_gridspec(2, 10)
    turns = figure.add_subplot(grid[0, :4])
    upper = [figure.add_subplot(grid[0, place : place + 2], sharey=turns) for place in (4, 6, 8)]
    lower = [figure.add_subplot(grid[1, place : place + 2], sharey=turns) for place in range(0, 10, 2)]
    models = list(found.values())
    _draw_turns(turns, models)
    _draw_levels(upper[0], models, "shift along rows", "Shifted along rows", "shift, share of the side")
    _draw_levels(upper[1], models, "shift along columns", "Shifted along columns", "shift, share of the side")
    _draw_levels(upper[2], models, "shuffle", "Patches shuffled", "patches along a side")
    for axes, pattern in zip(lower, PATTERNS, strict=True):
        name = {"rows": "row by row", "columns": "column by column"}.get(pattern, pattern)
        _draw_levels(axes, models, f"cover {pattern}", f"Covered: {name}", "covered share of patches")
    for axes in (turns, lower[0]):
        axes.set_ylabel("top-1 accuracy")
    turns.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    tops = [top for model in models for top in (model.clean, *(change.top1 for change in model.changes.values()))]
    turns.set_ylim(0, min(1.0, 1.08 * max(top.high for top in tops)))
    for axes in (*upper, *lower[1:]):
        axes.tick_params(labelleft=False)
    add_heading(figure, title, list(found))
    caption = (
        "Bars: 95% intervals (Wilson's score). Dashed: unchanged images. Filled marks: the accuracy differs from that "
        f"on unchanged images ({TEST}, for each model over all conditions). Shifts are circular. Covered patches have "
        f"the mean colour; the grid is {GRID} x {GRID}, or one pixel a patch for smaller images; salience is gradient "
        "times input of the predicted class's logit. "
        "Shuffled: patches change places at random."
    )
    add_caption(figure, caption)
    save(figure, output)
    return figure


def add_heading(figure: Figure, title: str, models: list[str]) -> None:
    """Writes a title above a figure, and beside it the names of the models with their colours and markers."""
    names = [shorten(name, LONGEST_NAME) for name in models]
    handles = [Line2D([], [], color=colour_of(i), marker=marker_of(i), label=name) for i, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside upper right", ncols=min(len(names), 4))
    figure.suptitle(drawable(title), x=0.01, ha="left", fontsize=11, fontweight="bold")


def _draw_turns(axes: Axes, models: list[Symmetry]) -> None:
    names = ["unchanged", *TURNS]
    for number, model in enumerate(models):
        changes = [model.changes[Condition("turn", name)] for name in TURNS]
        at = np.arange(len(names)) + _offset(number, len(models))
        marks = [True, *(change.is_significant for change in changes)]
        draw_points(axes, at, [model.clean, *(change.top1 for change in changes)], marks, number)
        axes.axhline(model.clean.value, color=colour_of(number), linewidth=0.9, linestyle="--", zorder=1)
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names], fontsize=8)
    axes.set_title("Flipped and turned", fontsize=9.5)
    axes.grid(axis="x", visible=False)


def _draw_levels(axes: Axes, models: list[Symmetry], group: str, title: str, label: str) -> None:
    levels = [condition.level for condition in models[0].changes if condition.group == group]
    for number, model in enumerate(models):
        changes: list[Change] = [model.changes[Condition(group, level)] for level in levels]
        at = np.arange(len(levels)) + 0.6 * _offset(number, len(models))
        tops = [change.top1 for change in changes]
        axes.plot(at, [top.value for top in tops], color=colour_of(number), linewidth=1.2, zorder=2)
        draw_points(axes, at, tops, [change.is_significant for change in changes], number)
        axes.axhline(model.clean.value, color=colour_of(number), linewidth=0.9, linestyle="--", zorder=1)
    axes.set_xticks(range(len(levels)), [_level(level) for level in levels])
    axes.set_xlim(-0.5, len(levels) - 0.5)
    axes.set_title(title, fontsize=9.5)
    axes.set_xlabel(label)
    axes.grid(axis="x", visible=False)


def draw_points(axes: Axes, at: Any, tops: list[Interval], filled: list[bool], number: int) -> None:
    """Draws the accuracies of a model with their intervals, by filled or empty marks, at places along the axis."""
    for x, top, fill in zip(at, tops, filled, strict=True):
        colour = colour_of(number)
        axes.vlines(x, top.low, top.high, color=colour, linewidth=1.1, zorder=2)
        face = colour if fill else "white"
        style: dict[str, Any] = {"markerfacecolor": face, "markeredgecolor": colour, "markersize": 5, "zorder": 3}
        axes.plot([x], [top.value], marker=marker_of(number), linestyle="", **style)


def _offset(number: int, models: int) -> float:
    """Returns where the mark of a model stands beside the middle of its group."""
    return 0.6 * ((number + 0.5) / models - 0.5)


def describe_level(condition: Condition) -> str:
    """Names a condition in a few words, such as `cover rows 10%`."""
    return condition.level if isinstance(condition.level, str) else f"{condition.group} {_level(condition.level)}"


def _level(level: str | float) -> str:
    if isinstance(level, int):
        return f"{level} x {level}"
    share = float(level)
    return f"1/{round(1 / share)}" if 1 / share in SHIFTS else f"{share:.0%}"


def colour_of(number: int) -> str:
    """Returns the colour of a model, by its position."""
    return FAMILIES[number % len(FAMILIES)]


def marker_of(number: int) -> str:
    """Returns the marker of a model, by its position."""
    return MARKERS[number % len(MARKERS)]
