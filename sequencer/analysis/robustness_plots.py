"""Picture of the accuracy on corrupted images and under attacks."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from sequencer.analysis.corruptions import SEVERITIES
from sequencer.analysis.plots import BLUE, GREY, STYLE, VERMILION, add_caption, save

MAP = "cividis"  # distinguishable with all common types of colour vision


@rc_context(STYLE)
def plot_robustness(
    corrupted: Mapping[tuple[str, int], float], others: Mapping[str, float], caption: str, output: Path
) -> Figure:
    """Plots the accuracy by corruption and severity, and beside it what it is compared with.

    Args:
        corrupted: Top-1 accuracy by corruption and severity; may be empty.
        others: Top-1 accuracy on clean images, under attacks, or on other sets, by name.
        caption: Says below the picture how it was made.
        output: The image file that is written; its suffix decides the format.

    Returns:
        The figure.
    """
    names = list(dict.fromkeys(name for name, _ in corrupted))
    height = max(2.6, 0.3 * len(names) + 1.8)
    figure = Figure(figsize=(10.5 if names else 6, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    if names:
        table, bars = figure.subplots(1, 2, width_ratios=[1.25, 1])
        _draw_table(table, names, corrupted)
    else:
        bars = figure.subplots()
    values = dict(others)
    for severity in SEVERITIES:
        if found := [corrupted[name, severity] for name in names if (name, severity) in corrupted]:
            values[f"severity {severity}"] = float(np.mean(found))
    _draw_bars(bars, values, len(others))
    add_caption(figure, caption)
    save(figure, output)
    return figure


def _draw_table(axes: Axes, names: list[str], corrupted: Mapping[tuple[str, int], float]) -> None:
    values = np.array([[corrupted.get((name, severity), np.nan) for severity in SEVERITIES] for name in names])
    image = axes.imshow(values, cmap=colormaps[MAP], vmin=0, vmax=max(float(np.nanmax(values)), 0.01), aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            dark = value < 0.55 * image.norm.vmax  # type: ignore[operator]  # the norm has limits
            axes.text(
                column, row, f"{value:.1%}", ha="center", va="center", fontsize=8, color="white" if dark else "black"
            )
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_xticks(range(len(SEVERITIES)), [str(severity) for severity in SEVERITIES])
    axes.grid(False)
    axes.set_xlabel("severity")
    axes.set_title("Top-1 accuracy by corruption")


def _draw_bars(axes: Axes, values: Mapping[str, float], compared: int) -> None:
    """Draws a bar for each value; the first is that of the clean images, and a line carries it to the others."""
    names, heights = list(values), list(values.values())
    colours = [GREY, *[VERMILION] * (compared - 1)][:compared] + [BLUE] * (len(names) - compared)
    axes.barh(range(len(names)), heights, color=colours, height=0.65)
    for row, value in enumerate(heights):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(
            f"{value:.1%}", (value, row), (4, 0), textcoords="offset points", va="center", fontsize=8.5, bbox=box
        )
    axes.axvline(heights[0], color=GREY, linewidth=1, linestyle=":", zorder=0)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, min(1.15, 1.18 * max(*heights, 0.01)))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("top-1 accuracy")
    axes.set_title("Top-1 accuracy, mean over corruptions" if len(names) > compared else "Top-1 accuracy")
