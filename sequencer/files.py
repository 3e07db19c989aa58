"""Files and folders: written atomically with errors that name the file, checked to be regular, listed once."""

import csv
import errno
import fcntl
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sequencer.printing import first_line

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class WriteError(RuntimeError):
    """A file or folder that could not be written, with the reason in one line."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(path, reason)

    def __str__(self) -> str:
        return f"{self.path} could not be written: {self.reason}"


@contextmanager
def writing(path: Path, *also: type[Exception]) -> Iterator[None]:
    """Converts an error inside the block to a `WriteError` that names `path`.

    Args:
        path: The file or folder that the block writes.
        also: Types of errors, besides OSError, by which the block reports that it cannot write.

    Raises:
        WriteError: The block raised one of these errors.
    """
    failures: tuple[type[Exception], ...] = (OSError, *also)
    try:
        yield
    except WriteError:
        raise
    except failures as error:
        failed = _system_error(error)
        raise WriteError(path, (failed.strerror if failed else None) or first_line(error)) from error


def is_full(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that there is no space left."""
    failed = _system_error(error)
    return failed is not None and failed.errno in NO_SPACE


def _system_error(error: BaseException | None) -> OSError | None:
    """Returns the error of the operating system among an error and its causes, if there is one."""
    while error is not None and not (isinstance(error, OSError) and error.strerror):
        error = error.__cause__
    return error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under a temporary name in the same folder, syncs it to disk and renames it to `path`.

    A reader finds the old file or the new one, never part of either. Where `path` is a link, its target is written.
    The file has the permissions that the umask gives.

    Args:
        path: The file; its folder is created where it does not exist.
        write: Writes the content to the path that it is given.

    Raises:
        WriteError: The file cannot be written, is no regular file, or is being written by another process; an existing
            file is unchanged.
    """
    with writing(path):
        target = Path(os.path.realpath(path))
        if target.exists():
            check_regular(target)  # a renamed file would take the place of a device such as /dev/null
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.partial")
        with open(temporary, "ab") as file:  # kept open for its lock
            _lock(file)
            try:
                write(temporary)
                apply_umask(temporary)
                os.fsync(file.fileno())
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def apply_umask(path: Path) -> None:
    """Gives a file the permissions that a new file in its folder gets; some libraries write for their user alone."""
    probe = path.with_name(f".{path.name}.mode")
    try:
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    if stat.S_IMODE(path.stat().st_mode) != mode:  # some file systems refuse every change
        path.chmod(mode)


def _lock(file: IO[bytes]) -> None:
    """Locks a file until it is closed, unless its file system has no locks.

    Raises:
        OSError: Another process has locked it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError("another process is writing it") from None
    except OSError:
        pass


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file in UTF-8, with lines that end as RFC 4180 has them."""

    def to_file(path: Path) -> None:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)

    write_atomically(path, to_file)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes NumPy arrays as a compressed NPZ file."""
    import numpy as np  # imported here because commands that write none need not wait for it

    def to_file(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)

    write_atomically(path, to_file)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically, with `to_json`."""
    write_atomically(path, lambda temporary: temporary.write_text(to_json(content, indent=2) + "\n"))


def to_json(content: Any, indent: int | None = None) -> str:
    """Encodes dictionaries, sequences, strings and numbers as JSON; a number that is not finite becomes null.

    JSON has no NaN and no infinity, and parsers of other languages refuse what Python writes for them.
    """
    return json.dumps(finite(content), indent=indent, allow_nan=False)


def finite(content: Any) -> Any:
    """Returns a copy of nested dictionaries and sequences in which None replaces numbers that are not finite."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def nearest_existing(path: Path) -> Path:
    """Returns `path` or, if it does not exist, the nearest of its parents that does."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_regular(path: str | Path) -> None:
    """Checks, without opening it, that a path leads to a regular file: reading a FIFO or a device may never end.

    Raises:
        OSError: it leads to something else, or nothing is there.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(f"{'a folder' if stat.S_ISDIR(mode) else 'a device, FIFO or socket'}, no regular file")


def walk_once(folder: str, root: str) -> Iterator[tuple[str, list[str]]]:
    """Walks through a folder and the folders below it, each real folder once, however links lead to it.

    A link to a folder is followed unless it leads into `root`, whose files are found where they lie, or to a folder
    that contains `root`. A folder that cannot be listed is left out, as by `os.walk`.

    Args:
        folder: The folder, `root` or one below it.
        root: The folder that is read as a whole.

    Yields:
        The path of a folder, through the links that lead to it, and the names of its files, both in no order.
    """
    base, real = os.path.realpath(root), os.path.realpath(folder)
    if folder != root and os.path.islink(folder) and _overlap(real, base):
        return
    seen, pending = {real}, [(folder, real)]
    while pending:
        path, real = pending.pop()
        files = []
        for entry in _entries(path):
            if not _is_folder(entry):
                files.append(entry.name)
                continue
            target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            if target not in seen and not (entry.is_symlink() and _overlap(target, base)):
                seen.add(target)
                pending.append((entry.path, target))
        yield path, files


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _overlap(a: str, b: str) -> bool:
    """Whether one of two real folders contains the other, or they are the same."""
    return os.path.commonpath([a, b]) in (a, b)
