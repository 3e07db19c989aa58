"""Statistics of predictions: results of classes with intervals, calibration, label errors, and paired comparisons.

All intervals are at 95%. Shape letters: `N` images, `K` classes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, norm, rankdata
from torchmetrics.functional.classification import binary_calibration_error

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

BOOTSTRAP_SAMPLES = 2000
CALIBRATION_BINS = 15  # as in Guo et al. 2017
FITTED_VALUES = 2**23  # probabilities that a temperature is fitted to, those of every nth image


class Interval(NamedTuple):
    """An estimate with its 95% confidence interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


UNDEFINED = Interval(math.nan, math.nan, math.nan)


class ClassStatistics(NamedTuple):
    """Results of one class against all others."""

    support: int  # images of this class
    precision: Interval  # Wilson's score
    recall: Interval  # Wilson's score
    f1: Interval  # percentile bootstrap over images
    auc: Interval  # area under the ROC curve; DeLong's variance


class Calibration(NamedTuple):
    """Confidence against accuracy in bins of equal width, and the temperature that fits these images best."""

    counts: Integers  # images in each bin
    confidence: Floats  # mean probability of the predicted class in each bin; NaN in an empty one
    accuracy: Floats  # top-1 of the images in each bin; NaN in an empty one
    error: float  # expected calibration error
    temperature: float  # logits divided by it have the least cross-entropy on the same images
    error_at_temperature: float


class PairedComparison(NamedTuple):
    """Two classifiers on the same images."""

    both_right: int
    only_first: int
    only_second: int
    both_wrong: int
    difference: Interval  # top-1 of the first minus that of the second; percentile bootstrap over images
    p_value: float  # McNemar's exact test, two-sided


def wilson(hits: int, total: int) -> Interval:
    """Computes a fraction with its interval by Wilson's score (1927)."""
    if not total:
        return UNDEFINED
    interval = binomtest(hits, total).proportion_ci(method="wilson")
    return Interval(hits / total, float(interval.low), float(interval.high))


def class_statistics(
    labels: Integers, predicted: Integers, probabilities: Floats, seed: int = 0
) -> list[ClassStatistics]:
    """Computes the results of each class.

    Args:
        labels: `N`.
        predicted: `N`; -1 for an image without a prediction, whose row of `probabilities` is NaN.
        probabilities: `N K`.
        seed: Seed of the bootstrap.
    """
    generator = np.random.default_rng(seed)
    results = []
    for k in range(probabilities.shape[1]):
        own, called = labels == k, predicted == k
        hits, support, calls = int((own & called).sum()), int(own.sum()), int(called.sum())
        f1 = _f1(hits, calls - hits, support - hits, len(labels), generator)
        auc = area_under_roc(probabilities[:, k], own)
        results.append(ClassStatistics(support, wilson(hits, calls), wilson(hits, support), f1, auc))
    return results


def _f1(hits: int, false_calls: int, missed: int, total: int, generator: np.random.Generator) -> Interval:
    """Computes F1 with its bootstrap interval; resampling images is a multinomial draw of the four counts.

    It is not defined for a class that is never predicted, as precision is not. Without a hit every resample has an F1
    of 0, so that the interval is not defined.
    """
    if not hits + false_calls:
        return UNDEFINED
    if not hits:
        return Interval(0.0, math.nan, math.nan)
    counts = np.array([hits, false_calls, missed, total - hits - false_calls - missed])
    draws = generator.multinomial(total, counts / total, BOOTSTRAP_SAMPLES)
    denominators = 2 * draws[:, 0] + draws[:, 1] + draws[:, 2]
    values = 2 * draws[:, 0] / np.maximum(denominators, 1)
    return Interval(2 * hits / (2 * hits + false_calls + missed), *_percentiles(values[denominators > 0]))


def _percentiles(values: Floats) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def area_under_roc(scores: Floats, positive: NDArray[np.bool_]) -> Interval:
    """Computes the area under the ROC curve, with the interval of DeLong et al. (1988) on the logit scale.

    Args:
        scores: `N`, larger for images that are taken to be positive; images with NaN are left out.
        positive: `N`.
    """
    finite = ~np.isnan(scores)
    x, y = scores[finite & positive], scores[finite & ~positive]
    if not len(x) or not len(y):
        return UNDEFINED
    ranks = rankdata(np.concatenate([x, y]))
    above = (ranks[: len(x)] - rankdata(x)) / len(y)  # for each positive, the share of negatives below it
    below = 1 - (ranks[len(x) :] - rankdata(y)) / len(x)
    area = float(above.mean())
    if min(len(x), len(y)) < 2 or area in (0.0, 1.0):
        return Interval(area, math.nan, math.nan)
    deviation = math.sqrt(above.var(ddof=1) / len(x) + below.var(ddof=1) / len(y))
    logit, width = math.log(area / (1 - area)), norm.ppf(0.975) * deviation / (area * (1 - area))
    return Interval(area, _sigmoid(logit - width), _sigmoid(logit + width))


def _sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-np.clip(x, -700, 700))))


def confused_pairs(confusion: Integers) -> list[tuple[int, int, int]]:
    """Lists `(true class, predicted class, images)` of all confusions, the most frequent first."""
    rows, columns = np.nonzero(confusion)
    pairs = [(int(i), int(j), int(confusion[i, j])) for i, j in zip(rows, columns, strict=True) if i != j]
    return sorted(pairs, key=lambda pair: (-pair[2], pair))


def calibration(labels: Integers, probabilities: Floats) -> Calibration:
    """Compares confidence with accuracy, and fits a temperature (Guo et al. 2017, arXiv 1706.04599).

    Args:
        labels: `N`, at least one.
        probabilities: `N K`, finite.
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    # bins are open on the left, as in torchmetrics' error
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    with np.errstate(invalid="ignore"):
        mean, accuracy = (
            np.bincount(bins, values.astype(float), CALIBRATION_BINS) / counts for values in (confidence, right)
        )
    every = -(-probabilities.size // FITTED_VALUES)
    temperature = _fit_temperature(_logits(probabilities[::every]), labels[::every])
    rows = max(1, FITTED_VALUES // probabilities.shape[1])  # in memory at a time
    starts = range(0, len(labels), rows)
    scaled = [_largest_share(_logits(probabilities[start : start + rows]) / temperature) for start in starts]
    errors = (_calibration_error(values, right) for values in (confidence, np.concatenate(scaled)))
    return Calibration(counts, mean, accuracy, next(errors), temperature, next(errors))


def _logits(probabilities: Floats) -> Floats:
    return np.log(np.maximum(probabilities.astype(float), np.finfo(float).tiny))


def _largest_share(logits: Floats) -> Floats:
    """Computes the probability of the predicted class from logits `N K`."""
    return 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)


def _calibration_error(confidence: Floats, right: NDArray[np.bool_]) -> float:
    found = binary_calibration_error(
        torch.from_numpy(confidence), torch.from_numpy(right.astype(int)), CALIBRATION_BINS
    )
    return float(found)


def _fit_temperature(logits: Floats, labels: Integers) -> float:
    """Fits the temperature between 1/20 and 20 at which the mean cross-entropy is least."""

    def loss(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        shift = scaled.max(axis=1)
        own = scaled[np.arange(len(labels)), labels]
        return float((shift + np.log(np.exp(scaled - shift[:, None]).sum(axis=1)) - own).mean())

    found = minimize_scalar(loss, bounds=(-math.log(20), math.log(20)), method="bounded")
    return math.exp(float(found.x))


def label_errors(labels: Integers, probabilities: Floats, mirrored: Mapping[int, Floats]) -> list[int]:
    """Finds images whose label is probably wrong: the model is confident in another class, mirrored as well.

    Confident is a probability of at least the mean that the images labelled as that class have (confident learning,
    Northcutt et al. 2021, arXiv 1911.00068) and above 0.5, in both orientations.

    Args:
        labels: `N`.
        probabilities: `N K`.
        mirrored: The `K` probabilities of the mirror images of candidates, by index of the image.

    Returns:
        Indices of the images, the most confident first.
    """
    K = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    finite = np.isfinite(own)
    support = np.bincount(labels[finite], minlength=K)
    means = np.bincount(labels[finite], own[finite].astype(float), K) / np.maximum(support, 1)
    found = {}
    for index, other in mirrored.items():
        predicted = int(probabilities[index].argmax())
        confidence = float(min(probabilities[index, predicted], other[predicted]))
        is_consistent = predicted != labels[index] and int(other.argmax()) == predicted
        if is_consistent and support[predicted] and confidence >= means[predicted] and confidence > 0.5:
            found[index] = confidence
    return sorted(found, key=lambda index: -found[index])


def compare_paired(first: NDArray[np.bool_], second: NDArray[np.bool_], seed: int = 0) -> PairedComparison:
    """Compares two classifiers by which of the same images each classifies correctly.

    Args:
        first: `N`, whether the first classifier is right.
        second: `N`, whether the second classifier is right.
        seed: Seed of the bootstrap.
    """
    cells = (first & second, first & ~second, ~first & second, ~first & ~second)
    a, b, c, d = (int(cell.sum()) for cell in cells)
    return compare_counts(a, b, c, d, seed)


def compare_counts(
    both_right: int, only_first: int, only_second: int, both_wrong: int, seed: int = 0
) -> PairedComparison:
    """Compares two classifiers by the numbers of images that both, one, or none of them classify correctly.

    The arguments are the fields of `PairedComparison`; `seed` is that of the bootstrap.
    """
    counts = (both_right, only_first, only_second, both_wrong)
    total, discordant = sum(counts), only_first + only_second
    if not total:
        return PairedComparison(0, 0, 0, 0, UNDEFINED, math.nan)
    draws = np.random.default_rng(seed).multinomial(total, np.array(counts) / total, BOOTSTRAP_SAMPLES)
    low, high = _percentiles((draws[:, 1] - draws[:, 2]) / total)
    p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return PairedComparison(*counts, Interval((only_first - only_second) / total, low, high), p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values for several tests by Holm's step-down method (1979)."""
    order = np.argsort(p_values)
    steps = np.array(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return [float(value) for value in adjusted]
