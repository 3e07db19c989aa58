"""The page's pictures as image files, which the loggers of a run receive too."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from sequencer.analysis.attribution_plots import overlay
from sequencer.analysis.plots import BLUE, FAINT, GREY, STYLE, Array, drawable, save, shorten
from sequencer.analysis.statistics import Calibration
from sequencer.evaluation import Predictions
from sequencer.report.content import Pictures, Selection, percent

COLUMNS = 4  # of mistakes
CELL = 1.25  # inches, side of an image
HEAD, TEXT, FOOT = 0.4, 0.6, 0.4  # inches, heights of the title, the text above an image, and the note
GAP, SEAM = 0.25, 0.04  # inches, between mistakes and between an image and its map
LONGEST_ID = 40  # characters


class Mistake(NamedTuple):
    """An image that was classified wrongly."""

    image: NDArray[np.uint8]  # `H W 3`
    map: Array | None  # `h w`, the evidence for the predicted class minus that for the true one
    label: str
    predicted: str
    probability: str  # of the predicted class
    identity: str  # path or index


def first_mistakes(
    selection: Selection, predictions: Predictions, pictures: Pictures, ids: Sequence[str], names: Sequence[str]
) -> list[Mistake]:
    """The mistakes with the largest loss, for a picture of them."""
    found = []
    for position, pixels in sorted(pictures.pixels.items(), key=lambda item: selection.mistakes.index(item[0])):
        predicted, label = int(predictions.predicted[position]), int(predictions.labels[position])
        evidence = pictures.evidence.get(position)
        probability = percent(predictions.probabilities[position, predicted])
        identity = ids[int(predictions.indices[position])]
        found.append(
            Mistake(pixels, evidence.map if evidence else None, names[label], names[predicted], probability, identity)
        )
    return found


def write_pictures(folder: Path, calibrated: Calibration | None, mistakes: Sequence[Mistake], title: str) -> None:
    """Writes `reliability.png` and `mistakes.png`; one that would be empty is left out, and an older one deleted."""
    for name in ("reliability.png", "mistakes.png"):
        (folder / name).unlink(missing_ok=True)
    if calibrated is not None:
        plot_reliability(calibrated, folder / "reliability.png", title)
    if mistakes:
        plot_mistakes(mistakes, folder / "mistakes.png", title)


def draw_reliability(axes: Axes, found: Calibration) -> None:
    """Draws the accuracy of each bin over its mean confidence; the area of a dot is its share of the images."""
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
    filled = found.counts > 0
    areas = 20 + 300 * found.counts[filled] / found.counts.sum()
    axes.plot(found.confidence[filled], found.accuracy[filled], color=BLUE)
    axes.scatter(found.confidence[filled], found.accuracy[filled], s=areas, color=BLUE, alpha=0.6, linewidths=0)
    axes.set_xlabel("mean probability of the predicted class")
    axes.set_ylabel("top-1 accuracy")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))


@rc_context(STYLE)
def plot_reliability(found: Calibration, output: Path, title: str) -> Figure:
    """Plots the reliability diagram.

    Args:
        found: The calibration of a model.
        output: The image file that is written; its suffix decides the format.
        title: Title of the figure; the calibration error is written below it.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(5.4, 5.4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    axes = figure.subplots()
    draw_reliability(axes, found)
    axes.set_xlabel(axes.get_xlabel() + "\nthe area of a dot is its share of the images")
    axes.set_title(drawable(title), pad=24)
    text = f"expected calibration error {found.error:.2%}, {found.counts.sum():,} images"
    axes.annotate(text, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points")
    save(figure, output)
    return figure


@rc_context(STYLE)
def plot_mistakes(mistakes: Sequence[Mistake], output: Path, title: str) -> Figure:
    """Plots wrongly classified images with label, prediction and, beside each, the evidence map laid over it.

    All images are drawn into one pair of axes, whose unit is an inch: a pair for each would take seconds.

    Args:
        mistakes: The images, at least one; either all have a map or none has.
        output: The image file that is written; its suffix decides the format.
        title: Title of the figure.

    Returns:
        The figure.
    """
    maps = mistakes[0].map is not None
    columns = min(COLUMNS, len(mistakes))
    heading = f"{title}, mistakes with the largest loss"
    lines = -(-len(mistakes) // columns)
    wide = 2 * CELL + SEAM  # a single image leaves room for its text
    width = max(columns * (wide + GAP) + GAP, 5.5)
    height = HEAD + lines * (CELL + TEXT + GAP) + (FOOT if maps else 0)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.text(GAP, height - 0.3, drawable(heading), fontsize=11, fontweight="bold")
    for number, mistake in enumerate(mistakes):
        left = GAP + number % columns * (wide + GAP)
        top = height - HEAD - number // columns * (CELL + TEXT + GAP) - TEXT
        pictures = [mistake.image]
        if mistake.map is not None:
            pictures.append(overlay(mistake.image, mistake.map, float(np.abs(mistake.map).max())))
        for place, picture in enumerate(pictures):
            start = left + place * (CELL + SEAM)
            axes.imshow(picture, extent=(start, start + CELL, top - CELL, top), interpolation="nearest")
        axes.text(left, top + 0.4, f"label: {shorten(mistake.label)}", fontsize=8.5)
        axes.text(left, top + 0.23, f"predicted: {shorten(mistake.predicted)}, {mistake.probability}", fontsize=8.5)
        axes.text(left, top + 0.07, _tail(mistake.identity), fontsize=6.5, color=FAINT)
    if maps:
        axes.text(
            GAP,
            0.17,
            "Red tokens speak for the prediction, blue ones for the label. Tokens are mixed by then:\n"
            "a map shows where the evidence lies, not what was looked at.",
            fontsize=8,
        )
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_aspect("auto")
    save(figure, output)
    return figure


def _tail(identity: str) -> str:
    """Returns the end of a path or index as a figure shows it."""
    text = drawable(identity)
    return text if len(text) <= LONGEST_ID else "…" + text[1 - LONGEST_ID :]
