"""Tar files in WebDataset's layout and their index, read from a disk, over HTTP or from S3."""

import os
import re
import tarfile
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlparse

import numpy as np
from pydantic import AfterValidator, BaseModel, Field

from sequencer.config.errors import RequestError
from sequencer.data.images import UnreadableImage, reason_of
from sequencer.data.streams import REMOTE, open_stream
from sequencer.declared import parse_json
from sequencer.names import MOST_CLASSES
from sequencer.printing import printable

ATTEMPTS = 3  # to read a shard whose stream breaks off
SCHEMES = ("", "file", *REMOTE)
IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff", "gif")
MOST_INDEX = 2**27  # bytes of an index
MOST_FILE = 2**30  # bytes of a file in a shard
MOST_HEADER = 2**17  # bytes of a header of a file in a shard
# of names and attributes that a plain header has no room for
LONG_HEADERS = {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}
LONG_HEADERS |= {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
MOST_IN_SHARD = 10**7  # samples; those of ImageNet in a single shard are a tenth of that


def _check_length(text: str) -> str:
    if not 1 <= len(text) <= 4096:  # pydantic's own limits refuse bytes that are not UTF-8
        raise ValueError("input should have 1 to 4096 characters")
    return text


class ShardEntry(BaseModel):
    """A shard: its address and its number of samples."""

    url: Annotated[str, AfterValidator(_check_length)]
    nsamples: Annotated[int, Field(ge=1, le=MOST_IN_SHARD)]


class ShardIndex(BaseModel):
    """WebDataset's index of a split, and the names of the classes."""

    shardlist: Annotated[list[ShardEntry], Field(min_length=1)]
    classes: Annotated[list[str | int], Field(max_length=MOST_CLASSES)] | None = None


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
    from webdataset.tariterators import group_by_keys

    with open_stream(url) as file:
        members = ({"fname": name, "data": data, "__url__": url} for name, data in _members(file))
        for sample in group_by_keys(members):
            image = next((sample[kind] for kind in IMAGES if kind in sample), b"")
            label = sample.get("cls", b"").decode("ascii", "replace").strip()
            known = label.isdecimal() and len(label) < 10
            yield Sample(image, int(label) if known else -1, f"{url}#{sample['__key__']}")


class _Header(tarfile.TarInfo):
    """The header of a file in a tar stream, which ends the stream with an error if it is damaged or very large.

    tarfile takes a damaged header for the end of the stream, and reads a header of any size into memory.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not buf.strip(b"\0"):  # the end
                raise
            raise tarfile.ReadError(f"damaged header: {error}") from error
        if header.type in LONG_HEADERS and header.size > MOST_HEADER:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


def _members(file: Any) -> Iterator[tuple[str, bytes]]:
    """The files of a tar stream; one of more than `MOST_FILE` bytes, which a compressed shard may hold, is empty."""
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as stream:
        for member in stream:
            stream.members = []  # type: ignore[attr-defined]  # otherwise the list of all members stays in memory
            if not member.isreg() or re.match(r"__[^/]*__($|/)", member.name):  # WebDataset's metadata
                continue
            content = stream.extractfile(member) if member.size <= MOST_FILE else None
            yield member.name, content.read() if content else b""


def read_index(url: str) -> ShardIndex:
    """WebDataset's index of a split.

    Raises:
        OSError: there is none.
        RequestError: webdataset is not installed.
        UndeclaredContent: it is damaged, or says what no index says.
    """
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise RequestError("reading shards needs webdataset: python -m pip install webdataset") from error
    with open_stream(url) as file:
        text = file.read(MOST_INDEX + 1)
    if len(text) > MOST_INDEX:
        raise OSError(f"an index has at most {MOST_INDEX >> 20} MiB")
    return parse_json(ShardIndex, text, os.path.basename(url))


def resolve(root: str, name: str) -> str:
    """The address of a file that an index names, relative to the index unless it is absolute.

    Raises:
        RequestError: the address has another scheme, such as one that runs a command; or an index that is not on a disk
            of this machine names a file that is.
    """
    absolute = urlparse(name).scheme or name.startswith(("/", "~"))
    url = name if absolute else f"{root.rstrip('/')}/{name}"
    scheme = urlparse(url).scheme
    if scheme not in SCHEMES or (scheme in REMOTE and ("'" in url or url != printable(url))):
        raise RequestError(f"shard {printable(name)!r}: addresses are files, http, https or s3")
    if urlparse(root).scheme in REMOTE and scheme not in REMOTE:
        raise RequestError(f"shard {printable(name)!r}: {printable(root)} may not name files of this machine")
    return url if scheme else os.path.expanduser(url)
