"""Splits of the image files that a CSV or Parquet file lists, with their labels."""

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sequencer.config.errors import RequestError, did_you_mean
from sequencer.config.file_lists import check_suffix, columns, find_columns
from sequencer.config.schema import DataConfig
from sequencer.data.files import FileSplit
from sequencer.data.split import Split, SplitName, stratified_split
from sequencer.files import check_regular
from sequencer.printing import printable

SPLITS: dict[str, SplitName] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
TRIED = 100  # images, of which one must exist


class ListSplit(FileSplit):
    """Image files of a list, whose ids are the paths that the list has, wherever it is stored.

    Args:
        rows: path as it is listed, and label, of every image.
        location: the list, whose folder relative paths start from.
    """

    def __init__(self, rows: Sequence[tuple[str, int]], class_names: Sequence[str], location: str) -> None:
        folder = os.path.dirname(location)
        super().__init__([(os.path.join(folder, path), label) for path, label in rows], class_names, location)
        self._listed = [path for path, _ in rows]

    @property
    def ids(self) -> list[str]:
        return [self._listed[index] for index in self.indices]


@dataclass(frozen=True)
class FileList:
    """The rows of a list by split, as path and label, and the names of the classes."""

    rows: dict[SplitName, list[tuple[str, int]]]
    class_names: list[str]


def open_file_list(config: DataConfig, name: SplitName) -> Split:
    """Opens a split of the list `data.root`.

    The rows of the validation and the test split are those that the split column names. If there are none,
    `data.val_fraction` and `data.test_fraction` of the training images of each class are held out, whatever the seed.

    Raises:
        RequestError: the list cannot be read as one, and the message names its line; or it leaves a split without
            images.
    """
    found = _read(config)
    return ListSplit(_divide(found, config)[name], found.class_names, str(_path(config)))


def has_test_rows(config: DataConfig) -> bool:
    """Whether the list has test images, or some of its training images are held out for testing."""
    try:
        return config.test_fraction > 0 or bool(_read(config).rows["test"])
    except OSError:
        return False  # a list that is missing is refused where the split is opened


def _path(config: DataConfig) -> Path:
    return Path(config.root).expanduser().resolve()


def _divide(found: FileList, config: DataConfig) -> dict[SplitName, list[tuple[str, int]]]:
    """Holds out training rows for the splits that the list does not have."""
    divided, left = dict(found.rows), found.rows["train"]
    fractions: tuple[tuple[SplitName, float], ...] = (("test", config.test_fraction), ("val", config.val_fraction))
    for name, fraction in fractions:
        if not divided[name]:
            kept, held = stratified_split(np.array([label for _, label in left]), fraction)
            divided[name], left = [left[index] for index in held], [left[index] for index in kept]
            if not divided[name] and (fraction or name == "val"):
                raise RequestError(
                    f"data=filelist: {printable(config.root)} has no {name} images, and data.{name}_fraction={fraction}"
                    f" holds out none of its {len(kept)} others\nset it higher, or name a column with data.split_column"
                )
    return divided | {"train": left}


def _read(config: DataConfig) -> FileList:
    """Reads the list, unless it is the one that was read last."""
    path = _path(config)
    check_regular(path)
    state = os.stat(path)
    return _read_list(path, columns(config), (state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=1)  # every split is opened from the same rows
def _read_list(path: Path, columns: tuple[str, str, str | None], state: tuple[int, int]) -> FileList:
    readers = {".csv": _csv_rows, ".parquet": _parquet_rows}
    check_suffix(path)
    listed: dict[SplitName, list[tuple[str, str]]] = {"train": [], "val": [], "test": []}
    places: dict[str, str] = {}  # of every image; e.g. `line 7`
    labels: dict[str, str] = {}  # of validation and test, with the place where each comes first
    for place, (image, label, part) in readers[path.suffix.lower()](path, columns):
        if not image or not label:
            raise _error(path, place, f"its {columns[0] if not image else columns[1]} is empty")
        if part not in SPLITS:
            raise _error(path, place, f"{columns[2]} {printable(part)!r}: {did_you_mean(part, SPLITS)}")
        if (same := places.setdefault(os.path.normpath(image), place)) != place:
            raise _error(path, place, f"{printable(image)} is listed in {same} already")
        listed[SPLITS[part]].append((image, label))
        if SPLITS[part] != "train":
            labels.setdefault(label, place)
    names = sorted({label for _, label in listed["train"]})
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    if not names:
        raise RequestError(f"data=filelist: {printable(path)} lists no image to train on")
    for label, place in labels.items():
        if label not in names:
            raise _error(path, place, f"no training image has the {columns[1]} {printable(label)!r}")
    _check_images(path, places)
    indices = {name: index for index, name in enumerate(names)}
    rows = {split: [(image, indices[label]) for image, label in found] for split, found in listed.items()}
    return FileList(rows, names)


def _check_images(path: Path, places: dict[str, str]) -> None:
    """Checks that one of the first images exists; single ones that are missing are left out as unreadable."""
    tried = list(islice(places, TRIED))
    if not any(os.path.exists(path.parent / image) for image in tried):
        first = path.parent / tried[0]
        raise _error(path, places[tried[0]], f"there is no {printable(first)}; paths start from the list's folder")


def _csv_rows(path: Path, columns: tuple[str, str, str | None]) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Yields the line of every row of a CSV file, and its path, label and split."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            wanted = find_columns(path, header, columns)
            for row in reader:
                place = f"line {reader.line_num}"
                if len(row) != len(header) and row:
                    raise _error(path, place, f"it has {len(row)} fields, and the first line {len(header)}")
                if row:
                    image, label, *part = (row[index] for index in wanted)
                    yield place, (image, label, *part) if part else (image, label, "train")  # type: ignore[misc]
        except csv.Error as error:
            raise _error(path, f"line {reader.line_num}", str(error)) from error


def _parquet_rows(path: Path, columns: tuple[str, str, str | None]) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Yields the number of every row of a Parquet file, from 1, and its path, label and split."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise RequestError(f"{printable(path)} needs pyarrow: python -m pip install pyarrow") from None
    number = 0
    try:
        with ParquetFile(path) as file:
            header = file.schema_arrow.names
            wanted = [header[index] for index in find_columns(path, header, columns)]
            for batch in file.iter_batches(columns=wanted):
                for values in zip(*(batch.column(name).to_pylist() for name in wanted), strict=True):
                    number += 1
                    for name, value in zip(wanted, values, strict=True):
                        if not isinstance(value, str | int | None):
                            raise _error(
                                path, f"row {number}", f"{name} holds {type(value).__name__}, no text or integer"
                            )
                    image, label, *part = ("" if value is None else str(value) for value in values)
                    yield f"row {number}", (image, label, *part) if part else (image, label, "train")  # type: ignore[misc]
    except ArrowException as error:
        raise RequestError(f"data=filelist: {printable(path)} is damaged or no Parquet file") from error


def _error(path: Path, place: str, problem: Any) -> RequestError:
    return RequestError(f"data=filelist: {printable(path)}, {place}: {problem}")
