"""Sets in shards: tar files in WebDataset's layout, read from start to end, from a disk, over HTTP or from S3.

`data.root` is a folder or an address that holds `train.json`, `val.json` and optionally `test.json`, as
`scripts/shards.py` writes them: WebDataset's index of shards with their numbers of samples, and the names of the
classes. A sample is an image file and a `.cls` file with its label.

An epoch's order is a function of (seed, epoch), of how many processes there are and of how many workers each has.
Shards come in a random order; every worker reads a stretch of its own, so that no sample is read twice or left out, and
shuffles it by stretches of `data.shuffle_buffer` samples.
"""

import io
import json
import os
import random
import shlex
from collections.abc import Callable, Iterator
from typing import Any, Literal
from urllib.parse import urlparse

import numpy as np
from torch.utils.data import Dataset

from sequencer.config.errors import RequestError
from sequencer.config.schema import DataConfig
from sequencer.data.images import UnreadableImage, read_image
from sequencer.data.quarantine import Quarantine
from sequencer.data.seeding import EpochSampler, Key, own_random_states, seed_transforms

ATTEMPTS = 3  # at a shard that breaks off
SCHEMES = ("", "file", "http", "https", "s3")
IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff", "gif")

Split = Literal["train", "val", "test"]
Sample = tuple[bytes, int, str]  # image file, label, name


class ShardSet:
    """One part of a set in shards. Its samples are numbered through all shards.

    Raises:
        RequestError: there is no index, or it says something that cannot be.
    """

    quarantine: Quarantine | None = None

    def __init__(self, config: DataConfig, split: Split, transform: Callable[[Any], Any]) -> None:
        index = _read_index(config, split)
        self.urls = [_resolved(config.root, shard["url"]) for shard in index["shardlist"]]
        self.starts = np.cumsum([0, *(int(shard["nsamples"]) for shard in index["shardlist"])])
        self.class_names = [str(name) for name in index.get("classes") or range(config.num_classes or 0)]
        self.transform = transform
        if not self.class_names:
            raise RequestError(f"data={config.name}: {split}.json names no classes: set data.num_classes")
        if config.num_classes not in (None, len(self.class_names)):
            raise RequestError(
                f"data={config.name}: data.num_classes={config.num_classes}, but {split}.json names "
                f"{len(self.class_names)} classes"
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def ids(self) -> list[str]:
        """What tells the samples apart: their shards, and where they are there."""
        counts = np.diff(self.starts)
        return [f"{url}#{index}" for url, count in zip(self.urls, counts, strict=True) for index in range(count)]

    def item(self, sample: Sample | UnreadableImage) -> tuple[Any, int]:
        """
        Raises:
            UnreadableImage: having been put into the quarantine, if there is one.
        """
        try:
            if isinstance(sample, UnreadableImage):
                raise sample
            file, label, name = sample
            if not 0 <= label < len(self.class_names):
                raise UnreadableImage(name, f"its label is {label} of {len(self.class_names)} classes")
            return self.transform(read_image(name, io.BytesIO(file))), label
        except UnreadableImage as found:
            if self.quarantine is not None:
                self.quarantine.report(found)
            raise


class Stretches:
    """Which samples a process reads, in which order.

    The process's `total` samples are cut into batches; the batches go to `workers` workers by turns, whoever they are,
    and each worker's samples are a stretch of the epoch's order.
    """

    def __init__(
        self,
        images: ShardSet,
        total: int,
        batch_size: int,
        workers: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
        buffer: int = 1,
        drawn_anew: tuple[int, str] = (-1, ""),
    ) -> None:
        """`total` is of all processes; `seed` None keeps the order of the shards; `drawn_anew` is an epoch whose order
        is another one, and which."""
        self.images, self.seed, self.buffer, self.drawn_anew = images, seed, buffer, drawn_anew
        self.low, self.high = rank * total // world_size, (rank + 1) * total // world_size
        self.batch_size, self.workers = batch_size, max(workers, 1)
        sizes = [0] * self.workers
        for number, first in enumerate(range(0, len(self), batch_size)):
            sizes[number % self.workers] += min(batch_size, len(self) - first)
        self._epoch, self._ordered = -1, np.empty(0)
        self.offsets = [self.low, *(self.low + int(end) for end in np.cumsum(sizes))]

    def __len__(self) -> int:
        return self.high - self.low

    def place(self, index: int) -> tuple[int, int]:
        """The stretch of the process's sample `index`, counted in the order of its batches, and where it is there."""
        batch, within = divmod(index, self.batch_size)
        turn, stretch = divmod(batch, self.workers)
        return stretch, turn * self.batch_size + within

    def chunk(self, epoch: int, stretch: int, number: int) -> np.ndarray:
        """Numbers of the samples of one buffer, as they are read; `shuffled` gives them as they are served."""
        first = self.offsets[stretch] + number * self.buffer
        return self._order(epoch)[first : min(first + self.buffer, self.offsets[stretch + 1])]

    def shuffled(self, epoch: int, stretch: int, number: int) -> np.ndarray:
        chunk = self.chunk(epoch, stretch, number)
        if self.seed is None:
            return chunk
        return self._random(epoch, f"{self.offsets[stretch]} {number}").permutation(chunk)

    def _order(self, epoch: int) -> np.ndarray:
        """All samples, shard by shard."""
        if epoch != self._epoch:
            starts = self.images.starts
            shards = np.arange(len(starts) - 1)
            if self.seed is not None:
                shards = self._random(epoch).permutation(shards)
            self._ordered = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])
            self._epoch = epoch
        return self._ordered

    def _random(self, epoch: int, what: str = "") -> np.random.RandomState:
        anew = self.drawn_anew[1] if epoch == self.drawn_anew[0] else ""
        return np.random.RandomState(random.Random(f"{self.seed} {epoch} {anew} {what}").getrandbits(32))

    def number(self, epoch: int, index: int) -> int:
        """Of the sample at `index` in the order of the process's batches."""
        stretch, position = self.place(index)
        chunk, within = divmod(position, self.buffer)
        return int(self.shuffled(epoch, stretch, chunk)[within])


class StreamSampler(EpochSampler):
    """Keys (epoch, index in the order of this process's batches) for `StreamSet`."""

    def __iter__(self) -> Iterator[Key]:
        first = self.batches_done if self.epoch == self.first_epoch else 0
        share = self.batch_size // self.world_size
        epoch = self.epoch
        return ((epoch, index) for index in range(first * share, self.batches * share))


class StreamSet(Dataset[Any]):
    """The samples of `Stretches` by keys (epoch, index), a batch at a time and each worker's batches in their order.

    With `augmentation_seed`, items `(image, label)`, another of the buffer in the place of one that cannot be read;
    without, items `(image, label, number)` of those that can.
    """

    def __init__(self, stretches: Stretches, augmentation_seed: int | None = None) -> None:
        self.stretches, self.seed = stretches, augmentation_seed
        self.images = stretches.images
        self._loaded: tuple[int, int, int] | None = None
        self._buffer: dict[int, Sample | UnreadableImage] = {}  # by number
        self._order: list[int] = []  # the same numbers, as they are served
        self._reader = _Reader(self.images)

    def __len__(self) -> int:
        return len(self.stretches)

    def __getitems__(self, keys: list[Key]) -> list[Any]:
        if self.seed is None:
            items = (self._evaluated(epoch, index) for epoch, index in keys)
            return [item for item in items if item is not None]
        with own_random_states():
            return [self._augmented(epoch, index) for epoch, index in keys]

    def _evaluated(self, epoch: int, index: int) -> Any:
        number = self._load(epoch, index)
        try:
            return *self.images.item(self._buffer[number]), number
        except UnreadableImage:
            return None

    def _augmented(self, epoch: int, index: int) -> Any:
        number = self._load(epoch, index)
        assert self.seed is not None
        seed_transforms(self.seed, epoch, number)
        for _ in range(10 * len(self._order)):
            try:
                return self.images.item(self._buffer[number])
            except UnreadableImage:
                number = random.choice(self._order)
        raise RuntimeError(f"none of {len(self._order)} images that follow one another in the shards can be read")

    def _load(self, epoch: int, index: int) -> int:
        """Fills the buffer that holds the sample, and returns its number."""
        stretch, position = self.stretches.place(index)
        chunk, within = divmod(position, self.stretches.buffer)
        if self._loaded != (epoch, stretch, chunk):
            numbers = self.stretches.chunk(epoch, stretch, chunk)
            self._buffer = {}  # before the next one is read: memory holds one
            self._buffer = self._reader.read(numbers)
            self._order = self.stretches.shuffled(epoch, stretch, chunk).tolist()
            self._loaded = (epoch, stretch, chunk)
        return self._order[within]


class _Reader:
    """Reads samples that follow one another, going on in an open shard where it can."""

    def __init__(self, images: ShardSet) -> None:
        self.images = images
        self._shard, self._next = -1, 0
        self._stream: Iterator[Sample] = iter(())

    def __getstate__(self) -> dict[str, Any]:
        return {"images": self.images, "_shard": -1, "_next": 0, "_stream": iter(())}

    def read(self, numbers: np.ndarray) -> dict[int, Sample | UnreadableImage]:
        shards = np.searchsorted(self.images.starts, numbers, side="right") - 1
        found: dict[int, Sample | UnreadableImage] = {}
        for shard in dict.fromkeys(shards.tolist()):
            own = numbers[shards == shard]
            found |= self._of_shard(shard, own.tolist())
        return found

    def _of_shard(self, shard: int, numbers: list[int]) -> dict[int, Sample | UnreadableImage]:
        start, url = int(self.images.starts[shard]), self.images.urls[shard]
        found: dict[int, Sample | UnreadableImage] = {}
        reason = ""
        for _ in range(ATTEMPTS):
            try:
                for number in numbers[len(found) :]:
                    found[number] = self._sample(shard, number - start)
                return found
            except Exception as error:  # the network's, tar's and the other program's are of a dozen kinds
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self._shard = -1
        lost = {
            number: UnreadableImage(f"{url}#{number - start}", f"the shard breaks off: {reason}")
            for number in numbers[len(found) :]
        }
        return found | lost

    def _sample(self, shard: int, index: int) -> Sample:
        if self._shard != shard or self._next > index:
            self._stream, self._shard, self._next = read_samples(self.images.urls[shard]), shard, 0
        while True:
            sample = next(self._stream, None)
            if sample is None:
                raise EOFError(f"it ends after {self._next} samples")
            self._next += 1
            if self._next > index:
                return sample


def read_samples(url: str) -> Iterator[Sample]:
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    with _open(url) as file:
        members = ({**member, "__url__": url} for member in tar_file_iterator(file))
        for sample in group_by_keys(members):
            image = next((sample[kind] for kind in IMAGES if kind in sample), b"")
            label = sample.get("cls", b"").decode("ascii", "replace").strip()
            yield image, int(label) if label.isdecimal() else -1, f"{url}#{sample['__key__']}"


def _open(url: str) -> Any:
    from webdataset.gopen import gopen

    if url.startswith("s3://"):
        return gopen(f"pipe:aws s3 cp {shlex.quote(url)} -")
    return gopen(url)


def _resolved(root: str, name: str) -> str:
    """A shard's address, which stands beside the index unless it says more.

    Raises:
        RequestError: it is of a kind that would run a command.
    """
    url = name if urlparse(name).scheme or name.startswith("/") else f"{root.rstrip('/')}/{name}"
    if urlparse(url).scheme not in SCHEMES or "'" in url:
        raise RequestError(f"shard {name!r}: addresses are files, http, https or s3")
    return os.path.expanduser(url)


def _read_index(config: DataConfig, split: str) -> dict[str, Any]:
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise RequestError(f"data={config.name} needs webdataset: python -m pip install webdataset") from error
    url = _resolved(config.root, f"{split}.json")
    try:
        with _open(url) as file:
            index = json.loads(file.read())
        if not all(int(shard["nsamples"]) > 0 and shard["url"] for shard in index["shardlist"]):
            raise ValueError("a shard without samples")
        if not index["shardlist"]:
            raise ValueError("no shard")
    except Exception as error:  # as in reading a shard
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(
            f"data={config.name}: no index {url} ({reason})\n"
            "scripts/shards.py writes shards with their index, or an index for shards that there are"
        ) from error
    return index


def has_index(config: DataConfig, split: Split) -> bool:
    """Whether the set has the part."""
    try:
        return bool(_read_index(config, split))
    except RequestError:
        return False
