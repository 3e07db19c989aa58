"""Order and augmentation of the training images as functions of (seed, epoch, index).

Nothing here depends on how many workers load, on what was loaded before, or on the global random states, which
stay as they were: an epoch can be replayed from its number alone.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from sequencer.data.images import UnreadableImage

Key = tuple[int, int]  # epoch, index


class EpochSampler(Sampler[Key]):
    """One process's share of an epoch, in an order drawn from (seed, epoch), as keys (epoch, index).

    The order is cut into batches of `batch_size` images and each batch into as many parts as there are processes, so
    that a batch holds the same images however many share it. An incomplete last batch is left out unless it is the
    only one. The epoch travels with the index because persistent workers keep the copy of the data set that they
    started with.

    Args:
        length: images in the set.
        batch_size: images of a batch, over all processes, of which it is a multiple.
        rank, world_size: this process, and how many there are.
        epoch: the first epoch that will be asked for.
        batches_done: batches that are left out at the start of that epoch, having been trained on before.
        reshuffles: batches of that epoch after which the rest was drawn anew, once for each entry.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        batches_done: int = 0,
        reshuffles: Sequence[int] = (),
    ) -> None:
        self.batch_size = min(batch_size, length)
        self.batches = length // self.batch_size
        self.length, self.seed = length, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first_epoch = epoch
        self.batches_done, self.reshuffles = batches_done, tuple(reshuffles)

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Of a whole epoch."""
        return self.batches * len(range(self.rank, self.batch_size, self.world_size))

    def __iter__(self) -> Iterator[Key]:
        epoch = self.epoch
        first = self.batches_done if epoch == self.first_epoch else 0
        own = self.batches_of(epoch)[first:, self.rank :: self.world_size]
        return ((epoch, index) for index in own.flatten().tolist())

    def batches_of(self, epoch: int) -> Int[Tensor, "batches batch_size"]:
        """Indices of an epoch's images, over all processes."""
        order = self._draw(f"{self.seed} {epoch}", self.length)
        for number, batches in enumerate(self.reshuffles if epoch == self.first_epoch else ()):
            done, rest = order[: batches * self.batch_size], order[batches * self.batch_size :]
            order = torch.cat([done, rest[self._draw(f"{self.seed} {epoch} {number}", len(rest))]])
        return order[: self.batches * self.batch_size].view(self.batches, self.batch_size)

    @staticmethod
    def _draw(seed: str, length: int) -> Int[Tensor, " length"]:
        generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
        return torch.randperm(length, generator=generator)


def own_random_states() -> AbstractContextManager[None]:
    """Puts the caller's random states back at its end."""
    # CUDA's states are not touched: asking for them in a forked worker would start CUDA there
    return isolate_rng(include_cuda=False)


def seed_transforms(seed: int, epoch: int, index: int) -> None:
    """timm's transforms draw from all three generators."""
    # a string is hashed (SHA-512), so that neighbouring seeds, epochs and indices have nothing in common
    random.seed(f"{seed} {epoch} {index}")
    np.random.seed(random.getrandbits(32))
    torch.default_generator.manual_seed(random.getrandbits(63))  # torch.manual_seed would reseed CUDA too


class SeededSet(Dataset[Any]):
    """A data set served by keys (epoch, index), whose random transforms are seeded from (seed, epoch, index).

    Fetched a batch at a time: putting the caller's random states back takes some 0.1 ms, seeding an item a tenth.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[Key]) -> list[Any]:
        with own_random_states():
            return [self._item(epoch, index) for epoch, index in keys]

    def _item(self, epoch: int, index: int) -> Any:
        seed_transforms(self.seed, epoch, index)
        while True:
            try:
                return self.dataset[index]
            except UnreadableImage:  # another one in its place, so that batches keep their size
                index = random.randrange(len(self.dataset))
