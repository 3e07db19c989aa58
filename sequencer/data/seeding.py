"""Order and augmentation of the training images as functions of (seed, epoch, index).

Nothing here depends on the number of workers, on what was loaded before, or on the global random states, which are
left as they were: an epoch can be repeated from its number alone.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from sequencer.data.images import UnreadableImage

Key = tuple[int, int]  # epoch, index


class Position(TypedDict):
    """How far a run has got in its training data."""

    epoch: int
    batches: int  # of that epoch that have been trained on
    reshuffles: list[int]  # numbers of its batches after which the rest of the epoch was reordered


START = Position(epoch=0, batches=0, reshuffles=[])


class EpochSampler(Sampler[Key]):
    """The keys (epoch, index) of one rank's training images, in an order drawn from (seed, epoch).

    The order is divided into batches of `batch_size` images and each batch among the ranks, so that a batch holds the
    same images for any number of ranks. An incomplete last batch is dropped unless it is the only one. A key carries
    its epoch because persistent workers keep the copy of the data set that they were started with.

    Args:
        length: images in the split.
        batch_size: images per batch over all ranks; a multiple of `world_size`.
        epoch: first epoch that will be served.
        batches: batches to skip at the start of that epoch.
        reshuffles: numbers of batches of that epoch after which the rest was reordered, one entry per time.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        epoch: int = 0,
        batches: int = 0,
        reshuffles: Sequence[int] = (),
    ) -> None:
        self.length, self.seed = length, seed
        self.batch_size = min(batch_size, length)
        self.batches_per_epoch = length // self.batch_size
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first_epoch = epoch
        self.batches_done, self.reshuffles = batches, tuple(reshuffles)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration serves; Lightning's Trainer calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of keys of a whole epoch, also where the first epoch is served from its middle."""
        return self.batches_per_epoch * len(range(self.rank, self.batch_size, self.world_size))

    def __iter__(self) -> Iterator[Key]:
        epoch = self.epoch
        own = self._batches(epoch)[self._skipped(epoch) :, self.rank :: self.world_size]
        return ((epoch, index) for index in own.flatten().tolist())

    def images_of(self, epoch: int, batch: int) -> list[int]:
        """Indices of the images of a batch, over all ranks."""
        return self._batches(epoch)[batch].tolist()

    def _skipped(self, epoch: int) -> int:
        """Number of batches that are left out at the start of an epoch."""
        return self.batches_done if epoch == self.first_epoch else 0

    def _batches(self, epoch: int) -> Int[Tensor, "batches batch_size"]:
        """Indices of the images of every batch of an epoch, over all ranks."""
        order = _permutation(self.length, f"{self.seed} {epoch}")
        for number, batches in enumerate(self.reshuffles if epoch == self.first_epoch else ()):
            done, rest = order[: batches * self.batch_size], order[batches * self.batch_size :]
            order = torch.cat([done, rest[_permutation(len(rest), f"{self.seed} {epoch} {number}")]])
        return order[: self.batches_per_epoch * self.batch_size].view(self.batches_per_epoch, self.batch_size)


def seeded_generator(seed: str) -> torch.Generator:
    """A CPU generator seeded from a hash (SHA-512) of `seed`, so that similar seeds give unrelated streams."""
    return torch.Generator().manual_seed(random.Random(seed).getrandbits(63))


def _permutation(length: int, seed: str) -> Int[Tensor, " length"]:
    return torch.randperm(length, generator=seeded_generator(seed))


def own_random_states() -> AbstractContextManager[None]:
    """A context that restores the global random states of Python, NumPy and torch's CPU generator when it ends."""
    # CUDA's states are not touched: reading them in a forked worker would initialise CUDA there
    from pytorch_lightning.utilities.seed import isolate_rng  # Lightning takes seconds to import

    return isolate_rng(include_cuda=False)


def seed_transforms(seed: int, epoch: int, index: int) -> None:
    """Seeds the three global generators, from all of which timm's transforms draw."""
    random.seed(f"{seed} {epoch} {index}")  # a string is hashed (SHA-512)
    np.random.seed(random.getrandbits(32))
    torch.default_generator.manual_seed(random.getrandbits(63))  # torch.manual_seed would reseed CUDA too


def as_key(key: Key | int) -> Key:
    """The key itself, or the key (0, index) of an index.

    With `overfit_batches` Lightning replaces the sampler by a sequential one, which serves plain indices.
    """
    return (0, key) if isinstance(key, int) else key


MOST_UNREADABLE = 1000  # images drawn in place of one another


class SeededSet(Dataset[Any]):
    """Items of a split by keys (epoch, index), whose random transforms are seeded from (seed, epoch, index).

    An image that cannot be read is replaced by another one, drawn from the same seed, so that batches keep their size;
    a RuntimeError is raised if a thousand in a row cannot be read.
    Items are fetched in batches: restoring the random states takes some 0.1 ms, seeding an item a tenth of that.
    """

    def __init__(self, items: Any, seed: int) -> None:
        """`items` is a map-style data set."""
        self.items = items
        self.seed = seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, keys: Sequence[Key | int]) -> list[Any]:
        with own_random_states():
            return [self._item(*as_key(key)) for key in keys]

    def _item(self, epoch: int, index: int) -> Any:
        seed_transforms(self.seed, epoch, index)
        for _ in range(MOST_UNREADABLE):
            try:
                return self.items[index]
            except UnreadableImage:
                index = random.randrange(len(self.items))
        raise RuntimeError(f"none of {MOST_UNREADABLE} training images drawn one after another can be read")
