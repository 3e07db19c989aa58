"""The result of a model on a split, which the page and the model card show: key figures, confusions and calibration."""

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sequencer.analysis.plots import MOST_NUMBERED_CLASSES
from sequencer.analysis.statistics import Calibration, calibration, wilson
from sequencer.evaluation import Predictions
from sequencer.models import KeyFigures


class Results(NamedTuple):
    """The predictions of a model for a split, and what is computed from them."""

    predictions: Predictions
    confusion: NDArray[np.int64]  # images by true class and predicted class
    calibration: Calibration | None  # None if no image has a finite prediction
    figures: KeyFigures


def examine(
    model: nn.Module, split: Literal["val", "test"], predictions: Predictions, input_size: tuple[int, int, int]
) -> Results:
    """Computes the results of a model.

    Args:
        model: In eval mode.
        split: The split of the predictions.
        predictions: Of the model.
        input_size: Channels, height and width of an image.
    """
    labels, predicted, probabilities = predictions.labels, predictions.predicted, predictions.probabilities
    confusion = confusion_matrix(predictions)
    valid = predicted >= 0
    calibrated = calibration(labels[valid], probabilities[valid]) if valid.any() else None
    top1 = wilson(int((predicted == labels).sum()), len(labels))
    figures = KeyFigures(
        split=split,
        images=len(labels),
        top1=top1.value if len(labels) else None,
        top1_interval=(top1.low, top1.high) if len(labels) else None,
        loss=_finite(predictions.losses.astype(float).mean()) if len(labels) else None,
        calibration_error=calibrated.error if calibrated else None,
        operations=count_operations(model, input_size),
        confusion=confusion.tolist() if len(confusion) <= MOST_NUMBERED_CLASSES else None,
    )
    return Results(predictions, confusion, calibrated, figures)


def confusion_matrix(predictions: Predictions) -> NDArray[np.int64]:
    """Counts images by true class (row) and predicted class (column); images without a prediction are left out."""
    num_classes = predictions.probabilities.shape[1]
    counts = np.zeros((num_classes, num_classes), np.int64)
    valid = predictions.predicted >= 0
    np.add.at(counts, (predictions.labels[valid], predictions.predicted[valid]), 1)
    return counts


@torch.inference_mode()
def count_operations(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Counts the floating-point operations of a forward pass with one image `C H W`."""
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *input_size, device=device))
    return int(counter.get_total_flops())


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
