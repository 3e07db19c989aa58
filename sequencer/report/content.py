"""What the page of a run shows, computed from the run's files, its model and the predictions of the model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sequencer.analysis.attribution import check_decomposable, contributions, evidence_maps, sum_by_source
from sequencer.analysis.attribution_plots import signed
from sequencer.analysis.statistics import confused_pairs, label_errors
from sequencer.config.schema import DataConfig
from sequencer.data import Split, channel_statistics
from sequencer.evaluation import Predictions
from sequencer.report.pictures import read_again, signed_map, thumbnail

MOST_CELLS = 50  # classes up to which the whole confusion matrix is shown
MOST_PAIRS = 20
IMAGES_OF_A_CELL = 12
IMAGES_OF_CELLS = 900  # of all cells together
MISTAKES, MISTAKES_OF_A_CLASS = 24, 4
PLOTTED_MISTAKES = 12  # in mistakes.png
LABEL_ERRORS, LABEL_ERROR_CANDIDATES = 12, 200
SMALL = 64  # pixels up to which images are enlarged without smoothing


@dataclass
class Selection:
    """The images that the page shows, as positions in the predictions."""

    cells: dict[tuple[int, int], list[int]]  # by true and predicted class
    mistakes: list[int]  # the largest losses first
    top: set[int]  # of these, those shown without a filter by class
    suspects: list[int]  # confident mistakes, which may be errors of the label

    @property
    def positions(self) -> list[int]:
        found = {position for cell in self.cells.values() for position in cell}
        return sorted(found | set(self.mistakes) | set(self.suspects))


@dataclass
class Evidence:
    """Why a mistake was made: the logit of the predicted class minus that of the true one."""

    map: NDArray[np.float64]  # `H W`
    sources: dict[str, float]  # what the directions and the other parts contribute


@dataclass
class Pictures:
    """What is kept of the selected images."""

    uris: dict[int, str] = field(default_factory=dict)
    pixels: dict[int, NDArray[np.uint8]] = field(default_factory=dict)  # `H W 3`, of the first mistakes
    evidence: dict[int, Evidence] = field(default_factory=dict)
    mirrored: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # probabilities of suspects' mirror images


def select(predictions: Predictions, confusion: NDArray[np.int64]) -> Selection:
    """Chooses the images of the page: of each cell the most confident ones, and the mistakes with the largest loss."""
    labels, predicted, losses = predictions.labels, predictions.predicted, predictions.losses
    confidence = np.nan_to_num(predictions.probabilities.max(axis=1))
    if len(confusion) <= MOST_CELLS:
        shown = [(int(i), int(j)) for i, j in zip(*np.nonzero(confusion), strict=True)]
    else:
        shown = [pair[:2] for pair in confused_pairs(confusion)[:MOST_PAIRS]]
    of_each = min(IMAGES_OF_A_CELL, max(1, IMAGES_OF_CELLS // max(len(shown), 1)))
    order = np.argsort(-confidence, kind="stable")
    cells: dict[tuple[int, int], list[int]] = {cell: [] for cell in shown}
    for position in order.tolist():
        cell = cells.get((int(labels[position]), int(predicted[position])))
        if cell is not None and len(cell) < of_each:
            cell.append(position)
    wrong = np.flatnonzero((predicted != labels) & (predicted >= 0))
    wrong = wrong[np.argsort(-losses[wrong], kind="stable")]
    top = set(wrong[:MISTAKES].tolist())
    taken: dict[int, int] = {}
    mistakes = []
    for position in wrong.tolist():
        label = int(labels[position])
        taken[label] = taken.get(label, 0) + 1
        if position in top or (len(confusion) <= MOST_CELLS and taken[label] <= MISTAKES_OF_A_CLASS):
            mistakes.append(position)
    sure = wrong[np.argsort(-confidence[wrong], kind="stable")][:LABEL_ERROR_CANDIDATES]
    return Selection(cells, mistakes, top, sure.tolist())


@torch.no_grad()
def draw(
    selection: Selection,
    predictions: Predictions,
    split: Split,
    data: DataConfig,
    model: nn.Module,
    device: torch.device,
) -> Pictures:
    """Reads the selected images once more and draws what the page shows of them.

    Args:
        selection: The images.
        predictions: Of the whole split.
        split: The split.
        data: Its settings.
        model: In eval mode, on `device`.
        device: Where the model is.
    """
    position_of = {int(predictions.indices[position]): position for position in selection.positions}
    mistakes, suspects = set(selection.mistakes), set(selection.suspects)
    explained = is_decomposable(model)
    plotted = set(selection.mistakes[:PLOTTED_MISTAKES])
    found = Pictures()
    for images, wanted in read_again(split, data, position_of):
        places = [(row, position_of[index]) for row, index in wanted]
        pixels = to_pixels(images[[row for row, _ in places]], data)
        for (_, position), pixel in zip(places, pixels, strict=True):
            found.uris[position] = thumbnail(pixel)
            if position in plotted:
                found.pixels[position] = pixel
        if rows := [(row, position) for row, position in places if position in mistakes and explained]:
            found.evidence |= _explain(model, images, rows, predictions, device)
        if rows := [(row, position) for row, position in places if position in suspects]:
            mirrored = model(images[[row for row, _ in rows]].flip(-1).to(device)).double().softmax(dim=1).float()
            found.mirrored |= dict(zip((position for _, position in rows), mirrored.cpu().numpy(), strict=True))
    return found


def is_decomposable(model: nn.Module) -> bool:
    """Whether evidence and directions are defined for a model."""
    try:
        check_decomposable(model)
    except ValueError:
        return False
    return True


def _explain(
    model: nn.Module, images: Tensor, rows: list[tuple[int, int]], predictions: Predictions, device: torch.device
) -> dict[int, Evidence]:
    chosen = images[[row for row, _ in rows]].to(device)
    maps, parts = evidence_maps(model, chosen), contributions(model, chosen)
    found = {}
    for number, (_, position) in enumerate(rows):
        pair = int(predictions.predicted[position]), int(predictions.labels[position])
        margin, values = (
            a[number, ..., pair[0]] - a[number, ..., pair[1]] for a in (maps.movedim(1, -1), parts.values)
        )
        sources = sum_by_source(parts.parts, values.tolist())
        found[position] = Evidence(margin.double().cpu().numpy(), sources)
    return found


def to_pixels(images: Tensor, data: DataConfig) -> NDArray[np.uint8]:
    """Converts normalised images `B C H W` to pixels `B H W 3` as a person sees them."""
    mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in channel_statistics(data))
    pixels = (images.float() * std + mean).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return pixels.repeat(3, axis=-1) if pixels.shape[-1] == 1 else pixels


class Cards:
    """The images of the page as its template and script take them; each picture is stored once."""

    def __init__(
        self, predictions: Predictions, pictures: Pictures, ids: Sequence[str], names: Sequence[str], img_size: int
    ) -> None:
        self._predictions, self._pictures, self._ids, self._names = predictions, pictures, ids, names
        self._small = img_size <= SMALL
        self._number: dict[int, int] = {}
        self.images: list[dict[str, Any]] = []

    def number(self, position: int) -> int | None:
        """The number in `images` of an image, which is added there; None if it could not be read."""
        if position not in self._pictures.uris:
            return None
        if position not in self._number:
            self._number[position] = len(self.images)
            self.images.append(self.card(position))
        return self._number[position]

    def card(self, position: int) -> dict[str, Any]:
        found = self._predictions
        predicted, label = int(found.predicted[position]), int(found.labels[position])
        probability = percent(found.probabilities[position, predicted])
        text = f"{self._names[predicted]} {probability}"
        if predicted != label:
            text += f", labelled {self._names[label]}"
        identity = self._ids[int(found.indices[position])]
        return {"uri": self._pictures.uris[position], "id": identity, "text": text, "small": self._small}


def matrix_of(
    confusion: NDArray[np.int64], selection: Selection, cards: Cards, names: Sequence[str]
) -> tuple[list[list[dict[str, Any]]], dict[str, list[int]]]:
    """The cells of the matrix for the template, and the images of each cell that opens some."""
    keys = {}
    for (i, j), positions in selection.cells.items():
        numbers = [number for position in positions if (number := cards.number(position)) is not None]
        if numbers:
            keys[f"{i}-{j}"] = numbers
    if len(confusion) > MOST_CELLS:
        return [], keys
    support = np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    rows = [
        [
            {
                "count": int(count),
                "share": round(math.sqrt(count / support[i, 0]), 3),
                "key": key if (key := f"{i}-{j}") in keys else None,
                "label": cell_label(names[i], names[j], int(count), len(keys.get(key, ()))),
            }
            for j, count in enumerate(row)
        ]
        for i, row in enumerate(confusion)
    ]
    return rows, keys


def cell_label(true: str, predicted: str, count: int, shown: int) -> str:
    """Says what a cell holds and how many of its images it opens."""
    images = "1 image" if count == 1 else f"{count:,} images"
    return f"{true} predicted as {predicted}: {images}" + (f", {shown} of them shown" if 0 < shown < count else "")


def mistake_cards(
    selection: Selection, predictions: Predictions, pictures: Pictures, cards: Cards, names: Sequence[str]
) -> list[dict[str, Any]]:
    """The mistakes for the template, those with the largest loss first; their bars have one scale."""
    found = []
    largest = max((abs(value) for e in pictures.evidence.values() for value in e.sources.values()), default=0) or 1
    for position in selection.mistakes:
        if cards.number(position) is None:
            continue
        predicted, label = int(predictions.predicted[position]), int(predictions.labels[position])
        evidence = pictures.evidence.get(position)
        found.append(
            {
                "image": cards.card(position),
                "top": position in selection.top,
                "label_index": label,
                "label": names[label],
                "predicted": names[predicted],
                "probability": percent(predictions.probabilities[position, predicted]),
                "label_probability": percent(predictions.probabilities[position, label]),
                "map": signed_map(evidence.map) if evidence else None,
                "together": signed(sum(evidence.sources.values())) if evidence else "",
                "bars": _bars(evidence.sources, largest) if evidence else [],
            }
        )
    return found


def _bars(sources: dict[str, float], largest: float) -> list[tuple[str, float, str, bool]]:
    """Name, width in percent of the largest, text and sign of each source."""
    return [
        (source, round(100 * abs(value) / largest, 1), signed(value), value < 0) for source, value in sources.items()
    ]


def label_error_cards(
    selection: Selection, predictions: Predictions, pictures: Pictures, cards: Cards, names: Sequence[str]
) -> list[dict[str, Any]]:
    """The images whose label is probably wrong, for the template."""
    suspects = label_errors(predictions.labels, predictions.probabilities, pictures.mirrored)
    found = []
    for position in suspects[:LABEL_ERRORS]:
        predicted = int(predictions.predicted[position])
        found.append(
            {
                "image": cards.card(position),
                "label": names[int(predictions.labels[position])],
                "predicted": names[predicted],
                "probability": percent(predictions.probabilities[position, predicted]),
            }
        )
    return found


def percent(value: float | np.floating[Any]) -> str:
    return f"{100 * float(value):.1f}%"
