"""Accuracies, cross-entropy and the confusion matrix, computed from sums; `K` is the number of classes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sequencer import distributed
from sequencer.printing import printable

UNBALANCED = 2  # images of the largest class for each image of the smallest one, from which classes are unbalanced
TOP5_CLASSES = 6  # of fewer classes, the top 5 are all or nearly all


def metric_names(num_classes: int) -> list[str]:
    """Names of the metrics besides `total`; `top5` is left out below six classes, where it says next to nothing."""
    return ["loss", "top1", *(["top5"] if num_classes >= TOP5_CLASSES else []), "balanced"]


class ClassResult(NamedTuple):
    """Precision and recall of one class; each is None if its denominator is zero."""

    name: str
    support: int  # images of this class
    precision: float | None  # fraction of the images predicted as this class that belong to it
    recall: float | None  # fraction of the images of this class that are predicted as it


class Outcome(NamedTuple):
    """Label and prediction of one image; the prediction is None if a logit is NaN."""

    image: int  # its index in the split
    label: int
    predicted: int | None
    probability: float | None  # of the predicted class
    rank: int | None  # of the label among the classes, ordered by their logits: 1 if the label is the predicted class


class ClassificationMetrics:
    """Metrics of a classifier over batches of any size and over any number of ranks.

    It holds sums, and ranks are merged by adding them, so that every image has the same weight.

    The predicted class is the one with the largest logit; among equal logits the lowest index comes first. The top 5
    follow the same order. An image with a NaN logit has no predicted class: it counts as wrong in top-1 and top-5, is
    in no column of the confusion matrix, and makes the loss NaN.
    """

    counts: Int[Tensor, "K K+1"]
    top5_hits: Int[Tensor, ""]
    loss_sum: Float[Tensor, ""]

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        """Starts with no images; logits and labels must be on `device`."""
        self.num_classes = num_classes
        self.reset(device)

    def reset(self, device: torch.device | str = "cpu") -> None:
        """Starts again with no images, on `device`."""
        # rows are true classes, columns predicted ones; the last column counts images without a prediction
        self.counts = torch.zeros(self.num_classes, self.num_classes + 1, dtype=torch.int64, device=device)
        self.top5_hits = torch.zeros((), dtype=torch.int64, device=device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"]) -> None:
        """Adds a batch.

        Raises:
            ValueError: The logits do not have `num_classes` columns.
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits have shape {tuple(logits.shape)}; expected (B, {self.num_classes})")
        valid = ~logits.isnan().any(dim=1)
        predicted = logits.argmax(dim=1).where(valid, self.num_classes)
        self.counts = self.counts.index_put((labels, predicted), self.counts.new_ones(()), accumulate=True)
        self.top5_hits = self.top5_hits + ((_rank(logits, labels) < 5) & valid).sum()
        self.loss_sum = self.loss_sum + F.cross_entropy(logits.double(), labels, reduction="sum")

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics of `metric_names` as scalars in float64, and `total` (images) in int64.

        `top1`, `top5` and `balanced` are fractions, `loss` is a mean in nats. `balanced` is the balanced accuracy, the
        mean recall of the classes that have images. Without images all but `total` are NaN.
        """
        total, support = self.counts.sum(), self.counts.sum(dim=1)
        recalls = self.confusion.diagonal().double() / support
        values = {
            "loss": self.loss_sum / total,
            "top1": self.confusion.trace().double() / total,
            "top5": self.top5_hits.double() / total,
            "balanced": recalls.nanmean(),
        }
        return {name: values[name] for name in metric_names(self.num_classes)} | {"total": total}

    def merge_processes(self) -> None:
        """Adds up the sums of all ranks, on every rank; call it once, after the last `update`."""
        if distributed.world_size() > 1:
            for total in (self.counts, self.top5_hits, self.loss_sum):
                dist.all_reduce(total)

    @property
    def confusion(self) -> Int[Tensor, "K K"]:
        """Number of images by true class (row) and predicted class (column), of this rank until ranks are merged."""
        return self.counts[:, : self.num_classes]

    @property
    def unbalanced(self) -> bool:
        """Whether the largest class has at least twice as many images as the smallest one that has any."""
        support = self.counts.sum(dim=1)
        support = support[support > 0]
        return len(support) > 1 and bool(support.max() >= UNBALANCED * support.min())

    def per_class(self, class_names: Sequence[str]) -> list[ClassResult]:
        """Precision and recall of every class, in the order of the logits, of this rank until ranks are merged."""
        hits = self.confusion.diagonal().tolist()
        support = self.counts.sum(dim=1).tolist()
        called = self.confusion.sum(dim=0).tolist()
        return [
            ClassResult(name, s, h / c if c else None, h / s if s else None)
            for name, h, s, c in zip(class_names, hits, support, called, strict=True)
        ]


def describe_unpredicted(classes: Sequence[ClassResult], most: int = 5) -> str:
    """Names up to `most` of the classes that have images and are predicted for none; empty if there are none."""
    names = [printable(row.name) for row in classes if row.support and row.precision is None]
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"never predicted: {', '.join(names[:most])}{rest}" if names else ""


def outcomes(logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"], indices: Int[Tensor, " B"]) -> list[Outcome]:
    """Outcome of every image of a batch, by the rules of `ClassificationMetrics`."""
    probabilities = logits.double().softmax(dim=1).amax(dim=1)
    columns = (logits.argmax(dim=1), probabilities, _rank(logits, labels) + 1)
    rows = zip(*(column.tolist() for column in (indices, labels, ~logits.isnan().any(dim=1), *columns)), strict=True)
    return [Outcome(i, label, *(answer if valid else (None,) * 3)) for i, label, valid, *answer in rows]


def is_right(logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """Whether the predicted class of each image is its label, by the rules of `ClassificationMetrics`."""
    return (_rank(logits, labels) == 0) & ~logits.isnan().any(dim=1)


def _rank(logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Number of classes ordered before the label: those with a larger logit, or an equal one and a lower index.

    The same on every device, unlike `topk`, which does not define the order of equal values.
    """
    own = logits.gather(1, labels[:, None])
    index = torch.arange(logits.shape[1], device=logits.device)
    return ((logits > own) | ((logits == own) & (index < labels[:, None]))).sum(dim=1)
