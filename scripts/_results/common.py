"""What the tables of results share: reading the CSV files, Markdown, and intervals over seeds."""

import csv
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RESULTS = DOCS / "results"
Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """Reads a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@functools.cache
def finished_runs(name: str) -> list[Row]:
    """Reads the finished runs of a file of docs/results that `scripts/compare.py` has written."""
    return [row for row in read(RESULTS / name) if row["state"] == "finished"]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table whose columns are aligned to the right, but for the first `texts`."""
    rule = ["---" if index < texts else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def interval(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """The mean with its 95% interval by Student's t.

    Args:
        values: One for each seed, at least two.
        digits: After the decimal point.
        sign: `+` to show that of positive numbers, as for differences.
    """
    from scipy.stats import t as student

    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    middle, low, high = (
        f"{value:{sign}z.{digits}f}" for value in (mean(values), mean(values) - half, mean(values) + half)
    )
    return f"{middle} ({low} to {high})"


def paired(first: dict[int, float], second: dict[int, float]) -> str:
    """The mean difference of two fractions with its 95% interval, in points, paired by seed."""
    return interval([100 * (first[seed] - second[seed]) for seed in first.keys() & second.keys()], sign="+")
