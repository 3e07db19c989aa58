"""The page that shows several runs side by side."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from sequencer.analysis.comparison import Comparison
from sequencer.analysis.paired import PairedEvaluation, letter, points
from sequencer.analysis.plots import FAMILIES, read_columns
from sequencer.config.schema import lower_is_better
from sequencer.evaluation import Outcome
from sequencer.files import write_atomically
from sequencer.printing import printable
from sequencer.report.charts import comparison_charts
from sequencer.report.content import SMALL, percent, to_pixels
from sequencer.report.pictures import read_again, thumbnail
from sequencer.report.rendering import duration, render

SECTIONS = (
    ("runs", "Runs"),
    ("curves", "Curves"),
    ("configuration", "Configuration"),
    ("paired", "Same images"),
    ("disagreements", "Disagreements"),
)
COLOURS = FAMILIES[:6]  # the seventh is that of text, which cannot be seen on a dark page
MOST_RUNS_WITH_ALL_IMAGES = 3  # of more runs, only the two best ones show images
IMAGES = 24  # of a pair in each direction


def write_comparison(table: Comparison, paired: PairedEvaluation, path: Path) -> None:
    """Writes a page with the curves of runs, their settings, results and the images on which they disagree.

    Args:
        table: The runs, the best one first.
        paired: Their evaluation on the same images, in the same order.
        path: The file; one that exists is replaced.

    Raises:
        WriteError: The file cannot be written.
    """
    runs = [run for row in table.rows for run in row.runs]
    letters = [letter(place) for place in range(len(runs))]
    names = [f"{own} {printable(run.folder.resolve().name)}" for own, run in zip(letters, runs, strict=True)]
    colours = _colours(len(runs))
    columns = [read_columns(file) if (file := run.folder / "metrics.csv").is_file() else {} for run in runs]
    slots = ["val_ema" if run.settings.get("trainer.slot") == "ema" else "val" for run in runs]
    charts = comparison_charts(list(zip(letters, colours, columns, strict=True)), slots)
    pairs = paired.pairs
    shown = combinations(range(len(runs) if len(runs) <= MOST_RUNS_WITH_ALL_IMAGES else 2), 2)
    context = {
        "title": f"Comparison of {len(runs)} runs",
        "subtitle": paired.title,
        "figures": _figures(names, paired),
        "sections": SECTIONS,
        "charts": charts,
        "metric": table.metric,
        "runs": _rows(table, paired, names, colours),
        "keys": [(key, [printable(str(run.settings.get(key, ""))) for run in runs]) for key in table.keys],
        "letters": letters,
        "notes": table.notes,
        "pairs": [(letter(pair.first), letter(pair.second), pair) for pair in pairs],
        "several": len(pairs) > 1,  # then p-values are adjusted
        "galleries": _galleries(paired, [order for i, j in shown for order in ((i, j), (j, i))]),
        "points": points,
        "best_two_only": len(runs) > MOST_RUNS_WITH_ALL_IMAGES,
    }
    script = {"charts": [chart.pointer for chart in charts]}
    write_atomically(path, lambda file: file.write_text(render("comparison.html", context, script), encoding="utf-8"))


def _colours(number: int) -> list[str]:
    if number <= len(COLOURS):
        return list(COLOURS[:number])
    return [to_hex(colour) for colour in colormaps["turbo"](np.linspace(0.08, 0.92, number))]


def _figures(names: Sequence[str], paired: PairedEvaluation) -> list[tuple[str, str, str]]:
    """Name, value and note of the key figures."""
    first = paired.pairs[0]
    adjusted = f", adjusted for {len(paired.pairs)} pairs" if len(paired.pairs) > 1 else ""
    difference = first.result.difference
    figures = [
        (name, f"{top1.value:.2%}", f"top-1, 95%: {top1.low:.2%} to {top1.high:.2%}")
        for name, top1 in zip(names[:2], paired.accuracies[:2], strict=True)
    ]
    interval = f"points, 95%: {points(difference.low)} to {points(difference.high)}"
    return [
        *figures,
        ("A minus B", points(difference.value), interval),
        ("p-value", f"{first.adjusted:.3g}", f"McNemar's exact test{adjusted}"),
    ]


def _rows(
    table: Comparison, paired: PairedEvaluation, names: Sequence[str], colours: Sequence[str]
) -> list[dict[str, Any]]:
    """The runs for the template, in the order of the table."""
    found = []
    runs = [(rank, run) for rank, row in zip(table.ranks, table.rows, strict=True) for run in row.runs]
    for (rank, run), name, colour, top1 in zip(runs, names, colours, paired.accuracies, strict=True):
        value, results = run.value(table.metric), run.results
        found.append(
            {
                "name": name,
                "folder": printable(run.folder),
                "colour": colour,
                "rank": rank,
                "state": run.state,
                "value": value,
                "text": f"{value:.4f}" if lower_is_better(table.metric) else percent(value),
                "top1": top1,
                "epoch": results.get("best_epoch"),
                "parameters": results.get("parameters"),
                "seconds": results.get("time/train_s"),
                "time": duration(results["time/train_s"]) if "time/train_s" in results else "",
            }
        )
    return found


def _galleries(paired: PairedEvaluation, orders: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """The images that the first of two models classifies correctly and the second does not, for the template.

    Args:
        paired: The models.
        orders: The first and the second of each gallery.
    """
    right = paired.right
    galleries = []
    for first, second in orders:
        places = np.flatnonzero(right[first] & ~right[second]).tolist()
        # those of which the wrong model is surest come first
        shown = sorted(places, key=lambda place: -(paired.outcomes[second][place].probability or 0))[:IMAGES]
        galleries.append((first, second, len(places), shown))
    wanted = {paired.outcomes[0][place].image for *_, shown in galleries for place in shown}
    uris: dict[int, str] = {}
    for images, found in read_again(paired.split, paired.data, wanted) if wanted else ():
        pixels = to_pixels(images[[row for row, _ in found]], paired.data)
        uris |= {index: thumbnail(image) for (_, index), image in zip(found, pixels, strict=True)}
    return [
        {
            "first": letter(first),
            "second": letter(second),
            "total": total,
            "cards": [_card(paired, uris, first, second, place) for place in shown],
        }
        for first, second, total, shown in galleries
    ]


def _card(paired: PairedEvaluation, uris: dict[int, str], first: int, second: int, place: int) -> dict[str, Any]:
    a, b = paired.outcomes[first][place], paired.outcomes[second][place]
    return {
        "uri": uris[a.image],
        "id": printable(paired.split.ids[a.image]),
        "small": paired.data.img_size <= SMALL,
        "label": printable(paired.split.class_names[a.label]),
        "answers": [(letter(first), _answer(paired, a)), (letter(second), _answer(paired, b))],
    }


def _answer(paired: PairedEvaluation, outcome: Outcome) -> str:
    if outcome.predicted is None or outcome.probability is None:
        return "no prediction"
    return f"{printable(paired.split.class_names[outcome.predicted])} {percent(outcome.probability)}"
