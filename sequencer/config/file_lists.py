"""The type and the columns of a list of image files, checked before torch is imported."""

import csv
from contextlib import suppress
from pathlib import Path

from sequencer.config.errors import RequestError
from sequencer.config.schema import DataConfig
from sequencer.files import check_regular
from sequencer.printing import printable

DEFAULT_SPLIT_COLUMN = "split"  # the only column that may be named and missing
SUFFIXES = (".csv", ".parquet")


def check_list(config: DataConfig, root: str) -> None:
    """Checks that `data.root` is a file with the suffix of a list, and of a CSV file that it has the columns.

    Args:
        config: The data set.
        root: The argument that names `data.root`, for the message.

    Raises:
        RequestError: It is a folder, has another suffix, or lacks a column.
    """
    path = Path(config.root).expanduser()
    if path.is_dir():
        raise RequestError(
            f"data=filelist: {printable(path)} is a folder\n"
            f"{root} must name a CSV or Parquet file with a column of paths and a column of labels"
        )
    check_suffix(path)
    if path.suffix.lower() == ".csv":
        header = None
        with suppress(OSError, csv.Error):  # which the reader of the whole list reports
            check_regular(path)
            with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                header = next(csv.reader(file, strict=True), [])
        if header is not None:
            find_columns(path, header, columns(config))


def check_suffix(path: Path) -> None:
    """Checks that the name of a list ends with one of `SUFFIXES`.

    Raises:
        RequestError: It does not.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(f"data=filelist: {printable(path)} ends neither with .csv nor with .parquet")


def columns(config: DataConfig) -> tuple[str, str, str | None]:
    """Returns the names of the columns of path, label and split."""
    return config.path_column, config.label_column, config.split_column


def find_columns(path: Path, header: list[str], columns: tuple[str, str, str | None]) -> list[int]:
    """Returns the places of the columns of path, label and, if there is one, split.

    Raises:
        RequestError: A column is missing.
    """
    keys = ("data.path_column", "data.label_column", "data.split_column")
    found = []
    for key, name in zip(keys, columns, strict=True):
        if name in header:
            found.append(header.index(name))
        elif name is not None and (key != keys[2] or name != DEFAULT_SPLIT_COLUMN):
            has = f"it has {', '.join(map(printable, header))}" if header else "it is empty"
            raise RequestError(
                f"data=filelist: {printable(path)} has no column {name!r}; {has}\nset {key}=NAME to one that it has"
            )
    return found
