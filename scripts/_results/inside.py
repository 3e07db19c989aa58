"""The tables and the picture of docs/inside.md, of docs/results/inside.csv, which `scripts/inside.py` writes."""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean

from _results.ablations import CELLS
from _results.common import RESULTS, interval, markdown, read

STEPS = 8  # of a scan: tokens along a side of the image
GROUPS = {  # corruptions of CIFAR-10-C without frost
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
Found = Mapping[str, float]  # the quantities of a run
NAMES = {model.settings.get("model.kwargs.cell", "lstm"): model.label for model in CELLS}


@functools.cache
def runs(analysis: str) -> dict[str, list[dict[str, float]]]:
    """Returns the quantities of an analysis for every run of each cell, in the order of the seeds."""
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in read(RESULTS / "inside.csv"):
        if row["analysis"] == analysis:
            found[row["cell"], row["seed"]][row["quantity"]] = float(row["value"])
    return {cell: [values for (name, _), values in sorted(found.items()) if name == cell] for cell in NAMES}


def table(analysis: str, columns: Mapping[str, Callable[[Found], float | None]], digits: int, signed: bool) -> str:
    """A row for each cell: means over seeds, with intervals where seeds differ. A column may not exist for a cell."""
    lines = []
    for cell, seeds in runs(analysis).items():
        cells = []
        for column in columns.values():
            values = [value for seed in seeds if (value := column(seed)) is not None]
            cells.append(_cell(values, digits, "+" if signed else ""))
        lines.append((NAMES[cell], *cells))
    return markdown(("", *columns), lines)


def _cell(values: list[float], digits: int, sign: str) -> str:
    if len(set(values)) > 1:
        return interval(values, digits, sign)
    return f"{values[0]:{sign}.{digits}f}" if values else ""  # fresh weights do not depend on the seed


def memory_table() -> str:
    last = STEPS - 1

    def factor(kind: str) -> Callable[[Found], float]:
        return lambda seed: 10 ** ((seed[f"{kind} gradient {last}"] - seed[f"{kind} gradient 1"]) / (last - 1))

    def saturated(seed: Found) -> float | None:
        shares = [value for name, value in seed.items() if name.startswith("saturated")]
        return 100 * fmean(shares) if shares else None

    columns: dict[str, Callable[[Found], float | None]] = {
        "factor a token, untrained": factor("untrained"),
        "factor a token, trained": factor("trained"),
        f"product of {last} forget gates, untrained": lambda seed: seed.get(f"untrained forget product {last}"),
        f"product of {last} forget gates, trained": lambda seed: seed.get(f"trained forget product {last}"),
        "saturated gates, trained, %": saturated,
    }
    return table("memory", columns, digits=2, signed=False)


def _points(name: str) -> Callable[[Found], float]:
    return lambda seed: 100 * seed[name]


def knock_out_table() -> str:
    directions = {f"without {name}": _points(name) for name in ("down", "up", "right", "left")}
    blocks = {f"in block {number}": _points(f"block {number}") for number in range(4)}
    return table("knock-out", directions | blocks, digits=1, signed=True)


def symmetry_table() -> str:
    columns = {
        "mirrored left to right": "turn horizontal flip",
        "top to bottom": "turn vertical flip",
        "transposed": "turn transposition",
        "shifted by a quarter along rows": "shift along rows 0.25",
        "along columns": "shift along columns 0.25",
        "30% covered, whole rows": "cover rows 0.3",
        "whole columns": "cover columns 0.3",
        "2x2 pieces shuffled": "shuffle 2",
    }
    return table("symmetry", {name: _points(key) for name, key in columns.items()}, digits=1, signed=True)


def robustness_table() -> str:
    def mean_of(names: tuple[str, ...]) -> Callable[[Found], float]:
        return lambda seed: 100 * fmean(seed[name] for name in names)

    every = tuple(name for names in GROUPS.values() for name in names)
    columns = {"clean": _points("clean"), "corrupted": mean_of(every)}
    columns["corrupted / clean, %"] = lambda seed: mean_of(every)(seed) / seed["clean"]
    return table(
        "robustness", columns | {name: mean_of(names) for name, names in GROUPS.items()}, digits=1, signed=False
    )


def draw_inside(folder: Path) -> None:
    """Draws the gradients of all cells over distance, untrained and trained, with a line for each seed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from sequencer.analysis.plots import FAMILIES, STYLE, save

    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, kind in zip(panels, ("untrained", "trained"), strict=True):
            for colour, (cell, seeds) in zip(FAMILIES, runs("memory").items(), strict=False):
                for number, seed in enumerate(seeds):
                    norms = [10 ** seed[f"{kind} gradient {k}"] for k in range(STEPS)]
                    axes.plot(
                        range(STEPS), norms, color=colour, linewidth=1.2, label=NAMES[cell] if number == 0 else None
                    )
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_title(kind)
            axes.set_xlabel("distance k, tokens")
        panels[0].set_ylabel("norm of dh(t)/dx(t-k), relative")
        panels[1].legend(frameon=False, fontsize=8)
        save(figure, folder / "inside_memory.png")
