"""Top-1, top-5, cross-entropy and the confusion matrix from exact, summable counts; `K` is the number of classes."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from sequencer import distributed

NORMAL_QUANTILE = 1.959963984540054  # at 97.5%


class ClassResult(NamedTuple):
    """How one class fares; a ratio is None where its denominator is zero."""

    name: str
    support: int  # images of this class
    precision: float | None  # share of the images called so that are of this class
    recall: float | None  # share of the images of this class that are called so


class Outcome(NamedTuple):
    """How one image fares; None where its logits are not numbers."""

    image: int  # its index in the set
    label: int
    predicted: int | None
    probability: float | None  # of the predicted class
    rank: int | None  # of the label: 1 where it is the predicted class


class ClassificationMetrics(Metric):
    """Metrics of a classifier over any number of batches, however uneven, and of processes.

    Every state is a sum, and processes are merged by summing, so that each image weighs the same.

    An image's predicted class is that of its largest logit, the lower index among equals; the label is in the top 5
    by the same order. An image with a NaN logit has no predicted class: it is a miss in everything, stands in no
    column of the confusion matrix, and makes the loss NaN.
    """

    full_state_update = False
    is_differentiable = False

    counts: Int[Tensor, "K K+1"]
    top5_hits: Int[Tensor, ""]
    loss_sum: Float[Tensor, ""]

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        """`kwargs` are torchmetrics': how processes are synchronised."""
        super().__init__(**kwargs)
        self.num_classes = num_classes
        # rows are true classes, columns predicted ones; the last column counts images without a prediction
        counts = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)
        self.add_state("counts", counts, dist_reduce_fx="sum")
        self.add_state("top5_hits", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"]) -> None:
        """Adds a batch.

        Raises:
            ValueError: the logits are of another number of classes.
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits have shape {tuple(logits.shape)}; expected (B, {self.num_classes})")
        valid = ~logits.isnan().any(dim=1)
        predicted = logits.argmax(dim=1).where(valid, self.num_classes)
        self.counts = self.counts.index_put((labels, predicted), self.counts.new_ones(()), accumulate=True)
        self.top5_hits = self.top5_hits + ((_rank(logits, labels) < 5) & valid).sum()
        self.loss_sum = self.loss_sum + F.cross_entropy(logits.double(), labels, reduction="sum")

    def compute(self) -> dict[str, Tensor]:
        """`top1`, `top5` (fractions) and `loss` (mean, nats) as float64, `total` (images) as int64; all scalars.

        The fractions of no images are NaN.
        """
        total = self.counts.sum()
        return {
            "top1": self.confusion.trace().double() / total,
            "top5": self.top5_hits.double() / total,
            "loss": self.loss_sum / total,
            "total": total,
        }

    def merge_processes(self) -> None:
        """Adds up all processes' images for good, where torchmetrics' own `sync` ends with the next `compute`."""
        if distributed.world_size() > 1:
            for state in (self.counts, self.top5_hits, self.loss_sum):
                dist.all_reduce(state)

    @property
    def confusion(self) -> Int[Tensor, "K K"]:
        """Images by true class (row) and predicted class (column), those of this process until they are merged."""
        return self.counts[:, : self.num_classes]

    def per_class(self, class_names: Sequence[str]) -> list[ClassResult]:
        """One result a class, in the order of the logits, over the images of this process."""
        hits = self.confusion.diagonal().tolist()
        support = self.counts.sum(dim=1).tolist()
        called = self.confusion.sum(dim=0).tolist()
        return [
            ClassResult(name, s, h / c if c else None, h / s if s else None)
            for name, h, s, c in zip(class_names, hits, support, called, strict=True)
        ]


def outcomes(logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"], indices: Int[Tensor, " B"]) -> list[Outcome]:
    """Each image's, by the rules of `ClassificationMetrics`."""
    probabilities = logits.double().softmax(dim=1).amax(dim=1)
    columns = (logits.argmax(dim=1), probabilities, _rank(logits, labels) + 1)
    rows = zip(*(column.tolist() for column in (indices, labels, ~logits.isnan().any(dim=1), *columns)), strict=True)
    return [Outcome(i, label, *(said if valid else (None,) * 3)) for i, label, valid, *said in rows]


def wilson_interval(share: float, total: int) -> tuple[float, float]:
    """The 95% confidence interval of a share of `total` images by Wilson's score (1927); NaN of none."""
    if not total:
        return math.nan, math.nan
    z2 = NORMAL_QUANTILE**2 / total
    centre = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
    return centre - half, centre + half


def _rank(logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """How many classes come before the label: larger logits, and equal ones of a lower index.

    Unlike `topk`, which leaves open what comes first among equals, this gives the same on every device.
    """
    own = logits.gather(1, labels[:, None])
    index = torch.arange(logits.shape[1], device=logits.device)
    return ((logits > own) | ((logits == own) & (index < labels[:, None]))).sum(dim=1)
