"""The probabilities of all images of a split, collected batch by batch over all ranks."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from sequencer import distributed

LARGEST = 2**27  # probabilities that are kept, half a GiB


@dataclass(frozen=True)
class Predictions:
    """What a model says of each image of a split, ordered by index."""

    indices: Int64[np.ndarray, " N"]  # of the images in the split
    labels: Int64[np.ndarray, " N"]
    probabilities: Float32[np.ndarray, "N K"]  # NaN throughout a row whose logits hold a NaN

    @cached_property
    def predicted(self) -> Int64[np.ndarray, " N"]:
        """The predicted classes; -1 where the logits hold a NaN."""
        return np.where(np.isnan(self.probabilities[:, 0]), -1, self.probabilities.argmax(axis=1))

    @cached_property
    def losses(self) -> Float32[np.ndarray, " N"]:
        """The cross-entropy of each image, in nats."""
        own = self.probabilities[np.arange(len(self.labels)), self.labels]
        return -np.log(np.maximum(own, np.finfo(np.float32).tiny))


class Collector:
    """Collects `Predictions`; of a split with too many of them, those of every nth image."""

    def __init__(self, images: int, num_classes: int) -> None:
        """Starts with no images, for a split of `images` images."""
        self._every = -(-images * num_classes // LARGEST) or 1
        self._num_classes = num_classes
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # indices, labels, probabilities

    def add(self, logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"], indices: Int[Tensor, " B"]) -> None:
        """Adds a batch."""
        indices = indices.cpu()
        kept = indices % self._every == 0
        probabilities = logits.double().softmax(dim=1).float().cpu()[kept]
        self._parts.append((indices[kept].numpy(), labels.cpu()[kept].numpy(), probabilities.numpy()))

    def predictions(self) -> Predictions:
        """The predictions of all ranks, on every rank; in a distributed job every rank must call it."""
        parts = [part for of_rank in distributed.gather(self._parts) for part in of_rank]
        self._parts = []
        indices = np.concatenate([part[0] for part in parts] or [np.empty(0, np.int64)])
        labels = np.concatenate([part[1] for part in parts] or [np.empty(0, np.int64)])
        probabilities = np.empty((len(indices), self._num_classes), np.float32)
        order = indices.argsort()
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        start = 0
        for number, (_, _, rows) in enumerate(parts):
            probabilities[place[start : start + len(rows)]] = rows
            start += len(rows)
            parts[number] = (indices, labels, rows[:0])  # frees the memory of the rows
        return Predictions(indices[order], labels[order], probabilities)
