"""Accuracy and speed of classifiers across input sizes without retraining, and the states of their recurrences.

An image of another size has more or fewer tokens, so that recurrences scan longer or shorter sequences than in
training. Beside the accuracy this module measures what that does to a recurrence: the size of its state after the last
step, and the share of its gates that are saturated.

Shape letters: `B` batch, `C` channels, `H W` pixel rows and columns, `N` sequences, `T` steps, `D` hidden size.
"""

import math
import time
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from sequencer.analysis.changes import Change, ChangeCounts
from sequencer.analysis.memory import SATURATED, chosen_sequences, has_recurrences, recorded, scan_inputs
from sequencer.analysis.statistics import Interval, wilson
from sequencer.evaluation import is_right
from sequencer.layers import RNN1d, RNN2d
from sequencer.ops import trace

FACTORS = (0.5, 0.75, 1.25, 1.5, 2.0)  # default sizes besides the model's own, over it
STATE_IMAGES = 8  # the first images, on which the states are measured

Batches = Iterable[tuple[Tensor, Tensor, Tensor]]


class StageStates(NamedTuple):
    """The states of the recurrences of a stage: means over blocks, directions, sequences and images."""

    stage: str  # name of the module
    steps: int  # of a scan
    state_rms: float  # root mean square over units of the state after the last step
    saturated: float  # share of gates below or above `sequencer.analysis.memory.SATURATED`; NaN without gates


class AtSize(NamedTuple):
    """The results of a model at one size."""

    indices: NDArray[np.int64]  # of the images that could be read, ascending
    right: NDArray[np.bool_]  # whether each of them is classified correctly
    images_per_s: float  # of forward passes
    states: list[StageStates]  # in the order of the model; empty without recurrences of this package


class Resolution(NamedTuple):
    """The results of a model at several sizes, on the same images."""

    own_size: int  # height and width that the model was trained with, in pixels
    images: int
    top1: dict[int, Interval]  # by size, ascending; the own size included
    changes: dict[int, Change]  # against the own size, at each other size
    images_per_s: dict[int, float]
    states: dict[int, list[StageStates]]


def default_sizes(model: nn.Module, own_size: int) -> list[int]:
    """Returns the own size of a model, and `FACTORS` times that, rounded to a multiple of its total stride.

    The total stride, in pixels, is the largest `reduction` of timm's `feature_info`, the size of a patch in a ViT.

    Args:
        model: A model of this package or of timm; without `feature_info` any size is taken to be right.
        own_size: Height and width that the model was trained with, in pixels.
    """
    info: Any = getattr(model, "feature_info", [])
    stride = max((int(entry.get("reduction", 1)) for entry in info), default=1)
    others = (max(1, math.floor(own_size * factor / stride + 0.5)) * stride for factor in FACTORS)
    return sorted({own_size, *others})


def measure_size(model: nn.Module, batches: Batches) -> AtSize:
    """Measures the predictions, the speed and the states of a model on images of one size.

    Of each image some bytes are kept. The speed is that of forward passes alone: the median over batches of the largest
    size that occurs, after the first one has been classified once more beforehand.

    Args:
        model: A classifier in eval mode; any module that returns logits `B K`.
        batches: Normalised images `B C H W` and labels `B`, on the device of the model, and indices `B` of the images;
            at least one batch.
    """
    indices, right = [], []
    timed: list[tuple[int, float]] = []
    first: list[Tensor] = []
    with torch.inference_mode():
        for images, labels, numbers in batches:
            if not timed:
                model(images)
            _synchronise(images)
            start = time.perf_counter()
            logits = model(images)
            _synchronise(images)
            timed.append((len(images), time.perf_counter() - start))
            right.append(is_right(logits, labels).cpu())
            indices.append(numbers.cpu())
            if (missing := STATE_IMAGES - sum(map(len, first))) > 0:
                first.append(images[:missing].clone())
    largest = max(number for number, _ in timed)
    rate = largest / float(np.median([seconds for number, seconds in timed if number == largest]))
    found = torch.cat(indices).long().numpy()
    order = found.argsort()
    return AtSize(found[order], torch.cat(right).numpy()[order], rate, measure_states(model, torch.cat(first)))


def _synchronise(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def measure_states(model: nn.Module, images: Float[Tensor, "B C H W"]) -> list[StageStates]:
    """Measures the states of the recurrences of a model, in float64, by stage and number of steps.

    At most `sequencer.analysis.memory.MOST_SEQUENCES` rows or columns of each image are scanned. The state is the cell
    state of an LSTM, and the hidden state of a GRU or a plain RNN.

    Args:
        model: Any module in eval mode; one without recurrences of this package has no entries.
        images: Normalised images on the device of the model.
    """
    if not has_recurrences(model):
        return []
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}

    def record(name: str, mixer: RNN1d | RNN2d, tokens: Tensor) -> None:
        for _, rnn, x, w in scan_inputs(mixer, tokens):
            traced = trace(chosen_sequences(x), w, rnn.cell)
            rms = float(traced.state[:, -1].square().mean(dim=-1).sqrt().mean())
            shares = [
                float(((gate < SATURATED[0]) | (gate > SATURATED[1])).double().mean()) for gate in traced.gates.values()
            ]
            stage = name.split(".blocks.")[0]
            of_stage = found.setdefault((stage, traced.state.shape[1]), [])
            of_stage.append((rms, float(np.mean(shares)) if shares else math.nan))

    with torch.inference_mode(), recorded(model, record):
        model(images)
    return [StageStates(*place, *map(float, np.mean(values, axis=0))) for place, values in found.items()]


def compare_sizes(own_size: int, found: Mapping[int, AtSize]) -> Resolution:
    """Compares the accuracy at each size with that at the own size, on the images that could be read at all sizes.

    Args:
        own_size: A key of `found`.
        found: The results of a model by size.
    """
    shared = reduce(np.intersect1d, [each.indices for each in found.values()])
    sizes = sorted(found)
    right = torch.from_numpy(np.stack([found[size].right[np.isin(found[size].indices, shared)] for size in sizes]))
    others = torch.tensor([size != own_size for size in sizes])
    counts = ChangeCounts(int(others.sum()))
    counts.add(right[~others][0], right[others])
    return Resolution(
        own_size,
        len(shared),
        {size: wilson(int(row.sum()), len(shared)) for size, row in zip(sizes, right, strict=True)},
        dict(zip((size for size in sizes if size != own_size), counts.changes(), strict=True)),
        {size: found[size].images_per_s for size in sizes},
        {size: found[size].states for size in sizes},
    )
