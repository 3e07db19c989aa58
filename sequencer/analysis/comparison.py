"""Runs side by side: the settings in which they differ and their results, ranked by the metric that they optimise."""

import csv
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from omegaconf import OmegaConf

from sequencer.analysis.plots import plot_sweep
from sequencer.config.errors import RequestError
from sequencer.config.request import load_run, load_summary
from sequencer.config.schema import leaves, lower_is_better, objective
from sequencer.console import CONSOLE, say, table_lines
from sequencer.files import write_atomically
from sequencer.printing import first_line, printable

FINISHED = "finished"
# keys that change no result by themselves: where a run is written, what it is called, and copies of the data's keys
NO_SETTINGS = (
    "run_dir",
    "name",
    "logger",
    "data.default_model",
    "model.num_classes",
    "model.in_chans",
    "model.img_size",
)
CHOOSE_IMAGES = ("data.name", "data.root", "data.val_fraction", "trainer.limit_val_batches")  # that results are of
CHOSEN_BY_ROOT = ("imagefolder", "filelist", "webdataset")  # data sets that another data.root makes another set
LONGEST_LABEL = 60  # characters in the table; longer settings stand below it


@dataclass(frozen=True)
class Run:
    """A run as its folder shows it; of an unfinished one, the results of its best epoch so far."""

    folder: Path
    objective: str
    settings: dict[str, Any]
    results: dict[str, float]
    state: str  # FINISHED, or how far it has come

    def value(self, metric: str) -> float:
        """Returns a metric, or NaN if the run has none."""
        return self.results.get(metric, math.nan)


@dataclass(frozen=True)
class Row:
    """Finished runs that differ only in their seed, or one run that has not finished."""

    settings: tuple[str, ...]  # those in which the runs that are compared differ
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """The settings, and of an unfinished run how far it has come."""
        label = ", ".join(self.settings) or "equal settings"
        return label if self.is_finished else f"{label} ({self.runs[0].state})"

    @property
    def is_finished(self) -> bool:
        return self.runs[0].state == FINISHED

    def values(self, metric: str) -> list[float]:
        """Returns a metric of every run."""
        return [run.value(metric) for run in self.runs]


@dataclass(frozen=True)
class Comparison:
    """Compared runs.

    Attributes:
        rows: The best first, or in the given order if they are not ranked; runs that have not finished last.
        metric: What they are ranked by, a metric of the validation split.
        keys: The keys of the configuration in which they differ, the seed included.
        notes: Why their results may not be comparable, a line each.
        is_ranked: Whether the rows have places: the runs are of one data set.
    """

    rows: list[Row]
    metric: str
    keys: list[str]
    notes: list[str]
    is_ranked: bool

    @property
    def ranks(self) -> list[str]:
        """The place of each row from 1; empty for runs that have not finished, or are not ranked."""
        ranked = self.is_ranked
        return [str(place) if ranked and row.is_finished else "" for place, row in enumerate(self.rows, start=1)]

    @property
    def best(self) -> Run | None:
        """The best run of the first row, or None if the runs are not ranked or none has finished with a result."""
        if not self.is_ranked:
            return None
        finished = [run for row in self.rows[:1] for run in row.runs if row.is_finished]
        measured = [run for run in finished if not math.isnan(run.value(self.metric))]
        return min(measured, key=lambda run: _order(run.value(self.metric), self.metric), default=None)


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Finds run folders, each once, in the order of their names within a folder.

    Args:
        paths: Run folders, and folders that hold some one or two levels deeper, as a sweep's and `outputs` do.

    Raises:
        RequestError: A path is neither.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        runs = [path] if (path / "config.yaml").is_file() else sorted(_inside(path), key=_natural)
        if not runs:
            what = "holds no run: there is no config.yaml in it or up to two levels below"
            raise RequestError(f"{path} {what if path.is_dir() else 'is no folder'}")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _inside(path: Path) -> set[Path]:
    """Returns the run folders in a folder and in those of its folders that are no runs."""
    runs = {config.parent for config in path.glob("*/config.yaml")}
    return runs | {config.parent for config in path.glob("*/*/config.yaml") if config.parent.parent not in runs}


def compare(folders: Sequence[Path]) -> Comparison:
    """Compares runs.

    Args:
        folders: Their run folders.

    Raises:
        RequestError: The configuration or the result of a run cannot be read.
    """
    runs = [_read(folder) for folder in folders]
    keys = sorted(
        key for key in {key for run in runs for key in run.settings} if len({_text(run, key) for run in runs}) > 1
    )
    metrics = sorted({run.objective for run in runs})
    metric = metrics[0] if len(metrics) == 1 else "val/top1"
    names = {str(run.settings.get("data.name")) for run in runs}
    is_ranked = len(names) == 1 and not ("data.root" in keys and names & {*CHOSEN_BY_ROOT})
    notes = []
    if len(metrics) > 1:
        ranked = f": they are ranked by {metric}" if is_ranked else ""
        notes.append(f"the runs optimise different metrics ({', '.join(metrics)}){ranked}")
    if not is_ranked:
        notes.append("the runs are of different data sets: they are not ranked")
    elif others := [key for key in CHOOSE_IMAGES if key in keys]:
        notes.append(f"the runs differ in {', '.join(others)}: their results may be of different images")
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        settings = tuple(f"{key}={_text(run, key)}" for key in keys if key != "seed" and key in run.settings)
        unfinished = () if run.state == FINISHED else (run.folder,)
        groups.setdefault((settings, *unfinished), []).append(run)
    rows = [Row(settings, tuple(group)) for (settings, *_), group in groups.items()]
    if is_ranked:
        rows.sort(key=lambda row: _order(mean(row.values(metric)), metric))
    rows.sort(key=lambda row: not row.is_finished)
    return Comparison(rows, metric, keys, notes, is_ranked)


def _read(folder: Path) -> Run:
    config = load_run(folder)
    settings = {
        key: value
        for key, value in leaves(OmegaConf.to_container(config)).items()
        if not key.startswith(NO_SETTINGS) and (key, value) != ("model.kwargs", {})
    }
    metric = objective(config.trainer.best_metric, config.trainer.slot)
    if summary := load_summary(folder):
        results = {key: value for key, value in summary.items() if isinstance(value, int | float)}
        return Run(folder, metric, settings, results, FINISHED)
    epochs = _read_epochs(folder / "metrics.csv")
    best = min(epochs, key=lambda row: _order(row.get(metric, math.nan), metric), default={})
    state = f"{len(epochs)} of {config.trainer.max_epochs} epochs"
    if _is_newer(folder / "divergence.json", folder / "metrics.csv"):
        state = f"diverged in epoch {len(epochs) + 1}"
    elif folder.with_name(f"{folder.name}.failed").exists():
        state = f"failed after {state}"
    return Run(folder, metric, settings, {key: best[key] for key in best if key.startswith("val")}, state)


def _read_epochs(path: Path) -> list[dict[str, float]]:
    """Reads a `metrics.csv`; a run that has not ended its first epoch has none."""
    if not path.exists():
        return []
    try:
        with open(path, newline="") as file:
            return [{key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(f"{path} cannot be read: {first_line(error)}") from error


def _is_newer(path: Path, other: Path) -> bool:
    return path.exists() and not (other.exists() and other.stat().st_mtime > path.stat().st_mtime)


def _order(value: float, metric: str) -> tuple[bool, float]:
    """Returns a sort key that is lowest for the best value of a metric, and highest for NaN."""
    return math.isnan(value), 0.0 if math.isnan(value) else value if lower_is_better(metric) else -value


def _natural(path: Path) -> list[list[tuple[str, int]]]:
    """Returns a sort key that compares numbers in a trial's name by value: 8 before 16, lstm before lstm1997."""
    values = f"{path.parent.name},{path.name}".split(",")
    return [[(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", value)] for value in values]


def _text(run: Run, key: str) -> str:
    """Returns the value of a key as text, floats with four significant digits; nothing where a run lacks the key."""
    value = run.settings.get(key, "")
    return "null" if value is None else f"{value:.4g}" if isinstance(value, float) else printable(value)


def print_comparison(comparison: Comparison, test: bool = False, folders: bool = False) -> None:
    """Prints the table of compared runs, the notes, and the best run.

    Columns for which a terminal has no room are left out, the least important first. Settings for which the table has
    no room stand below it, one to a line.

    Args:
        test: Also show the results on the test split.
        folders: Also name the folder of each run.
    """
    columns = _columns(comparison, test)
    ranks, labels = columns.pop("rank"), columns.pop("run")
    lines = _fit(ranks, labels, columns)
    below = max(map(len, labels)) > LONGEST_LABEL or not _has_room(lines)
    if below:
        lines = _fit(ranks, [_folder_label(row) for row in comparison.rows], columns)
    for line in lines:
        say(line)
    for note in comparison.notes:
        say(f"note: {note}")
    if comparison.best:
        say(f"best by {comparison.metric}: {printable(comparison.best.folder)}")
    for rank, row in zip(ranks, comparison.rows, strict=True):
        for run in row.runs if folders or below else ():
            say(f"{rank:>4}  {printable(run.folder)}")
        for setting in row.settings if below else ():
            say(f"        {setting}")


def _folder_label(row: Row) -> str:
    """Names the folder of a row's first run, how many others it has, and how far an unfinished run has come."""
    others = f" and {len(row.runs) - 1} more" if len(row.runs) > 1 else ""
    return f"{printable(row.runs[0].folder)}{others}" + ("" if row.is_finished else f" ({row.runs[0].state})")


def _fit(ranks: list[str], labels: list[str], columns: dict[str, list[str]]) -> list[str]:
    """Lays the table out, without the columns for which a terminal has no room."""
    first = [f"{rank:>4}  {label}" for rank, label in zip(ranks, labels, strict=True)] if any(ranks) else labels
    left = {"rank  run" if any(ranks) else "run": first, **columns}
    for name in (None, "training, s", "parameters", "runs"):
        left.pop(name or "", None)
        lines = table_lines(list(left), zip(*left.values(), strict=True))
        if _has_room(lines):
            break
    return lines


def _has_room(lines: list[str]) -> bool:
    return not sys.stdout.isatty() or max(map(len, lines)) <= CONSOLE.width


def _columns(comparison: Comparison, test: bool) -> dict[str, list[str]]:
    """Returns the cells of each column of the table as text.

    Numbers that are equal in all rows have no column; that of runs is there where a row has several.
    """
    rows, metric = comparison.rows, comparison.metric
    metrics = dict.fromkeys([metric, f"{metric.split('/')[0]}/top1", *(["test/top1"] if test else [])])
    columns = {
        "rank": comparison.ranks,
        "run": [row.label for row in rows],
        **{name if lower_is_better(name) else f"{name}, %": [_mean(row, name) for row in rows] for name in metrics},
    }
    optional = {
        "parameters": [_number(row, "parameters") for row in rows],
        "training, s": [_number(row, "time/train_s") for row in rows],
    }
    speeds = {
        "MFLOP": [_number(row, "speed/operations", 1e-6) for row in rows],
        "training, images/s": [_number(row, "speed/training") for row in rows],
        "inference, images/s": [_number(row, "speed/inference") for row in rows],
        "one image, ms": [_number(row, "speed/latency", digits=2) for row in rows],
    }
    if any(len(row.runs) > 1 for row in rows):
        columns["runs"] = [str(len(row.runs)) for row in rows]
    columns |= {name: cells for name, cells in optional.items() if len({*cells} - {""}) > 1}
    return columns | {name: cells for name, cells in speeds.items() if any(cells)}


def _mean(row: Row, metric: str) -> str:
    """Returns mean and standard deviation over the runs of a row, and nothing where a run lacks the metric."""
    values = row.values(metric)
    if any(math.isnan(value) for value in values):
        return "" if any(metric not in run.results for run in row.runs) else "nan"
    return spread(values, 1, 4) if lower_is_better(metric) else spread(values)


def spread(values: Sequence[float], scale: float = 100, digits: int = 2) -> str:
    """Returns mean and standard deviation as text; of fractions in per cent."""
    deviation = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean(values):.{digits}f}{deviation}"


def _number(row: Row, result: str, scale: float = 1, digits: int = 0) -> str:
    value = scale * mean(row.values(result))
    return "" if math.isnan(value) or not row.is_finished else f"{value:,.{digits}f}"


def write_csv(comparison: Comparison, path: Path, test: bool = False) -> None:
    """Writes compared runs as a CSV file with one row for each run: rank, folder, state, settings and results.

    Args:
        path: The file; one that exists is replaced.
        test: Also write the results on the test split.

    Raises:
        WriteError: The file cannot be written.
    """
    wanted = ("train/", "val", "parameters", "speed/", "best_epoch", "time/train_s", *(["test"] if test else []))
    records = [
        {"rank": rank, "run": printable(run.folder), "state": run.state}
        | {key: printable(run.settings.get(key, "")) for key in comparison.keys}
        | {key: value for key, value in run.results.items() if key.startswith(wanted)}
        for rank, row in zip(comparison.ranks, comparison.rows, strict=True)
        for run in row.runs
    ]

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for record in records for key in record)))
            writer.writeheader()
            writer.writerows(records)

    write_atomically(path, write)


def write_sweep(folder: Path, title: str) -> list[Row]:
    """Writes the result table of a sweep as `sweep.csv`, `sweep.md` and `sweep.png`, and prints it.

    `sweep.csv` has one row for each trial; the other two show means and standard deviations over seeds. Results are
    those of the validation split.

    Args:
        folder: The sweep's folder, which contains one run folder for each trial.
        title: Title of the table and the plot.

    Returns:
        The rows of the table, the best first; none if no trial has finished.

    Raises:
        RequestError: The configuration or the result of a trial cannot be read.
    """
    if not any(folder.glob("*/summary.json")):
        return []
    found = compare(find_runs([folder]))
    metric = found.metric
    write_csv(found, folder / "sweep.csv")
    order = f"ranked by {metric}, the {'lowest' if lower_is_better(metric) else 'highest'} first"
    heading = f"{title}: {order if found.is_ranked else metric}"
    write_atomically(folder / "sweep.md", lambda path: path.write_text(_markdown(heading, _columns(found, test=False))))
    rows = [
        (row.label, row.settings[0] if row.settings else "", int(row.runs[0].results["parameters"]), row.values(metric))
        for row in found.rows
        if row.is_finished
    ]
    plot_sweep(rows, metric, title, folder / "sweep.png")
    say(f"\n{printable(heading)}")
    print_comparison(found)
    return found.rows


def _markdown(heading: str, columns: dict[str, list[str]]) -> str:
    lines = [f"{heading}; mean ± standard deviation over seeds", "", f"| {' | '.join(columns)} |"]
    lines.append("|" + "".join(" --- |" if name == "run" else " ---: |" for name in columns))
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in zip(*columns.values(), strict=True)]) + "\n"
