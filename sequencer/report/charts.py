"""Charts of the page as SVG whose colours follow the page, with the numbers that its script shows under the pointer."""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

from sequencer.analysis.plots import BLUE, GREEN, GREY, STYLE, VERMILION, Array, scale_epochs
from sequencer.analysis.statistics import Calibration
from sequencer.report.plots import draw_reliability

SIZE = (4.2, 2.6)  # inches
SVG_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "report", "savefig.facecolor": "none"}
SVG_STYLE |= {"axes.facecolor": "none"}
STYLED = STYLE | SVG_STYLE


class Series(NamedTuple):
    """A line of a chart."""

    name: str
    values: Array
    colour: str


class Chart(NamedTuple):
    """An SVG with what the page's script needs to show the values under the pointer."""

    title: str
    svg: str
    legend: list[tuple[str, str]]  # names and colours of its lines
    pointer: dict[str, Any]  # place of the axes, and for each position a row of values as text


def line_chart(title: str, x: Array, series: Sequence[Series], unit: str = "", mark: float | None = None) -> Chart:
    """Draws lines over epochs.

    Args:
        title: Title, and the accessible name of the picture.
        x: Epochs, counted from 1.
        series: Lines of the same length; a value that is not finite leaves a gap.
        unit: `%` for fractions, `s`, or empty.
        mark: Epoch that a vertical line marks.
    """
    with rc_context(STYLED):
        figure = Figure(figsize=SIZE, layout=ConstrainedLayoutEngine())
        axes = figure.subplots()
        for line in series:
            axes.plot(x, line.values, color=line.colour, marker="o" if len(x) == 1 else "", markersize=4)
        if mark is not None:
            axes.axvline(mark, color=GREY, linewidth=0.8, linestyle=":")
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        # all ticks have the same number of decimals
        axes.yaxis.set_major_formatter(PercentFormatter(1) if unit == "%" else ScalarFormatter(useOffset=False))
        axes.set_xlabel("epoch")
        scale_epochs(axes, x)
        svg, place = _render(figure, axes, float(x[0]), float(x[-1]), title)
    rows = [[f"epoch {int(epoch)}", *(_text(line.values[i], unit, 4) for line in series)] for i, epoch in enumerate(x)]
    legend = [(line.name, line.colour) for line in series]
    pointer = {**place, "rows": rows, "names": [name for name, _ in legend], "colours": [key for _, key in legend]}
    return Chart(title, svg, legend, pointer)


def reliability_chart(found: Calibration) -> Chart:
    """Draws the accuracy of each bin over its mean confidence; the area of a dot is its share of the images."""
    title = "Reliability diagram"
    with rc_context(STYLED):
        figure = Figure(figsize=(3.6, 3.4), layout=ConstrainedLayoutEngine())
        axes = figure.subplots()
        draw_reliability(axes, found)
        middle = 0.5 / len(found.counts)
        svg, place = _render(figure, axes, middle, 1 - middle, title)
    rows: list[list[str]] = []
    for count, confidence, accuracy in zip(found.counts, found.confidence, found.accuracy, strict=True):
        values = [_text(confidence, "%", 4), _text(accuracy, "%", 4), f"{count:,}"]
        rows.append([f"bin {len(rows) + 1} of {len(found.counts)}", *values])
    pointer = {**place, "rows": rows, "names": ["confidence", "accuracy", "images"], "colours": []}
    return Chart(title, svg, [("images of a bin", BLUE)], pointer)


def run_charts(columns: dict[str, Array], best_epoch: int) -> list[Chart]:
    """Draws the curves of a run from the columns of its `metrics.csv`; a column that is missing leaves its line out.

    Args:
        columns: Values by name, one for each epoch.
        best_epoch: Epoch of the weights that were kept, counted from 1.
    """
    x = columns["epoch"]
    charts = (
        ("Loss", "", (("train/loss", "training", GREY), ("val/loss", "validation", BLUE))),
        ("Top-1 accuracy", "%", (("train/top1", "training", GREY), ("val/top1", "validation", BLUE))),
        ("Learning rate", "", (("lr", "at the end of the epoch", GREEN),)),
        ("Gradient norm", "", (("train/grad_norm", "mean over updates", GREEN),)),
        (
            "Seconds of an epoch",
            "s",
            (("time/step_s", "training steps", BLUE), ("time/data_s", "waiting for data", GREY)),
        ),
    )
    found = []
    for title, unit, lines in charts:
        ema = [(name.replace("val/", "val_ema/"), "validation, EMA", VERMILION) for name, *_ in lines if "val/" in name]
        series = [Series(text, columns[name], colour) for name, text, colour in [*lines, *ema] if name in columns]
        series = [line for line in series if np.isfinite(line.values).any()]
        if series:
            found.append(line_chart(title, x, series, unit, best_epoch))
    return found


def comparison_charts(runs: Sequence[tuple[str, str, dict[str, Array]]], slots: Sequence[str]) -> list[Chart]:
    """Draws the curves of several runs over each other; a run without a column has no line in its chart.

    Args:
        runs: Name, colour and the columns of `metrics.csv` of each.
        slots: The weights whose validation each run shows, `val` or `val_ema`.
    """
    epochs = max((len(columns["epoch"]) for *_, columns in runs if columns), default=0)
    found = []
    for title, unit, column in (
        ("Validation top-1", "%", "val/top1"),
        ("Validation loss", "", "val/loss"),
        ("Training top-1", "%", "train/top1"),
        ("Training loss", "", "train/loss"),
        ("Learning rate at the end of the epoch", "", "lr"),
        ("Gradient norm", "", "train/grad_norm"),
    ):
        series = []
        for (name, colour, columns), slot in zip(runs, slots, strict=True):
            values = np.full(epochs, np.nan)
            own = columns.get(column.replace("val/", f"{slot}/"), values)
            values[: len(own)] = own
            if np.isfinite(values).any():
                series.append(Series(name, values, colour))
        if series:
            found.append(line_chart(title, np.arange(1.0, epochs + 1), series, unit))
    return found


def _text(value: float, unit: str, digits: int = 3) -> str:
    if not np.isfinite(value):
        return "-"
    return f"{100 * value:.{digits}g}%" if unit == "%" else f"{value:.{digits}g}{' s' if unit else ''}"


def _render(figure: Figure, axes: Axes, first: float, last: float, title: str) -> tuple[str, dict[str, float]]:
    """Renders a figure; returns the SVG and, as fractions of it, the x of two positions and the ends of the y axis."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    left, right = axes.transData.transform([(first, 0), (last, 0)])[:, 0] / figure.bbox.width
    bounds = axes.get_position()
    place = {"left": float(left), "right": float(right), "top": float(1 - bounds.y1), "bottom": float(bounds.y0)}
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<g|<path) id="(?!m|p)[^"]*"', r"\1", svg)  # ids of groups would be repeated in the page
    svg = re.sub(r'^<svg [^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{title}">', svg)
    return svg, place
