"""Pictures of evidence maps and of the contributions of scan directions."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from sequencer.analysis.attribution import Part, sum_by_source
from sequencer.analysis.plots import BLUE, INK, STYLE, VERMILION, Array, drawable, save, shorten

# blue speaks against a class and red for it; distinguishable with all common types of colour vision
SIGNED = "RdBu_r"
USED = (0.05, 0.95)  # of the colours, without the darkest ones
DARKEST = 0.4  # brightness of black pixels below a map, so that its colours are seen there too
LINE = 26  # characters of a caption of `plot_evidence`


class EvidenceRow(NamedTuple):
    """An image with the maps that are drawn beside it."""

    image: NDArray[np.uint8]  # `H0 W0 3`
    name: str
    prediction: str
    maps: list[tuple[str, Array]]  # caption and `H W`


def overlay(image: NDArray[np.uint8], values: Array, limit: float) -> NDArray[np.uint8]:
    """Colours the brightened grey version of an image by a signed map.

    Args:
        image: `H0 W0 3`.
        values: `H W`, enlarged to the image without smoothing, since each cell is one token.
        limit: Absolute value that gets the strongest colour.

    Returns:
        An image `H0 W0 3`.
    """
    height, width = image.shape[:2]
    rows = np.arange(height) * values.shape[0] // height
    columns = np.arange(width) * values.shape[1] // width
    scaled = np.clip(values[np.ix_(rows, columns)] / (limit or 1), -1, 1)
    grey = image / 255 @ np.array([0.299, 0.587, 0.114])  # luma of ITU-R 601
    brightness = DARKEST + (1 - DARKEST) * grey[..., None]
    return np.round(255 * brightness * signed_colours(scaled)).astype(np.uint8)


def signed_colours(values: Array) -> Array:
    """Returns the colours, in [0, 1], of values in [-1, 1]; the result has an axis of three channels more."""
    return np.asarray(colormaps[SIGNED](np.interp(values, (-1, 1), USED))[..., :3])


@rc_context(STYLE | {"axes.grid": False})
def plot_evidence(rows: Sequence[EvidenceRow], output: Path) -> Figure:
    """Plots evidence maps over their images, one row for each image.

    Args:
        rows: The images, all with the same number of maps.
        output: The image file that is written; its suffix decides the format.

    Returns:
        The figure.
    """
    columns = 1 + len(rows[0].maps)
    side_by_side = 1 if len(rows) < 3 else 2  # images
    lines = -(-len(rows) // side_by_side)
    size = ((2.2 * columns + 0.7) * side_by_side, 2.6 * lines + 0.9)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.08))
    panels = figure.subplots(lines, columns * side_by_side, squeeze=False).reshape(-1, columns)
    for unused in panels[len(rows) :].flat:
        unused.set_axis_off()
    for row, axes in zip(rows, panels, strict=False):
        limit = max(float(np.abs(values).max()) for _, values in row.maps)
        axes[0].imshow(row.image, interpolation="nearest")
        title = f"{shorten(row.name, LINE)}\n{shorten(row.prediction, LINE)}"
        axes[0].set_title(title, fontsize=8.5, fontweight="normal")
        for panel, (caption, values) in zip(axes[1:], row.maps, strict=True):
            panel.imshow(overlay(row.image, values, limit), interpolation="nearest")
            panel.set_title(_caption(caption), fontsize=8.5, fontweight="normal")
        scale = ScalarMappable(Normalize(-limit, limit), ListedColormap(colormaps[SIGNED](np.linspace(*USED, 256))))
        bar = figure.colorbar(scale, ax=list(axes), shrink=0.8, aspect=25)
        bar.ax.tick_params(labelsize=7)
        bar.set_label("logits", fontsize=8)
        for panel in axes:
            panel.set_axis_off()
    figure.supxlabel(
        "Share of each token in a logit; red speaks for the class, blue against it, on one scale per image.\n"
        "The shares and the bias sum to the logit. Tokens are mixed by then: a map shows where the evidence lies,\n"
        "not what was looked at.",
        fontsize=8,
        color=INK,
        x=0.01,
        ha="left",
    )
    save(figure, output)
    return figure


@rc_context(STYLE | {"axes.grid": False})
def plot_directions(parts: Sequence[Part], values: Array, title: str, output: Path) -> Figure:
    """Plots what the directions, biases and MLPs of all blocks contribute to a logit or a difference of logits.

    The left panel has a row for each block and a column for each source. The right panel has the sums over the blocks,
    with the stem and the head.

    Args:
        parts: As in `Contributions`.
        values: One value for each part.
        title: Title of the figure.
        output: The image file that is written; its suffix decides the format.

    Returns:
        The figure.
    """
    blocks = list(dict.fromkeys((part.stage, part.block) for part in parts if part.stage is not None))
    columns = list(dict.fromkeys(part.source for part in parts if part.stage is not None))
    table = np.full((len(blocks), len(columns)), np.nan)
    totals = sum_by_source(parts, values)
    for part, value in zip(parts, values, strict=True):
        if part.stage is not None:
            table[blocks.index((part.stage, part.block)), columns.index(part.source)] = value
    size = (3.4 + 0.75 * len(columns) + 3.2, 2.1 + 0.3 * max(len(blocks), len(totals)))
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    left, right = figure.subplots(1, 2, width_ratios=[2.2 + 0.75 * len(columns), 3.2])
    limit = float(np.nanmax(np.abs(table))) or 1.0
    decimals = _decimals(limit)
    colours = colormaps[SIGNED].with_extremes(bad="#eeeeee")
    image = left.imshow(table, cmap=colours, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            colour = "white" if abs(value) > 0.6 * limit else INK
            left.text(column, row, signed(value, decimals), ha="center", va="center", fontsize=7.5, color=colour)
    left.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    left.set_yticks(range(len(blocks)), [_name(*block) for block in blocks])
    left.tick_params(length=0)
    figure.colorbar(image, ax=left, shrink=0.8, aspect=25).set_label("contribution, in logits")
    _draw_totals(right, totals, decimals)
    figure.suptitle(drawable(title), x=0.01, ha="left", fontsize=11, fontweight="bold")
    save(figure, output)
    return figure


def _draw_totals(axes: Any, totals: dict[str, float], decimals: int) -> None:
    names, sums = list(totals), list(totals.values())
    axes.barh(range(len(names)), sums, color=[VERMILION if value > 0 else BLUE for value in sums], height=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.8)
    low, high = min(0.0, *sums), max(0.0, *sums)
    room = 0.3 * (high - low or 1)  # for the numbers
    axes.set_xlim(low - (room if low else 0), high + room)
    for number, value in enumerate(sums):
        side = 1 if value >= 0 else -1
        place = {"xytext": (4 * side, 0), "ha": "left" if value >= 0 else "right", "va": "center"}
        axes.annotate(signed(value, decimals), (value, number), textcoords="offset points", fontsize=8, **place)
    axes.set_title(f"sums over blocks: together {signed(sum(sums), decimals)}", fontsize=9, fontweight="normal")
    axes.set_xlabel("logits")


def _caption(text: str) -> str:
    """Breaks a text into at most two lines that fit above an image."""
    return textwrap.fill(drawable(text), LINE, max_lines=2, placeholder="…")


def _decimals(largest: float) -> int:
    """Returns how many decimals show three digits of the largest value, at least two and at most six."""
    return min(max(2 - math.floor(math.log10(largest)), 2), 6)


def signed(value: float, decimals: int = 2) -> str:
    """Formats a value with its sign; what rounds to zero has none."""
    rounded = round(value, decimals)
    return f"{rounded:+.{decimals}f}" if rounded else f"{0:.{decimals}f}"


def _name(stage: int | None, block: int | None) -> str:
    return f"stage {stage}, downsampling" if block is None else f"stage {stage}, block {block}"
