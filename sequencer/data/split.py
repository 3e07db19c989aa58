"""The interface of a split of a data set, which image files, sets in memory and shards implement."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch.utils.data import DataLoader

from sequencer.config.schema import DataConfig
from sequencer.data.images import UnreadableImage
from sequencer.data.quarantine import Quarantine
from sequencer.data.seeding import START, EpochSampler, Position

SplitName = Literal["train", "val", "test"]
Transform = Callable[[Any], Any]
CPU = torch.device("cpu")
CHECKED_AT_ONCE = 64  # images, when every image of a split is decoded


class Split(ABC):
    """Labelled images of one split of a data set, and the loaders that serve them.

    Attributes:
        class_names: name of every class; labels are indices into it.
        location: folder, file or address that the split was opened from.
        transform: applied to every image; the identity until it is set.
        quarantine: records images that cannot be read; None until it is set.
        shorter_side: length in pixels that the shorter side of an image may be resized to, which bounds the memory
            that an image may take; 0 until it is set.
    """

    quarantine: Quarantine | None = None
    shorter_side: int = 0

    def __init__(self, class_names: Sequence[str], location: str) -> None:
        self.class_names = list(class_names)
        self.location = location
        self.transform: Transform = unchanged

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, whether or not they can be read."""

    @property
    @abstractmethod
    def ids(self) -> list[str]:
        """A unique name of every image: the path of its file, or its index in the set."""

    @property
    @abstractmethod
    def labels(self) -> Int64[np.ndarray, " N"] | None:
        """Labels of all images in order; None where they are not known before the images are read."""

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the split by its number of images, and the names and labels of the images in order.

        It is the same wherever the data set is stored. Image files are not read: altered pixels keep the fingerprint.
        """
        labels = b"" if self.labels is None else self.labels.tobytes()
        return make_fingerprint(len(self), "\0".join(self.ids).encode(errors="surrogateescape"), labels)

    @abstractmethod
    def sampler(
        self, config: DataConfig, seed: int, rank: int = 0, world_size: int = 1, position: Position = START
    ) -> EpochSampler:
        """The order of the training images on one rank; a resumed run starts at `position`."""

    @abstractmethod
    def training_loader(
        self,
        config: DataConfig,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        position: Position = START,
        device: torch.device = CPU,
    ) -> DataLoader[Any]:
        """Batches `(images, labels)` in the order of `sampler`, which is the loader's sampler too.

        Args:
            device: device that trains; sets in memory are kept there if it has room.
        """

    @abstractmethod
    def evaluation_loader(
        self, config: DataConfig, rank: int = 0, world_size: int = 1, device: torch.device = CPU
    ) -> DataLoader[Any]:
        """Batches `(images, labels, indices)` of every readable image once, over all ranks.

        The images are not padded to equal numbers per rank, and no image is served to two ranks.
        """

    @abstractmethod
    def readable_counts(self, num_workers: int) -> Iterable[int]:
        """Decodes every image and yields, for one batch after another, how many could be read.

        Raises:
            TooManyBadImages: more images are unreadable than the quarantine allows.
        """

    @abstractmethod
    def probe(self, most: int) -> tuple[int, list[str]]:
        """Decodes up to `most` images, spread over the split, where this is cheap.

        Returns:
            The number of images decoded (0 where all are decoded already or reading a few is costly), and the paths
            of those that cannot be read.

        Raises:
            TooManyBadImages: more images are unreadable than the quarantine allows.
        """

    @abstractmethod
    def examples(self, number: int) -> list[tuple[Any, int]]:
        """Up to `number` readable items `(transform(image), label)`."""

    def subset(self, indices: np.ndarray) -> "Split":
        """The images at `indices` as a split, which shares their storage.

        Raises:
            NotImplementedError: the images cannot be read one by one.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be divided: give the data set a validation split")

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Reports an `UnreadableImage` that is raised inside to the quarantine."""
        try:
            yield
        except UnreadableImage as found:
            if self.quarantine is not None:
                self.quarantine.report(found)
            raise


def unchanged(image: Any) -> Any:
    """The identity."""
    return image


def stratified_split(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Holds out the same `fraction` of every class; returns the indices (kept, held out), both sorted.

    The result is a function of the arguments alone: NumPy promises never to change the stream of `RandomState`, while
    scikit-learn's `train_test_split` may split otherwise in another version.
    """
    random_state = np.random.RandomState(0)
    held = []
    for label in np.unique(labels):
        members = random_state.permutation(np.flatnonzero(labels == label))
        held.append(members[: round(fraction * len(members))])
    held_indices = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), held_indices), held_indices


def make_fingerprint(number: int, *contents: bytes) -> str:
    """Returns the number of images with a hash of what identifies them, e.g. `24 images 0a1b2c3d4e5f`."""
    total = hashlib.sha256()
    for content in contents:
        total.update(hashlib.sha256(content).digest())
    return f"{number} images {total.hexdigest()[:12]}"


def limit_workers(wanted: int) -> int:
    """Limits the loader workers of a rank to its share of the processors that this process may use, one at least."""
    from joblib import cpu_count  # the import takes a moment; respects affinity and the quota of a container

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(wanted, max(1, cpu_count() // ranks)) if wanted else 0


def make_loader(
    dataset: Any,
    batch_size: int,
    sampler: Iterable[Any],
    num_workers: int,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    pin_memory: bool = True,
) -> DataLoader[Any]:
    """A DataLoader whose workers persist and which leaves the global random state as it was."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory and torch.cuda.is_available(),
        collate_fn=collate_fn,
        # by default every new iterator draws the seed of its workers from the global random state
        generator=torch.Generator(),
    )
