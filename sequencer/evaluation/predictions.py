"""The probabilities of all images of a split, collected batch by batch over all ranks."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from sequencer import distributed

LARGEST = 2**27  # probabilities that are kept, half a GiB


class Predictions(NamedTuple):
    """What a model says of each image of a split, ordered by index."""

    indices: Int64[np.ndarray, " N"]  # of the images in the split
    labels: Int64[np.ndarray, " N"]
    probabilities: Float32[np.ndarray, "N K"]  # NaN throughout a row whose logits hold a NaN

    @property
    def predicted(self) -> Int64[np.ndarray, " N"]:
        """The predicted classes; -1 where the logits hold a NaN."""
        return np.where(np.isnan(self.probabilities[:, 0]), -1, self.probabilities.argmax(axis=1))

    @property
    def losses(self) -> Float32[np.ndarray, " N"]:
        """The cross-entropy of each image, in nats."""
        own = self.probabilities[np.arange(len(self.labels)), self.labels]
        return -np.log(np.maximum(own, np.finfo(np.float32).tiny))


class Collector:
    """Collects `Predictions`; of a split with too many of them, those of every nth image."""

    def __init__(self, images: int, num_classes: int) -> None:
        """Starts with no images, for a split of `images` images."""
        self._every = -(-images * num_classes // LARGEST) or 1
        self._parts: list[Predictions] = []

    def add(self, logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"], indices: Int[Tensor, " B"]) -> None:
        """Adds a batch."""
        kept = indices.cpu() % self._every == 0
        probabilities = logits.double().softmax(dim=1).float().cpu()[kept]
        self._parts.append(Predictions(indices.cpu()[kept].numpy(), labels.cpu()[kept].numpy(), probabilities.numpy()))

    def predictions(self) -> Predictions:
        """The predictions of all ranks, on every rank; in a distributed job every rank must call it."""
        parts = [part for of_rank in distributed.gather(self._parts) for part in of_rank]
        if not parts:
            return Predictions(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 1), np.float32))
        joined = Predictions(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        order = joined.indices.argsort()
        return Predictions(*(column[order] for column in joined))
