"""A record of the images that cannot be read, and the error when there are too many."""

import csv
import fcntl
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sequencer.data.images import UnreadableImage
from sequencer.files import writing
from sequencer.printing import printable

log = logging.getLogger("sequencer")

COLUMNS = ["split", "path", "reason"]


class TooManyBadImages(RuntimeError):
    """More images of a split are unreadable than `data.max_bad_share` allows."""


class Quarantine:
    """The unreadable images of one split, each listed once in a CSV file, with their names as `printable` shows them.

    Args:
        path: `bad_samples.csv`; several splits, loader workers, ranks, and a run and those that resume it share it.
        split: train, val or test.
        images: number of images of the split.
        max_share: largest share of them that may be unreadable.
    """

    def __init__(self, path: Path, split: str, images: int, max_share: float) -> None:
        self.path, self.split, self.images, self.max_share = path, split, images, max_share
        self._bad: set[str] = set()  # what the file lists of the split, up to `_end`
        self._end = 0

    def report(self, found: UnreadableImage) -> None:
        """Adds an image to the file unless it is listed already.

        Raises:
            TooManyBadImages: the file now lists more images of the split than allowed.
            WriteError: The file cannot be written.
        """
        path, reason = printable(found.path), printable(found.reason)
        with self._locked() as file:
            self._read(file)
            if path not in self._bad:
                self._append(file, path, reason)
                log.warning("left out, unreadable: %s (%s)", path, reason)
                self._read(file)
        if len(self._bad) > self.max_share * self.images:
            raise TooManyBadImages(
                f"{len(self._bad)} of {self.images} {self.split} images cannot be read, more than data.max_bad_share="
                f"{self.max_share:g} allows: {self.path} lists them"
            )

    @contextmanager
    def _locked(self) -> Iterator[IO[str]]:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+", encoding="utf-8", errors="surrogateescape", newline="") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file

    def _read(self, file: IO[str]) -> None:
        """Reads what has been added to the file, by this process or another, since it was read last."""
        if file.seek(0, os.SEEK_END) < self._end:  # another file has taken its place
            self._bad, self._end = set(), 0
        file.seek(self._end)
        for row in csv.reader(io.StringIO(file.read(), newline="")):
            if len(row) == len(COLUMNS) and row[0] == self.split and row[2]:
                self._bad.add(row[1])
        self._end = file.tell()

    def _append(self, file: IO[str], path: str, reason: str) -> None:
        writer = csv.writer(file)
        end = file.seek(0, os.SEEK_END)
        if end == 0:
            writer.writerow(COLUMNS)
        elif os.pread(file.fileno(), 1, end - 1) != b"\n":  # the last line was cut off when its process was killed
            file.write("\n")
        writer.writerow([self.split, path, reason])
        file.flush()
