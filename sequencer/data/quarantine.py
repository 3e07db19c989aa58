"""A record of the images that cannot be read, and the error when there are too many."""

import csv
import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sequencer.data.images import UnreadableImage
from sequencer.files import writing

log = logging.getLogger("sequencer")

COLUMNS = ["split", "path", "reason"]


class TooManyBadImages(RuntimeError):
    """More images of a split are unreadable than `data.max_bad_share` allows."""


class Quarantine:
    """The unreadable images of one split, each listed once in a CSV file.

    Args:
        path: `bad_samples.csv`; several splits, loader workers, ranks, and a run and those that resume it share it.
        split: train, val or test.
        images: number of images of the split.
        max_share: largest share of them that may be unreadable.
    """

    def __init__(self, path: Path, split: str, images: int, max_share: float) -> None:
        self.path, self.split, self.images, self.max_share = path, split, images, max_share

    def report(self, found: UnreadableImage) -> None:
        """Adds an image to the file unless it is listed already.

        Raises:
            TooManyBadImages: the file now lists more images of the split than allowed.
            WriteError: The file cannot be written.
        """
        with self._locked() as file:
            bad = {row["path"] for row in csv.DictReader(file) if row["split"] == self.split and row["reason"]}
            if found.path not in bad:
                bad.add(found.path)
                self._append(file, found)
                log.warning("left out, unreadable: %s (%s)", found.path, found.reason)
        if len(bad) > self.max_share * self.images:
            raise TooManyBadImages(
                f"{len(bad)} of {self.images} {self.split} images cannot be read, more than data.max_bad_share="
                f"{self.max_share:g} allows: {self.path} lists them"
            )

    @contextmanager
    def _locked(self) -> Iterator[IO[str]]:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+", newline="") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                yield file

    def _append(self, file: IO[str], found: UnreadableImage) -> None:
        writer = csv.writer(file)
        end = file.seek(0, 2)
        if end == 0:
            writer.writerow(COLUMNS)
        elif not self.path.read_text().endswith("\n"):  # the last line was cut off when its process was killed
            file.write("\n")
        writer.writerow([self.split, found.path, found.reason])
