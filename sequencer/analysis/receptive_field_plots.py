"""Pictures of effective receptive fields, models in rows and stages in columns."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from sequencer.analysis.plots import BLUE, INK, STYLE, save, shorten
from sequencer.analysis.receptive_field import PRESETS, SHARES, StageField, measure, scaled

COLOURS = "pink"  # that of the paper; its lightness rises evenly, so that it is read without seeing hues
FEWEST_COLUMNS = 3  # of panels, empty ones included, so that one does not stand alone in the middle
BAR = 2.4  # length of the colour bar over the width of a column
FRAMED = 0.5  # share of the contribution along each axis that the frame holds
SCALES = {
    "sequencer": "log10(1 + A), from the least to the largest of all maps",
    "replknet": "log10(1 + A) over the largest of each map",
}


@rc_context(STYLE | {"axes.grid": False, "axes.spines.top": True, "axes.spines.right": True})
def plot_receptive_fields(models: Mapping[str, list[StageField]], preset: str, images: str, output: Path) -> Figure:
    """Plots effective receptive fields, a row for each model and a column for each stage.

    Args:
        models: The fields of each model.
        preset: The key of `PRESETS` that they were computed by.
        images: Says which images they were computed on, such as `8 images`.
        output: The image file that is written; its suffix decides the format.

    Returns:
        The figure.
    """
    maps = iter(scaled([field for fields in models.values() for field in fields], preset))
    columns = max(FEWEST_COLUMNS, *map(len, models.values()))
    figure = Figure(
        figsize=(max(2.05 * columns + 1.0, 7.8), 2.2 * len(models) + 1.9),
        layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.08),
    )
    panels = figure.subplots(len(models), columns, squeeze=False)
    for (name, fields), row in zip(models.items(), panels, strict=True):
        for unused in row[len(fields) :]:
            unused.set_axis_off()
        for field, axes in zip(fields, row, strict=False):
            _draw(axes, field, next(maps))
        row[0].set_ylabel(f"{shorten(name, 30)}\npixel row", fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("pixel column", fontsize=8)
    place: dict[str, Any] = {"location": "bottom", "anchor": (0.0, 1.0), "shrink": BAR / columns, "aspect": 40}
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), COLOURS), ax=panels, **place)
    bar.set_label(SCALES[preset], fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle("Effective receptive fields of the central token", x=0.01, ha="left", fontsize=11, weight="bold")
    figure.supxlabel(_caption(preset, images), fontsize=8, color=INK, x=0.01, ha="left")
    save(figure, output)
    return figure


def _draw(axes: Any, field: StageField, values: Any) -> None:
    height, width = field.contribution.shape
    axes.imshow(values, cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest", extent=(0, width, height, 0))
    found = measure(field)
    columns, rows = (spans[SHARES.index(FRAMED)] for spans in (found.columns, found.rows))
    frame: dict[str, Any] = {"fill": False, "edgecolor": BLUE, "linewidth": 1.2}
    axes.add_patch(Rectangle((columns.start, rows.start), len(columns), len(rows), **frame))
    axes.set_xticks([0, width])
    axes.set_yticks([0, height])
    axes.tick_params(labelsize=7, length=2)
    text = f"50%: {len(columns)} x {len(rows)} px" if columns else "no gradient"
    title = "{}, {} x {} tokens\n{}".format(shorten(field.stage), *field.tokens, text)
    axes.set_title(title, fontsize=7.5, fontweight="normal")


def _caption(preset: str, images: str) -> str:
    chosen = PRESETS[preset]
    place = " - 1" * bool(chosen.before_centre)
    return (
        f"Preset {preset}: the {'positive ' * chosen.positive_channels}channels of the token in row H // 2{place} and "
        f"column W // 2{place} at the end of a stage are summed;\nthe positive part of the gradient with respect to "
        f"the image, summed over colours, {'mean' if chosen.mean else 'sum'} of {images}, is the contribution A.\n"
        "Frame: the shortest intervals along rows (width) and columns (height) that hold 50% of A."
    )
