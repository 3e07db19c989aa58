"""Images that cannot be read: left out, written down, and too many of them an error."""

import csv
import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sequencer.data.images import UnreadableImage

log = logging.getLogger("sequencer")

COLUMNS = ["part", "path", "reason"]


class TooManyBadImages(RuntimeError):
    """More images of a part cannot be read than `data.max_bad_share` allows."""


class Quarantine:
    """The unreadable images of one part of a set, each once in the file `path`, whoever finds it.

    Args:
        path: `bad_samples.csv`, shared by parts, loader workers, processes, and the runs that resume one another.
        part: train, val or test.
        images: how many the part has.
        max_share: of them may be unreadable.
    """

    def __init__(self, path: Path, part: str, images: int, max_share: float) -> None:
        self.path, self.part, self.images, self.max_share = path, part, images, max_share

    def report(self, found: UnreadableImage) -> None:
        """
        Raises:
            TooManyBadImages: with this one there are too many.
        """
        with self._locked() as file:
            bad = {row["path"] for row in csv.DictReader(file) if row["part"] == self.part and row["reason"]}
            if found.path not in bad:
                bad.add(found.path)
                self._append(file, found)
                log.warning("left out, unreadable: %s (%s)", found.path, found.reason)
        if len(bad) > self.max_share * self.images:
            raise TooManyBadImages(
                f"{len(bad)} of {self.images} {self.part} images cannot be read, more than data.max_bad_share="
                f"{self.max_share:g} allows: {self.path} lists them"
            )

    @contextmanager
    def _locked(self) -> Iterator[IO[str]]:
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
        elif not self.path.read_text().endswith("\n"):  # a line torn by a kill
            file.write("\n")
        writer.writerow([self.part, found.path, found.reason])
