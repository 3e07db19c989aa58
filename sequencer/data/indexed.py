"""Splits whose images can be read one by one and in any order."""

import copy
import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from sequencer.config.schema import DataConfig
from sequencer.data.images import UnreadableImage
from sequencer.data.seeding import START, EpochSampler, Position, SeededSet
from sequencer.data.split import CHECKED_AT_ONCE, CPU, Split, limit_workers, make_loader, unchanged


class IndexedSplit(Split):
    """A split with random access; a subclass defines `load`.

    Item `i` is `(transform(image), label)`.

    Args:
        labels: indices into `class_names`, one per image.

    Raises:
        ValueError: a label is no index into `class_names`.
    """

    def __init__(self, labels: Sequence[int] | np.ndarray, class_names: Sequence[str], location: str) -> None:
        super().__init__(class_names, location)
        self._stored_labels = np.asarray(labels, dtype=np.int64)
        if len(labels) and not 0 <= self._stored_labels.min() <= self._stored_labels.max() < len(class_names):
            lowest, highest = self._stored_labels.min(), self._stored_labels.max()
            raise ValueError(f"its labels go from {lowest} to {highest}, and it has {len(class_names)} classes")
        self.indices = np.arange(len(labels))  # of the stored images that belong to this split

    @abstractmethod
    def load(self, index: int) -> Any:
        """The stored image `index`: a PIL image, or a float tensor `C H W` in [0, 1].

        Raises:
            UnreadableImage: the image cannot be read.
        """

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The transformed image and its label.

        Raises:
            UnreadableImage: the image cannot be read; the quarantine has recorded it.
        """
        image, label = self.decode(index)
        return self.transform(image), label

    def decode(self, index: int) -> tuple[Any, int]:
        """The image before its transform, and its label.

        Raises:
            UnreadableImage: the image cannot be read; the quarantine has recorded it.
        """
        stored = int(self.indices[index])
        with self._reporting():
            return self.load(stored), int(self._stored_labels[stored])

    @property
    def labels(self) -> Int64[np.ndarray, " N"]:
        return self._stored_labels[self.indices]

    @property
    def ids(self) -> list[str]:
        return [str(index) for index in self.indices]

    def subset(self, indices: np.ndarray) -> "IndexedSplit":
        result = copy.copy(self)
        result.__dict__.pop("fingerprint", None)  # is cached, and of the images of this split
        result.indices = self.indices[indices]
        return result

    def sampler(
        self, config: DataConfig, seed: int, rank: int = 0, world_size: int = 1, position: Position = START
    ) -> EpochSampler:
        return EpochSampler(len(self), config.batch_size, seed, rank, world_size, **position)

    def training_loader(
        self,
        config: DataConfig,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        position: Position = START,
        device: torch.device = CPU,
    ) -> DataLoader[Any]:
        sampler = self.sampler(config, seed, rank, world_size, position)
        return make_loader(
            SeededSet(self, seed), config.batch_size // world_size, sampler, limit_workers(config.num_workers)
        )

    def evaluation_loader(
        self, config: DataConfig, rank: int = 0, world_size: int = 1, device: torch.device = CPU
    ) -> DataLoader[Any]:
        own = range(rank, len(self), world_size)
        return make_loader(
            ReadableSet(self), config.eval_batch_size, own, limit_workers(config.num_workers), collate_readable
        )

    def readable_counts(self, num_workers: int) -> Iterable[int]:
        plain = copy.copy(self)
        plain.transform = unchanged
        return make_loader(ReadableSet(plain), CHECKED_AT_ONCE, range(len(self)), limit_workers(num_workers), len)

    def probe(self, most: int) -> tuple[int, list[str]]:
        indices = range(0, len(self), math.ceil(len(self) / most))
        bad = []
        for index in indices:
            try:
                self.decode(index)
            except UnreadableImage as error:
                bad.append(error.path)
        return len(indices), bad

    def examples(self, number: int) -> list[tuple[Any, int]]:
        """Up to `number` readable items, spread over the split; reads up to four times as many images."""
        order = np.linspace(0, len(self) - 1, min(len(self), 4 * number)).astype(int).tolist()
        found = [(image, label) for image, label, _ in ReadableSet(self).__getitems__(order)]
        return found[:: max(1, len(found) // number)][:number]


class ReadableSet(Dataset[Any]):
    """Items `(image, label, index)` of a split without those that cannot be read; use with `collate_readable`."""

    def __init__(self, split: IndexedSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        items = []
        for index in indices:
            try:
                items.append((*self.item(index), index))
            except UnreadableImage:
                continue
        return items

    def item(self, index: int) -> tuple[Any, int]:
        """The image `index` as it is loaded, and its label."""
        return self.split[index]


def collate_readable(items: list[Any]) -> list[Tensor]:
    """Images `B C H W`, labels `B` and indices `B`; tensors without elements where `items` is empty."""
    none = torch.empty(0, dtype=torch.int64)
    return default_collate(items) if items else [torch.empty(0), none, none]
