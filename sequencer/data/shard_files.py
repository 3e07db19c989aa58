"""Tar files in WebDataset's layout and their index, read from a disk, over HTTP or from S3."""

import json
import os
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlparse

import numpy as np

from sequencer.config.errors import RequestError
from sequencer.data.images import UnreadableImage, reason_of

ATTEMPTS = 3  # to read a shard whose stream breaks off
SCHEMES = ("", "file", "http", "https", "s3")
IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff", "gif")


class Sample(NamedTuple):
    """One entry of a shard: an encoded image, its label (-1 where it has none), and its name for messages."""

    file: bytes
    label: int
    name: str


class ShardReader:
    """Reads samples by their numbers, continuing in the open shard where it can.

    Args:
        urls: addresses of the shards.
        starts: number of the first sample of every shard, and at the end the number of all samples.
    """

    def __init__(self, urls: list[str], starts: np.ndarray) -> None:
        self.urls, self.starts = urls, starts
        self._close()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the open stream, which cannot be pickled."""
        return {"urls": self.urls, "starts": self.starts, "_shard": -1, "_next": 0, "_stream": iter(())}

    def _close(self) -> None:
        self._shard, self._next = -1, 0
        self._stream: Iterator[Sample] = iter(())

    def read(self, numbers: np.ndarray) -> dict[int, Sample | UnreadableImage]:
        """Samples by their numbers, which ascend within a shard; a lost sample is replaced by its error."""
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        found: dict[int, Sample | UnreadableImage] = {}
        for shard in dict.fromkeys(shards.tolist()):
            found |= self._read_shard(shard, numbers[shards == shard].tolist())
        return found

    def _read_shard(self, shard: int, numbers: list[int]) -> dict[int, Sample | UnreadableImage]:
        start, url = int(self.starts[shard]), self.urls[shard]
        found: dict[int, Sample | UnreadableImage] = {}
        reason = ""
        for _ in range(ATTEMPTS):
            try:
                for number in numbers[len(found) :]:
                    found[number] = self._sample(shard, number - start)
                return found
            except Exception as error:  # the network, tar and external commands raise a dozen types
                reason = reason_of(error)
                self._close()
        lost = numbers[len(found) :]
        return found | {n: UnreadableImage(f"{url}#{n - start}", f"the shard breaks off: {reason}") for n in lost}

    def _sample(self, shard: int, index: int) -> Sample:
        if self._shard != shard or self._next > index:
            self._stream, self._shard, self._next = read_samples(self.urls[shard]), shard, 0
        while True:
            sample = next(self._stream, None)
            if sample is None:
                raise EOFError(f"it ends after {self._next} samples")
            self._next += 1
            if self._next > index:
                return sample


def read_samples(url: str) -> Iterator[Sample]:
    """All samples of a shard in order."""
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    with _open(url) as file:
        members = ({**member, "__url__": url} for member in tar_file_iterator(file))
        for sample in group_by_keys(members):
            image = next((sample[kind] for kind in IMAGES if kind in sample), b"")
            label = sample.get("cls", b"").decode("ascii", "replace").strip()
            yield Sample(image, int(label) if label.isdecimal() else -1, f"{url}#{sample['__key__']}")


def read_index(url: str) -> dict[str, Any]:
    """WebDataset's index of a split: `shardlist` with the `url` and `nsamples` of every shard, and `classes`.

    Raises:
        OSError: there is no such index, or it lists no shards or empty ones.
        RequestError: webdataset is not installed.
    """
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise RequestError("reading shards needs webdataset: python -m pip install webdataset") from error
    try:
        with _open(url) as file:
            index = json.loads(file.read())
        if not index["shardlist"]:
            raise ValueError("it lists no shard")
        if not all(int(shard["nsamples"]) > 0 and shard["url"] for shard in index["shardlist"]):
            raise ValueError("it lists a shard without samples")
    except Exception as error:  # as in reading a shard
        raise OSError(reason_of(error)) from error
    return index


def resolve(root: str, name: str) -> str:
    """The address of a file that an index names, relative to the index unless it is absolute.

    Raises:
        RequestError: the address has another scheme, such as one that runs a command.
    """
    url = name if urlparse(name).scheme or name.startswith("/") else f"{root.rstrip('/')}/{name}"
    if urlparse(url).scheme not in SCHEMES or "'" in url:
        raise RequestError(f"shard {name!r}: addresses are files, http, https or s3")
    return os.path.expanduser(url)


def _open(url: str) -> Any:
    from webdataset.gopen import gopen

    if url.startswith("s3://"):
        return gopen(f"pipe:aws s3 cp {shlex.quote(url)} -")
    return gopen(url)
