"""Models compared in pairs on the same images of a split."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sequencer.analysis.statistics import Interval, PairedComparison, compare_paired, holm, wilson
from sequencer.config import DataConfig, RequestError
from sequencer.config.layouts import check_data
from sequencer.console import say, table_lines
from sequencer.data import Split, eval_transform, open_split
from sequencer.evaluation import Outcome, check_classes, evaluate
from sequencer.files import write_csv
from sequencer.models import LoadedModel
from sequencer.printing import printable

SPLITS = {"val": "Validation split", "test": "Test split"}


class Pair(NamedTuple):
    """Two of the compared models, as positions in their order."""

    first: int
    second: int
    result: PairedComparison
    adjusted: float  # p-value adjusted for the number of pairs by Holm's method


@dataclass(frozen=True)
class PairedEvaluation:
    """The results of several models on the same images."""

    sources: list[str]  # what the models were loaded from
    data: DataConfig  # of the first model
    split_name: Literal["val", "test"]
    split: Split  # with the transform of the first model
    outcomes: list[list[Outcome]]  # `M N`; of the images that could be read for every model, ordered by index

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """Whether each model classifies each image correctly, `M N`."""
        return np.array([[outcome.rank == 1 for outcome in found] for found in self.outcomes], dtype=bool)

    @property
    def accuracies(self) -> list[Interval]:
        """Top-1 of each model with its interval by Wilson's score."""
        return [wilson(int(row.sum()), len(row)) for row in self.right]

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every pair of models, in their order."""
        right = self.right
        found = [(i, j, compare_paired(right[i], right[j])) for i, j in combinations(range(len(right)), 2)]
        adjusted = holm([result.p_value for *_, result in found])
        return [Pair(*pair, p_value) for pair, p_value in zip(found, adjusted, strict=True)]

    @property
    def title(self) -> str:
        """The split, the data set and the number of images."""
        return f"{SPLITS[self.split_name]} of {self.data.name}, {len(self.outcomes[0]):,} images"


def letter(position: int) -> str:
    """The short name of a compared model: A to Z, then A1 to Z1 and so on."""
    turn, place = divmod(position, 26)
    return f"{chr(ord('A') + place)}{turn or ''}"


def evaluate_paired(
    sources: Sequence[str],
    models: Iterable[LoadedModel],
    data: Sequence[DataConfig],
    split: Literal["val", "test"],
    device: torch.device | str = "cpu",
) -> PairedEvaluation:
    """Evaluates models on the same images.

    Args:
        sources: What the models were loaded from.
        models: The models; each is moved to `device` to be evaluated, and back to the CPU.
        data: The data section of each, as `evaluation_data` returns it.
        split: `val` or `test`.
        device: Where the models run.

    Raises:
        RequestError: The models have different classes, or their data are different images; nothing was evaluated.
    """
    models = list(models)
    splits: list[Split] = []
    for section in data:
        check_data(section, [split], root="--data-root DIR")
        splits.append(open_split(section, split, eval_transform(section)))
    for position in range(len(models)):
        _check_same(sources, models, data, splits, position)
    found = []
    for model, images, section in zip(models, splits, data, strict=True):
        outcomes: list[Outcome] = []
        evaluate(model.model.to(device), images.evaluation_loader(section), len(images.class_names), device, outcomes)
        model.model.cpu()
        found.append({outcome.image: outcome for outcome in outcomes})
    shared = sorted(set.intersection(*(set(outcomes) for outcomes in found)))
    kept = [[outcomes[image] for image in shared] for outcomes in found]
    return PairedEvaluation(list(sources), data[0], split, splits[0], kept)


def _check_same(
    sources: Sequence[str],
    models: Sequence[LoadedModel],
    data: Sequence[DataConfig],
    splits: Sequence[Split],
    position: int,
) -> None:
    """Checks a model against its split and against the first model.

    Raises:
        RequestError: They differ in their classes or images.
    """
    first, source = printable(sources[0]), printable(sources[position])
    try:
        check_classes(models[position], splits[position].class_names)
    except RequestError as error:
        raise RequestError(f"{source}: {error}") from error
    a, b = (list(models[place].class_names or splits[place].class_names) for place in (0, position))
    if len(a) != len(b):
        raise RequestError(f"{first} has {len(a)} classes, {source} {len(b)}")
    if a != b:
        names = next(pair for pair in zip(a, b, strict=True) if pair[0] != pair[1])
        raise RequestError(f"{first} and {source} have different classes, e.g. {' and '.join(map(printable, names))}")
    if splits[0].fingerprint != splits[position].fingerprint:
        images = " and ".join(f"{splits[place].fingerprint} of {data[place].name}" for place in (0, position))
        raise RequestError(f"{first} and {source} would be evaluated on different images: {images}")


def print_paired(found: PairedEvaluation) -> None:
    """Prints the accuracy of each model, and the comparison of each pair."""
    say(f"{found.title}:")
    rows = [
        [f"{letter(position)}  {printable(source)}", f"{top1.value:.2%}", f"{top1.low:.2%} to {top1.high:.2%}"]
        for position, (source, top1) in enumerate(zip(found.sources, found.accuracies, strict=True))
    ]
    for line in table_lines(["model", "top-1", "95%"], rows):
        say(line)
    say("")
    pairs = found.pairs
    header = ["pair", "right, wrong", "wrong, right", "difference", "95%", "p"]
    header += ["p, Holm"] if len(pairs) > 1 else []
    for line in table_lines(header, [_cells(pair)[: len(header)] for pair in pairs]):
        say(line)
    say("difference: top-1 of the first minus that of the second, in percentage points, with a bootstrap interval")
    say("p: McNemar's exact test" + ("; p, Holm: adjusted for the number of pairs" if len(pairs) > 1 else ""))


def _cells(pair: Pair) -> list[str]:
    result = pair.result
    low, high = points(result.difference.low), points(result.difference.high)
    return [
        f"{letter(pair.first)}, {letter(pair.second)}",
        f"{result.only_first:,}",
        f"{result.only_second:,}",
        points(result.difference.value),
        f"{low} to {high}",
        f"{result.p_value:.3g}",
        f"{pair.adjusted:.3g}",
    ]


def points(share: float) -> str:
    """Formats a difference of two shares as percentage points, with its sign."""
    return "-" if math.isnan(share) else f"{100 * share:+.2f}"


def write_pairs(found: PairedEvaluation, path: Path) -> None:
    """Writes a CSV file with a row for each pair: accuracies, the four counts, the difference and the p-values.

    Raises:
        WriteError: The file cannot be written.
    """
    values = [f"{name}{end}" for name in ("first_top1", "second_top1", "difference") for end in ("", "_low", "_high")]
    header = ["first", "second", "split", "images", *PairedComparison._fields[:4], *values, "p_value", "p_value_holm"]
    names, top1 = [printable(source) for source in found.sources], found.accuracies
    rows = []
    for first, second, result, adjusted in found.pairs:
        counts, numbers = result[:4], (*top1[first], *top1[second], *result.difference, result.p_value, adjusted)
        rows.append((names[first], names[second], found.split_name, sum(counts), *counts, *numbers))
    write_csv(path, header, rows)
