"""The result table of a sweep: the settings that its trials varied, and their results."""

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from omegaconf import OmegaConf

from sequencer.analysis.plots import plot_sweep
from sequencer.config.request import load_run, load_summary
from sequencer.config.schema import leaves
from sequencer.console import say, table_lines
from sequencer.files import write_atomically

OUTCOMES = ("parameters", "val/top1", "val/loss", "val_ema/top1", "test/top1", "test/loss", "time/train_s")


@dataclass(frozen=True)
class Row:
    """The results of trials that differ only in their seed."""

    label: str  # the settings that vary
    family: str  # the first of these settings
    parameters: int
    top1: tuple[float, ...]  # one fraction for each seed
    train_s: float  # mean training time in seconds


def write_sweep(folder: Path, title: str) -> list[Row]:
    """Writes the result table of a sweep as `sweep.csv`, `sweep.md` and `sweep.png`, and prints it.

    `sweep.csv` has one row for each trial; the other two show means and standard deviations over seeds. Results are
    those of the test split if every trial has them, otherwise of the validation split.

    Args:
        folder: The sweep's folder, which contains one run folder for each trial.
        title: Title of the table and the plot.

    Returns:
        The rows of the table, in the order of the trials; none if no trial has finished.
    """
    trials = [_read(path) for path in sorted(folder.glob("*/summary.json"), key=_natural)]
    if not trials:
        return []
    flat = [config for _, config, _ in trials]
    varied = sorted(key for key in set().union(*flat) if len({str(config.get(key)) for config in flat}) > 1)
    records = [
        {"trial": name} | {key: config.get(key) for key in varied} | {k: v for k, v in summary.items() if k in OUTCOMES}
        for name, config, summary in trials
    ]
    split = "test" if all("test/top1" in record for record in records) else "val"
    rows = _rows(records, [key for key in varied if key != "seed"], f"{split}/top1")
    write_atomically(folder / "sweep.csv", lambda path: _write_csv(path, records))
    heading = f"{title}: top-1 of the {'test' if split == 'test' else 'validation'} split"
    write_atomically(folder / "sweep.md", lambda path: path.write_text(_markdown(heading, rows)))
    plot_sweep([(row.label, row.family, row.parameters, row.top1) for row in rows], heading, folder / "sweep.png")
    _print(heading, rows)
    return rows


def _natural(path: Path) -> list[list[tuple[str, int]]]:
    """Returns a sort key that compares numbers in a trial's name by value: 8 before 16, lstm before lstm1997."""
    values = path.parent.name.split(",")
    return [[(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", value)] for value in values]


def _read(path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    config = leaves(OmegaConf.to_container(load_run(path.parent)))
    del config["run_dir"]
    summary = load_summary(path.parent)
    assert summary is not None  # `path` is its file
    return path.parent.name, config, summary


def _rows(records: list[dict[str, Any]], varied: list[str], outcome: str) -> list[Row]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        settings = tuple(f"{key.rsplit('.', 1)[-1]} {record[key]}" for key in varied if record[key] is not None)
        groups.setdefault(settings, []).append(record)
    return [
        Row(
            ", ".join(settings) or "equal settings",
            settings[0] if settings else "",
            group[0]["parameters"],
            tuple(math.nan if record[outcome] is None else record[outcome] for record in group),
            mean(record["time/train_s"] for record in group),
        )
        for settings, group in groups.items()
    ]


def spread(values: Sequence[float]) -> float:
    """Returns the sample standard deviation, or NaN for a single value."""
    return stdev(values) if len(values) > 1 else math.nan


def _cells(row: Row) -> list[str]:
    deviation = f" ± {100 * spread(row.top1):.2f}" if len(row.top1) > 1 else ""
    return [
        row.label,
        f"{row.parameters:,}",
        f"{100 * mean(row.top1):.2f}{deviation}",
        str(len(row.top1)),
        f"{row.train_s:.0f}",
    ]


COLUMNS = ("trial", "parameters", "top-1, %", "seeds", "training, s")


def _markdown(heading: str, rows: list[Row]) -> str:
    lines = [f"{heading}; mean ± standard deviation over seeds", "", f"| {' | '.join(COLUMNS)} |"]
    lines.append("| --- |" + " ---: |" * (len(COLUMNS) - 1))
    return "\n".join(lines + [f"| {' | '.join(_cells(row))} |" for row in rows]) + "\n"


def _print(heading: str, rows: list[Row]) -> None:
    for line in [f"\n{heading}", *table_lines(COLUMNS, map(_cells, rows))]:
        say(line)


def _write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for record in records for key in record)))
        writer.writeheader()
        writer.writerows(records)
