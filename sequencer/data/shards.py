"""Splits in shards, which are streamed from start to end.

`data.root` is a folder or an address that holds `train.json`, `val.json` and optionally `test.json`, as
`scripts/shards.py` writes them: WebDataset's index of shards with their numbers of samples, and the names of the
classes. A sample is an image file and a `.cls` file with its label.
"""

import copy
import io
import posixpath
import random
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from sequencer.config.errors import RequestError
from sequencer.config.schema import DataConfig
from sequencer.data.images import UnreadableImage, read_image
from sequencer.data.indexed import collate_readable
from sequencer.data.seeding import START, EpochSampler, Key, Position, as_key, own_random_states, seed_transforms
from sequencer.data.shard_files import Sample, ShardReader, read_index, resolve
from sequencer.data.shard_order import ShardOrder
from sequencer.data.split import (
    CHECKED_AT_ONCE,
    CPU,
    Split,
    SplitName,
    limit_workers,
    make_fingerprint,
    make_loader,
    unchanged,
)


class ShardSplit(Split):
    """A split in shards, whose samples are numbered across all shards.

    Raises:
        OSError: there is no index.
        UndeclaredContent: the index is damaged.
        RequestError: the index names no classes, or an address that is not allowed.
    """

    def __init__(self, config: DataConfig, split: SplitName) -> None:
        location = resolve(config.root, f"{split}.json")
        index = read_index(location)
        super().__init__([str(name) for name in index.classes or range(config.num_classes or 0)], location)
        if not self.class_names:
            raise RequestError(f"data={config.name}: {split}.json names no classes: set data.num_classes")
        self.urls = [resolve(config.root, shard.url) for shard in index.shardlist]
        self.starts = np.cumsum([0, *(shard.nsamples for shard in index.shardlist)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def ids(self) -> list[str]:
        counts = np.diff(self.starts)
        return [f"{url}#{index}" for url, count in zip(self.urls, counts, strict=True) for index in range(count)]

    @property
    def labels(self) -> None:
        return None

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the split by the shards of its index: their file names and numbers of samples, in order."""
        names = "\0".join(posixpath.basename(urlparse(url).path) for url in self.urls)
        return make_fingerprint(len(self), names.encode(errors="surrogateescape"), self.starts.tobytes())

    def reader(self) -> ShardReader:
        return ShardReader(self.urls, self.starts)

    def decode(self, sample: Sample | UnreadableImage) -> tuple[Any, int]:
        """The transformed image of a sample, and its label.

        Raises:
            UnreadableImage: the image cannot be read; the quarantine has recorded it.
        """
        with self._reporting():
            if isinstance(sample, UnreadableImage):
                raise sample
            if not 0 <= sample.label < len(self.class_names):
                raise UnreadableImage(sample.name, f"its label is {sample.label} of {len(self.class_names)} classes")
            return self.transform(read_image(sample.name, io.BytesIO(sample.file), self.shorter_side)), sample.label

    def sampler(
        self, config: DataConfig, seed: int, rank: int = 0, world_size: int = 1, position: Position = START
    ) -> "ShardSampler":
        return ShardSampler(self, config, seed, rank, world_size, position)

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
        stream = TrainingStream(self, sampler.order(rank), seed)
        # the order of the samples depends on the number of workers, which therefore is the same on every machine
        return make_loader(stream, config.batch_size // world_size, sampler, config.num_workers)

    def evaluation_loader(
        self, config: DataConfig, rank: int = 0, world_size: int = 1, device: torch.device = CPU
    ) -> DataLoader[Any]:
        size, workers = config.eval_batch_size, limit_workers(config.num_workers)
        order = ShardOrder(self.starts, len(self), size, workers, rank, world_size, buffer=size)
        return make_loader(EvaluationStream(self, order), size, range(len(order)), workers, collate_readable)

    def readable_counts(self, num_workers: int) -> Iterable[int]:
        num_workers = limit_workers(num_workers)
        order = ShardOrder(self.starts, len(self), CHECKED_AT_ONCE, num_workers, buffer=CHECKED_AT_ONCE)
        plain = copy.copy(self)
        plain.transform = unchanged
        return make_loader(EvaluationStream(plain, order), CHECKED_AT_ONCE, range(len(order)), num_workers, len)

    def probe(self, most: int) -> tuple[int, list[str]]:
        return 0, []

    def examples(self, number: int) -> list[tuple[Any, int]]:
        """Up to `number` readable items among the first `4 * number` samples."""
        samples = self.reader().read(np.arange(min(len(self), 4 * number)))
        found = []
        for sample in samples.values():
            try:
                found.append(self.decode(sample))
            except UnreadableImage:
                continue
        return found[:number]


class ShardSampler(EpochSampler):
    """Keys (epoch, index in the order of this rank's batches) for a `TrainingStream`."""

    def __init__(
        self,
        split: ShardSplit,
        config: DataConfig,
        seed: int,
        rank: int,
        world_size: int,
        position: Position,
    ) -> None:
        super().__init__(len(split), config.batch_size, seed, rank, world_size, **position)
        self.starts, self.workers, self.buffer = split.starts, config.num_workers, config.shuffle_buffer

    def __iter__(self) -> Iterator[Key]:
        epoch, size = self.epoch, self.batch_size // self.world_size
        return ((epoch, index) for index in range(self._skipped(epoch) * size, self.batches_per_epoch * size))

    def order(self, rank: int) -> ShardOrder:
        """The order in which a rank reads samples."""
        return ShardOrder(
            self.starts,
            self.batches_per_epoch * self.batch_size,
            self.batch_size // self.world_size,
            self.workers,
            rank,
            self.world_size,
            seed=self.seed,
            buffer=self.buffer,
            salts={self.first_epoch: " ".join(map(str, self.reshuffles))},
        )

    def images_of(self, epoch: int, batch: int) -> list[int]:
        size = self.batch_size // self.world_size
        orders = [self.order(rank) for rank in range(self.world_size)]
        return [order.sample(epoch, index) for order in orders for index in range(batch * size, (batch + 1) * size)]


class ShardStream(Dataset[Any]):
    """Samples of a `ShardOrder`, read one buffer at a time; memory holds a single buffer."""

    def __init__(self, split: ShardSplit, order: ShardOrder) -> None:
        self.split, self.order = split, order
        self._reader = split.reader()
        self._loaded: tuple[int, int, int] | None = None  # epoch, partition and number of the buffer
        self._buffer: dict[int, Sample | UnreadableImage] = {}  # by number
        self._numbers: list[int] = []  # in the order in which they are served

    def __len__(self) -> int:
        return len(self.order)

    def _load(self, epoch: int, index: int) -> int:
        """Reads the buffer of the rank's sample `index` unless it is loaded, and returns the sample's number."""
        partition, number, place = self.order.buffer_of(index)
        if self._loaded != (epoch, partition, number):
            self._buffer = {}  # freed before the next one is read
            self._buffer = self._reader.read(self.order.read_order(epoch, partition, number))
            self._numbers = self.order.serving_order(epoch, partition, number).tolist()
            self._loaded = (epoch, partition, number)
        return self._numbers[place]


class TrainingStream(ShardStream):
    """Items `(image, label)` by keys (epoch, index), whose random transforms are seeded from (seed, epoch, sample).

    A sample that cannot be read is replaced by another one of its buffer.
    """

    def __init__(self, split: ShardSplit, order: ShardOrder, seed: int) -> None:
        super().__init__(split, order)
        self.seed = seed

    def __getitems__(self, keys: Sequence[Key | int]) -> list[Any]:
        with own_random_states():
            return [self._item(*as_key(key)) for key in keys]

    def _item(self, epoch: int, index: int) -> Any:
        number = self._load(epoch, index)
        seed_transforms(self.seed, epoch, number)
        for _ in range(10 * len(self._numbers)):
            try:
                return self.split.decode(self._buffer[number])
            except UnreadableImage:
                number = random.choice(self._numbers)
        raise RuntimeError(f"none of {len(self._numbers)} consecutive samples of the shards can be read")


class EvaluationStream(ShardStream):
    """Items `(image, label, number)` by indices, without those that cannot be read."""

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        items = []
        for index in indices:
            number = self._load(0, index)
            try:
                items.append((*self.split.decode(self._buffer[number]), number))
            except UnreadableImage:
                continue
        return items
