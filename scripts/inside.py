"""Looks inside every run of a sweep by analyze.py, and collects what is found in one CSV file.

    python scripts/inside.py outputs/ablation_cell

Each run's memory, knock-out, symmetry and robustness are written to RUN/inside_N, N being the number of images; what is
there already is kept, so the same command goes on where it was interrupted. The images are kept beside the runs.
docs/results/inside.csv has a row for each quantity of each run, of which `scripts/results.py` makes the tables and the
picture of docs/inside.md.
"""

import math
import subprocess
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean

from _cli import Parser, integer, prepare_files, run
from _results.common import RESULTS, Row, read

from sequencer.analysis.comparison import find_runs
from sequencer.config import RequestError
from sequencer.config.request import load_run, load_summary
from sequencer.console import say
from sequencer.files import write_csv
from sequencer.printing import printable

SCRIPT = Path(__file__).with_name("analyze.py")
OUTPUT = RESULTS / "inside.csv"
Rows = list[Row]
Quantities = dict[str, float]


def main(argv: list[str] | None = None) -> int:
    return run(work, parse(argv))


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", metavar="RUN", type=Path, nargs="+", help="run folder, or folder of run folders")
    add(
        "--limit",
        metavar="N",
        type=integer(16),
        default=1000,
        help="test images; half of them are corrupted, and at most 128 taken for memory; default: %(default)s",
    )
    add("--output", type=Path, default=OUTPUT, metavar="FILE", help="CSV file; default: docs/results/inside.csv")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def work(args: Namespace) -> None:
    """Analyses the runs one after another, and writes the CSV file at the end.

    Raises:
        RequestError: There are no finished runs, they are not of CIFAR-10, or two have the same cell and seed.
        RuntimeError: An analysis failed.
    """
    found = find_runs(args.runs)
    runs: dict[tuple[str, int], Path] = {}  # by cell and seed
    for folder in found:
        if not load_summary(folder):
            continue
        config = load_run(folder)
        if config.data.name != "cifar10":
            raise RequestError(f"{printable(folder)} is of {config.data.name}: the pages are of CIFAR-10")
        key = config.model.kwargs.get("cell", "lstm"), config.seed
        if key in runs:
            raise RequestError(f"{printable(folder)} and {printable(runs[key])} have the same cell and seed")
        runs[key] = folder
    if not runs:
        raise RequestError("none of the runs has finished")
    if unfinished := len(found) - len(runs):
        say(f"left out, not finished: {unfinished} of {len(found)} runs")
    prepare_files({"--output": args.output})
    rows = []
    for number, ((cell, seed), folder) in enumerate(runs.items(), start=1):
        analysis = folder / f"inside_{args.limit}"
        say(f"{number} of {len(runs)}: {printable(folder)}")
        for name, (files, collect) in ANALYSES.items():
            if not all((analysis / file).exists() for file in files):
                _analyze(name, folder, args.limit, analysis)
            values = collect(*(read(analysis / file) for file in files))
            rows += [(cell, seed, name, quantity, f"{value:.6g}") for quantity, value in values.items()]
    write_csv(args.output, ("cell", "seed", "analysis", "quantity", "value"), rows)
    say(f"written: {args.output}")


def _analyze(name: str, folder: Path, limit: int, output: Path) -> None:
    if name == "memory":
        options = ["--images", str(_images(folder, limit)), "--untrained"]
    elif name == "robustness":
        half = limit // 2  # each of them is classified 71 times
        options = ["--limit", str(half), "--stored", str(_corrupted(folder, half))]
    else:
        options = ["--limit", str(limit)]
    options += ["--batch-size", "64", "--output", str(output)]
    command = [sys.executable, str(SCRIPT), name, str(folder), *options]
    if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise RuntimeError(f"analyze.py {name} {folder} ended with exit code {code}")


def _images(folder: Path, limit: int) -> Path:
    """Writes the first test images as files beside the runs, for the analysis of memory; returns their folder."""
    from torchvision.datasets import CIFAR10

    number = min(limit, 128)
    images = folder.parent / f"test_images_{number}"
    if len([*images.glob("*.png")]) < number:
        split = CIFAR10(load_run(folder).data.root, train=False)
        images.mkdir(exist_ok=True)
        for index in range(number):
            split[index][0].save(images / f"{index:04}.png")
    return images


def _corrupted(folder: Path, limit: int) -> Path:
    """Writes the first test images, corrupted, beside the runs in the layout of CIFAR-10-C; returns their folder.

    Corrupting them takes several times as long as classifying them, and all runs are shown the same images.
    """
    import numpy as np
    from torchvision.datasets import CIFAR10

    from sequencer.analysis.corruptions import CORRUPTIONS, SEVERITIES, corrupt

    arrays = folder.parent / f"corrupted_{limit}"
    if not (arrays / "labels.npy").exists():
        split = CIFAR10(load_run(folder).data.root, train=False)
        arrays.mkdir(exist_ok=True)
        for name in CORRUPTIONS:
            images = [corrupt(split.data[i], name, level, 0, i) for level in SEVERITIES for i in range(limit)]
            np.save(arrays / f"{name}.npy", np.stack(images))
        np.save(arrays / "labels.npy", np.tile(split.targets[:limit], len(SEVERITIES)))  # last: the others are whole
    return arrays


def _means(pairs: Iterable[tuple[str, float]]) -> Quantities:
    groups: dict[str, list[float]] = defaultdict(list)
    for name, value in pairs:
        groups[name].append(value)
    return {name: fmean(values) for name, values in groups.items()}


def _memory(curves: Rows, scans: Rows) -> Quantities:
    """Means over scans: log10 of the Jacobian's norm over that at distance 0, forget products, saturated gates."""
    starts = {_scan(row): float(row["jacobian_norm"]) for row in curves if row["distance"] == "0"}
    found = []
    for row in curves:
        kind, k = "untrained" if row["model"].endswith(", untrained") else "trained", row["distance"]
        found.append((f"{kind} gradient {k}", math.log10(float(row["jacobian_norm"]) / starts[_scan(row)])))
        if row["forget_product"]:
            found.append((f"{kind} forget product {k}", float(row["forget_product"])))
    for row in scans:
        if row["gate"] and not row["model"].endswith(", untrained"):
            found.append((f"saturated {row['gate']}", float(row["below"]) + float(row["above"])))
    return _means(found)


def _scan(row: dict[str, str]) -> tuple[str, ...]:
    return row["model"], row["module"], row["layer"], row["direction"]


def _knock_out(changes: Rows) -> Quantities:
    """Means over blocks, for each direction, of the change of top-1; and means over directions, for each block."""
    by_direction = _means((row["direction"], float(row["change"])) for row in changes)
    by_block = _means((f"block {row['block']}", float(row["change"])) for row in changes)
    return by_direction | by_block


def _symmetry(conditions: Rows) -> Quantities:
    """Top-1 of the images as they are, and its change under each condition."""
    return {f"{row['condition']} {row['level']}".strip(): float(row["change"] or row["top1"]) for row in conditions}


def _robustness(pieces: Rows) -> Quantities:
    """Top-1 on clean images, and means over the severities of each corruption."""
    return _means((row["piece"].removeprefix("stored ").rstrip(" 12345"), float(row["top1"])) for row in pieces)


ANALYSES: dict[str, tuple[tuple[str, ...], Callable[..., Quantities]]] = {
    "memory": (("memory.csv", "memory_scans.csv"), _memory),
    "knock-out": (("knock-out.csv",), _knock_out),
    "symmetry": (("symmetry.csv",), _symmetry),
    "robustness": (("robustness.csv",), _robustness),
}

if __name__ == "__main__":
    raise SystemExit(main())
