"""Pictures of the memory of recurrences: curves over distance with saturated gates, and maps of states and gates."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter
from numpy.typing import NDArray

from sequencer.analysis.memory import (
    MOST_SEQUENCES,
    PROBES,
    SATURATED,
    Array,
    ScanMemory,
    half_distance,
    mean_curves,
    mean_saturation,
    tokens,
)
from sequencer.analysis.plots import BLUE, FAINT, FAMILIES, INK, STYLE, VERMILION, add_caption, save, shorten

FLOOR = 1e-9  # what is smaller is not drawn
LINEAR = 64  # steps; longer scans get a logarithmic axis of distances
LABEL = 34  # characters
MAPS_SIDE_BY_SIDE = 3
GATES = ("input", "forget", "output", "reset", "update")  # order of the panels
LINES = (("-", "--"), ("-.", ":"))  # trained or alone, untrained beside trained; the second pair where colours repeat
STATES = "viridis"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Measured(NamedTuple):
    """The results of a model."""

    label: str
    is_trained: bool
    group: int  # models of a group have one colour
    scans: list[ScanMemory]
    image: NDArray[np.uint8] | None = None  # the first image, `H0 W0 3`; None for noise


@rc_context(STYLE)
def plot_curves(models: Sequence[Measured], about: str, output: Path) -> Figure:
    """Plots Jacobian norms and products of forget gates over distance, and the shares of saturated gates.

    There is a column for each length of the scans, such as those of the stages.

    Args:
        models: The results.
        about: What the images are, for the caption.
        output: The image file that is written; its suffix decides the format.

    Returns:
        The figure.
    """
    curves = [mean_curves(model.scans) for model in models]
    lengths = sorted({steps for found in curves for steps in found}, reverse=True)
    is_mixed = len({model.is_trained for model in models}) > 1
    present = {name for model in models for scan in model.scans for name in scan.saturated}
    gates = [name for name in GATES if name in present]
    below = 0.9 + 0.2 * len(models) if gates else 0.0  # inches
    above = 2 * max(2.6, 0.4 + 0.16 * len(models))
    size = (max(5.6 * len(lengths), 2.1 * len(gates) + 2.6, 9.0), above + below + 1.1)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    parts = figure.subfigures(2 if gates else 1, 1, height_ratios=[above, below] if gates else None, squeeze=False)[
        :, 0
    ]
    panels = parts[0].subplots(2, len(lengths), squeeze=False, sharey="row", sharex="col")
    for column, steps in enumerate(lengths):
        for model, found in zip(models, curves, strict=True):
            if steps in found:
                is_dashed = not model.is_trained and is_mixed
                _draw(panels[:, column], model, steps, *found[steps], is_dashed)
        _finish_column(panels[:, column], steps)
    panels[0, 0].set_ylabel("norm of dh(t)/dx(t-k)\nover that at k = 0")
    panels[1, 0].set_ylabel("product of the\nlast k forget gates")
    if gates:
        _draw_saturation(parts[1], models, gates)
    caption = (
        f"Frobenius norm of the Jacobian of one direction of one recurrent layer, from its last step t, over {about}: "
        f"root mean square over at most {MOST_SEQUENCES} rows or columns of each image, {PROBES} Gaussian probes each, "
        "divided by its value at k = 0, then the mean over blocks and directions of one length. Products of forget "
        "gates: mean over units, sequences, blocks and directions; the update gate of a GRU is taken for its forget "
        "gate. In brackets: the distance at which a curve is half its value at k = 0. "
        f"Values below {_power(FLOOR)} are left out."
    )
    add_caption(figure, caption)
    save(figure, output)
    return figure


def _draw(panels: Any, model: Measured, steps: int, curve: Array, carried: Array | None, is_dashed: bool) -> None:
    cycle, colour = divmod(model.group, len(FAMILIES))
    style = {"color": FAMILIES[colour], "linestyle": LINES[cycle % len(LINES)][is_dashed]}
    for axes, values in ((panels[0], curve), (panels[1], carried)):
        if values is not None:
            name = f"{shorten(model.label, LABEL)} ({tokens(half_distance(values), steps)})"
            axes.plot(np.arange(steps), np.where(values >= FLOOR, values, np.nan), label=name, **style)


def _finish_column(panels: Any, steps: int) -> None:
    for axes in panels:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
        axes.yaxis.set_minor_locator(NullLocator())
        if axes.lines:
            axes.legend(
                loc="upper left", bbox_to_anchor=(1.0, 1.03), title="half-distance in brackets", alignment="left"
            )
            axes.get_legend().get_title().set_fontsize(8)
    panels[0].set_title(f"{steps:,} steps")
    panels[1].set_xlabel("distance k, tokens")
    if steps > LINEAR:
        panels[1].set_xscale("symlog", linthresh=1, linscale=0.4)
        ticks = [0, *(10**n for n in range(math.ceil(math.log10(steps))))]
        panels[1].set_xticks(ticks)
        panels[1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panels[1].set_xlim(0, steps - 1 or 1)


def _power(value: float) -> str:
    """Formats a power of ten; the mathematical text of matplotlib is switched off."""
    return "10" + str(round(math.log10(value))).translate(SUPERSCRIPTS)


def _draw_saturation(figure: Any, models: Sequence[Measured], gates: Sequence[str]) -> None:
    """Draws a panel for each gate, with a bar for each model."""
    low, high = SATURATED
    panels = figure.subplots(1, len(gates), squeeze=False, sharey=True, sharex=True)[0]
    for axes, gate in zip(panels, gates, strict=True):
        for row, model in enumerate(models):
            below, above = mean_saturation(model.scans).get(gate, (math.nan, math.nan))
            if math.isnan(below):
                axes.annotate(
                    "none", (0, row), (4, 0), textcoords="offset points", va="center", color=FAINT, fontsize=8
                )
                continue
            axes.barh(row, below, color=BLUE, height=0.65)
            axes.barh(row, above, left=below, color=VERMILION, height=0.65)
        axes.set_title(f"{gate} gates", fontsize=9)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(models)), [shorten(model.label, LABEL) for model in models])
    panels[0].set_ylim(len(models) - 0.4, -0.6)
    panels[0].set_xlim(left=0)
    figure.supxlabel(f"share of saturated gates: below {low:g} (blue), above {high:g} (orange)", fontsize=9, color=INK)


@rc_context(STYLE | {"axes.grid": False})
def plot_maps(models: Sequence[Measured], output: Path) -> Figure:
    """Plots hidden states and gates of the first image as maps, of the last block of the first stage of each model.

    Args:
        models: The results.
        output: The image file that is written; its suffix decides the format.

    Returns:
        The figure.
    """
    chosen = [_last_of_first_stage(model.scans) for model in models]
    columns = min(len(models), MAPS_SIDE_BY_SIDE)
    lines = -(-len(models) // columns)
    heights = [
        max(len(scans[0].maps) for scans in chosen[columns * line : columns * (line + 1)]) for line in range(lines)
    ]
    widest = max(len(scans) for scans in chosen)
    widest += any(model.image is not None for model in models)
    size = (max(columns * (0.95 * widest + 1.3), 6.0), 1.05 * sum(heights) + 0.75 * lines + 0.7)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.04))
    parts = figure.subfigures(lines, columns, height_ratios=heights, squeeze=False)
    for number, (model, scans) in enumerate(zip(models, chosen, strict=True)):
        part = parts[number // columns, number % columns]
        rows = heights[number // columns]
        panels = part.subplots(rows, 1, squeeze=False)[:, 0]
        for axes in panels[len(scans[0].maps) :]:
            axes.set_axis_off()
        for axes, name in zip(panels, scans[0].maps, strict=False):
            _draw_maps(part, axes, name, scans)
            if model.image is not None:
                _make_room(axes, scans, model.image if axes is panels[0] else None)
        panels[0].set_xticks(*_centres(scans))
        panels[0].tick_params(labeltop=True, labelbottom=False)
        part.suptitle(f"{shorten(model.label, LABEL)}: {scans[0].module}", fontsize=8.5, x=0.02, ha="left")
    caption = (
        "Root mean square over channels of the hidden states, and mean over units of each gate, at every token of the "
        "first image; last block of the first stage. The other blocks are in memory.npz."
    )
    add_caption(figure, caption)
    save(figure, output)
    return figure


def _last_of_first_stage(scans: Sequence[ScanMemory]) -> list[ScanMemory]:
    """Returns the directions of the last layer of the last token mixer before the tokens are merged."""
    shape = scans[0].maps["hidden"].shape
    stage = scans[0].module.split(".blocks.")[0]
    last = [scan for scan in scans if scan.maps["hidden"].shape == shape and scan.module.startswith(stage)][-1]
    return [scan for scan in scans if (scan.module, scan.layer) == (last.module, last.layer)]


def _gap(width: int) -> int:
    return max(1, round(0.06 * width))


def _centres(scans: Sequence[ScanMemory]) -> tuple[list[float], list[str]]:
    width = scans[0].maps["hidden"].shape[1]
    return [i * (width + _gap(width)) + (width - 1) / 2 for i in range(len(scans))], [scan.direction for scan in scans]


def _draw_maps(figure: Any, axes: Any, name: str, scans: Sequence[ScanMemory]) -> None:
    """Draws one quantity of all directions side by side."""
    height, width = scans[0].maps[name].shape
    gap = np.full((height, _gap(width)), np.nan)
    joined = np.hstack([part for scan in scans for part in (scan.maps[name], gap)][:-1])
    is_gate = name != "hidden"
    image = axes.imshow(joined, cmap=STATES, vmin=None if is_gate else 0, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_ylabel(f"{name}\ngates" if is_gate else "hidden\nstates", fontsize=8)
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, aspect=12, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _make_room(axes: Any, scans: Sequence[ScanMemory], image: NDArray[np.uint8] | None) -> None:
    """Leaves room for the image at the left of the maps, and draws it there if it is given."""
    height, width = scans[0].maps["hidden"].shape
    right = axes.get_xlim()[1]
    left = -(width + _gap(width)) - 0.5
    if image is not None:
        axes.imshow(image, extent=(left, left + width, height - 0.5, -0.5))
    axes.set_xlim(left, right)
    axes.set_ylim(height - 0.5, -0.5)
