"""Plots of a run's curves and confusion matrix, of a sweep's results, and of how costs grow.

Colours are those of Okabe and Ito, which are distinguishable with most types of colour vision. Figures are drawn
without pyplot, so that no global state is changed.
"""

import csv
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)
from numpy.typing import ArrayLike, NDArray

from sequencer.config.schema import lower_is_better
from sequencer.files import write_atomically
from sequencer.printing import printable

Array = NDArray[np.float64]

INK, FAINT = "#333333", "#8a8a8a"
GREY, BLUE, VERMILION, GREEN = "#7f7f7f", "#0072b2", "#d55e00", "#009e73"
FAMILIES = (BLUE, VERMILION, GREEN, "#e69f00", "#56b4e9", "#cc79a7", INK)
SLOTS = {"val": ("validation", BLUE), "val_ema": ("validation, EMA", VERMILION)}

MOST_NUMBERED_CLASSES = 20
MOST_LABELS = 30
LONGEST_LABEL = 18  # characters
CHARACTER_WIDTH = 0.08  # inches, average

STYLE: dict[Any, Any] = {  # matplotlib's stubs type the keys as literals
    "font.family": "DejaVu Sans",  # is part of matplotlib
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $5 or $10
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
}


@rc_context(STYLE)
def plot_curves(metrics_csv: Path, output: Path, best_epoch: int) -> Figure:
    """Plots loss, top-1 accuracy and learning rate of a run over epochs, counted from 1.

    A missing or non-finite value leaves a gap.

    Args:
        metrics_csv: The run's `metrics.csv`.
        output: The image file that is written; its suffix decides the format.
        best_epoch: The epoch of `best.ckpt`, whose accuracies are marked.

    Returns:
        The figure.

    Raises:
        ValueError: The file has no row.
    """
    columns = read_columns(metrics_csv)
    if not columns:
        raise ValueError(f"{metrics_csv} has no epoch")
    epochs = columns["epoch"]
    figure = Figure(figsize=(12, 3.8), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    loss, top1, lr = figure.subplots(1, 3, width_ratios=[1.2, 1.2, 0.8])
    _draw_loss(loss, epochs, columns)
    _draw_top1(top1, epochs, columns, best_epoch)
    _draw_line(lr, epochs, columns["lr"], GREEN)
    lr.set_ylim(bottom=0)
    lr.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    pad = 10 + 13 * sum(
        f"{slot}/top1" in columns for slot in SLOTS
    )  # points; room for the legend between title and axes
    for axes, title in ((loss, "Loss"), (top1, "Top-1 accuracy"), (lr, "Learning rate")):
        axes.set_title(title, pad=pad)
        axes.set_xlabel("epoch")
        scale_epochs(axes, epochs)
    save(figure, output)
    return figure


def scale_epochs(axes: Axes, epochs: Array) -> None:
    """Sets the limits and ticks of an axis of epochs, so that no tick lies outside of them."""
    margin = 0.5 if len(epochs) == 1 else 0.03 * (epochs[-1] - epochs[0])
    axes.set_xlim(epochs[0] - margin, epochs[-1] + margin)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def read_columns(metrics_csv: Path) -> dict[str, Array]:
    """Reads `metrics.csv` as arrays by column, with NaN for what is empty or not finite; empty without an epoch."""
    with open(metrics_csv, newline="") as file:
        rows = list(csv.DictReader(file))
    names = rows[0] if rows else ()
    columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}
    return {name: np.where(np.isfinite(values), values, np.nan) for name, values in columns.items()}


def _draw_loss(axes: Axes, epochs: Array, columns: dict[str, Array]) -> None:
    curves = [("train/loss", "training", GREY)]
    curves += [(f"{slot}/loss", *look) for slot, look in SLOTS.items() if f"{slot}/loss" in columns]
    for name, label, colour in curves:
        _draw_line(axes, epochs, columns[name], colour, label)
    values = np.concatenate([columns[name] for name, _, _ in curves])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and (decades := math.log10(values.max() / values.min())) > 1:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _draw_legend(axes, ncols=len(curves))


def _draw_top1(axes: Axes, epochs: Array, columns: dict[str, Array], best_epoch: int) -> None:
    best = int(np.flatnonzero(epochs == best_epoch)[0])
    for slot, (label, colour) in SLOTS.items():
        values = columns.get(f"{slot}/top1")
        if values is None:
            continue
        if np.isfinite(values[best]):
            label += f": {values[best]:.2%} in the best epoch, {best_epoch}"
            axes.plot(best_epoch, values[best], "o", color=colour, markersize=7, markeredgecolor="white", zorder=3)
        _draw_line(axes, epochs, values, colour, label)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    _draw_legend(axes, ncols=1)


@rc_context(STYLE)
def plot_growth(records: Sequence[dict[str, Any]], output: Path) -> Figure:
    """Plots median times over the quantities that were varied, on logarithmic axes.

    There is one panel for each quantity and mode, with one line for each contender.

    Args:
        records: Measurements of `scripts/benchmark.py growth`, with the keys `quantity`, `value`, `mode`, `contender`
            and `median_s` (seconds).
        output: The image file that is written; its suffix decides the format.

    Returns:
        The figure.
    """
    quantities = list(dict.fromkeys(record["quantity"] for record in records))
    modes = list(dict.fromkeys(record["mode"] for record in records))
    names = list(dict.fromkeys(record["contender"] for record in records))
    figure = Figure(figsize=(3.6 * len(quantities), 3.0 * len(modes)), layout=ConstrainedLayoutEngine(h_pad=0.1))
    panels = figure.subplots(len(modes), len(quantities), squeeze=False)
    for row, mode in zip(panels, modes, strict=True):
        for axes, quantity in zip(row, quantities, strict=True):
            for name, colour in zip(names, (GREY, BLUE, VERMILION, GREEN), strict=False):
                chosen = [r for r in records if (r["quantity"], r["mode"], r["contender"]) == (quantity, mode, name)]
                values = [record["value"] for record in chosen]
                times = [record["median_s"] * 1e3 for record in chosen]
                axes.plot(values, times, color=colour, marker="o", markersize=3, label=name)
            axes.set_title(f"{mode}, by {quantity}")
            axes.set_xlabel(quantity)
            axes.set_ylabel("ms")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
    panels[0][0].legend()
    save(figure, output)
    return figure


@rc_context(STYLE)
def plot_sweep(rows: Sequence[tuple[str, str, int, Sequence[float]]], metric: str, title: str, output: Path) -> Figure:
    """Plots a metric of the trials of a sweep.

    The left panel shows each seed as a ring and the mean over seeds as a bar. If the trials differ in their number of
    parameters, a right panel shows the means over that number, with a line through each family. Each family has a
    colour of its own, unless there are more families than colours.

    Args:
        rows: Tuples `(label, family, parameters, value for each seed)`, from top to bottom.
        metric: The metric, e.g. `val/top1`; all but losses are fractions, shown in per cent.
        title: Title of the figure.
        output: The image file that is written; its suffix decides the format.

    Returns:
        The figure.
    """
    families = list(dict.fromkeys(family for _, family, _, _ in rows))
    few = len(families) <= len(FAMILIES)  # enough colours; otherwise all families are blue, without lines
    colours = dict(zip(families, FAMILIES, strict=False)) if few else dict.fromkeys(families, BLUE)
    panels = 2 if len({parameters for _, _, parameters, _ in rows}) > 1 else 1
    width = 3.6 + CHARACTER_WIDTH * max(len(label) for label, _, _, _ in rows)
    size = (width + 4.2 * (panels - 1), 1.2 + max(0.3 * len(rows), 1.4))
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    axes = figure.subplots(1, panels, squeeze=False, width_ratios=[width, 4.2][:panels])[0]
    for number, (_, family, _, values) in enumerate(rows):
        axes[0].plot(np.mean(values), number, "|", color=colours[family], markersize=13, markeredgewidth=3)
        axes[0].plot(values, [number] * len(values), "o", color=FAINT, markerfacecolor="none", markersize=5)
    axes[0].set_yticks(range(len(rows)), [drawable(label) for label, _, _, _ in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    as_text = "{x:g}" if lower_is_better(metric) else PercentFormatter(1)
    axes[0].xaxis.set_major_locator(MaxNLocator(5))
    axes[0].xaxis.set_major_formatter(as_text)
    axes[0].set_xlabel(metric)
    figure.suptitle(drawable(title), x=0.01, ha="left", fontsize=11, fontweight="bold")
    if panels > 1:
        for family in families:
            points = sorted((parameters, np.mean(values)) for _, own, parameters, values in rows if own == family)
            line = f"o{'-' if few else ''}"
            axes[1].plot(*zip(*points, strict=True), line, color=colours[family], markersize=7, markeredgecolor="white")
        _scale_parameters(axes[1], [parameters for _, _, parameters, _ in rows])
        axes[1].yaxis.set_major_formatter(as_text)
    save(figure, output)
    return figure


def _scale_parameters(axes: Axes, parameters: Sequence[int]) -> None:
    """Labels a logarithmic axis of numbers of parameters, with as few ticks as have room beside each other."""
    ratio = max(parameters) / min(parameters)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(4) if ratio < 4 else LogLocator(subs=(1, 2, 5) if ratio < 50 else (1,)))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.15)
    axes.set_xlabel("parameters")


def _draw_line(axes: Axes, epochs: Array, values: Array, colour: str, label: str | None = None) -> None:
    finite = np.concatenate([[False], np.isfinite(values), [False]])
    alone = finite[1:-1] & ~finite[:-2] & ~finite[2:]  # between two gaps, where a line would not be visible
    axes.plot(epochs, values, color=colour, label=label)
    axes.plot(epochs[alone], values[alone], "o", color=colour, markersize=4)


def _draw_legend(axes: Axes, ncols: int) -> None:
    """Draws a legend above the axes, where it covers no curve."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=ncols, borderaxespad=0.3, borderpad=0, handlelength=1.4)


@rc_context(STYLE | {"axes.grid": False, "axes.spines.top": True, "axes.spines.right": True})
def plot_confusion(confusion: ArrayLike, class_names: Sequence[str], output: Path, title: str) -> Figure:
    """Plots a confusion matrix, each row normalised by the number of images of its true class.

    Cells are labelled with percentages for up to 20 classes. If there are too many classes to name, every nth is named.

    Args:
        confusion: Counts `K K`; rows are true classes, columns predicted classes. A tensor must be on the CPU.
        class_names: K names.
        output: The image file that is written; its suffix decides the format.
        title: Title of the figure; top-1 accuracy and the number of images are written below it.

    Returns:
        The figure.
    """
    counts = np.asarray(confusion)
    support = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, support, where=support > 0, out=np.full(counts.shape, np.nan))
    numbered = len(counts) <= MOST_NUMBERED_CLASSES
    side = max(2.6, 0.42 * len(counts)) if numbered else 8.0
    figure = Figure(figsize=(side + 2.4, side + 1.9), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    axes = figure.subplots()
    # a square-root scale, so that rare confusions are visible
    norm = PowerNorm(0.5, 0, 1)
    colours = colormaps["Blues"].with_extremes(bad="#eeeeee")
    image = axes.imshow(shares, cmap=colours, norm=norm, interpolation="nearest")
    if numbered:
        _write_shares(axes, counts, shares, norm)
    _name_classes(axes, class_names, side)
    _add_colour_bar(figure, axes, image, numbered)
    total = int(counts.sum())
    result = f"top-1 {counts.trace() / total:.2%} of {total:,} images" if total else "no image has a prediction"
    axes.set_title(drawable(title), pad=24)
    axes.annotate(result, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points")
    save(figure, output)
    return figure


def _write_shares(axes: Axes, counts: NDArray[Any], shares: Array, norm: PowerNorm) -> None:
    for row, column in zip(*np.nonzero(counts), strict=True):
        share = 100 * shares[row, column]
        text = "<1" if share < 1 else ">99" if 99.5 <= share < 100 else f"{share:.0f}"
        colour = "white" if norm(shares[row, column]) > 0.6 else INK
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)


def _name_classes(axes: Axes, class_names: Sequence[str], side: float) -> None:
    """Labels both axes of a matrix `side` inches wide with as many class names as fit."""
    nth = next(n for n in _round_numbers() if len(class_names) <= MOST_LABELS * n)
    shown = range(0, len(class_names), nth)
    names = [shorten(class_names[i]) for i in shown]
    note = f" (one in {nth} named)" if nth > 1 else ""
    too_wide = CHARACTER_WIDTH * max(map(len, names)) > 0.9 * side / len(names)
    axes.set_xticks(shown, names, rotation=90 if too_wide else 0)
    axes.set_yticks(shown, names)
    axes.tick_params(length=0 if nth == 1 else 3)
    axes.set_xlabel(f"predicted class{note}")
    axes.set_ylabel(f"true class{note}")


def _round_numbers() -> Any:
    """Yields 1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def shorten(name: str, longest: int = LONGEST_LABEL) -> str:
    name = drawable(name)
    return name if len(name) <= longest else name[: longest - 1] + "…"


def drawable(text: str) -> str:
    """Returns text as `printable` shows it, with escapes in place of characters that the font lacks, such as CJK."""
    glyphs = get_font(findfont(STYLE["font.family"])).get_charmap()
    return "".join(c if ord(c) in glyphs else c.encode("unicode_escape").decode() for c in printable(text))


def _add_colour_bar(figure: Figure, axes: Axes, image: Any, numbered: bool) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=30, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
    bar.set_label("share of the true class (in the cells: %)" if numbered else "share of the true class")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.outline.set_visible(False)  # type: ignore[operator]  # a Spine, which the stubs type as a function


def add_caption(figure: Figure, text: str) -> None:
    """Writes a caption below a figure, in lines as long as the figure is wide."""
    lines = textwrap.fill(drawable(text), int(13.5 * figure.get_figwidth()))
    figure.supxlabel(lines, fontsize=8, color=INK, x=0.01, ha="left")


def save(figure: Figure, output: Path) -> None:
    """Writes a figure in the format of the suffix of `output`."""
    write_atomically(output, lambda path: figure.savefig(path, format=output.suffix[1:]))
