"""Files and folders: writing files atomically, refusing what is no regular file, and following links once."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under a temporary name in the same folder, syncs it to disk and renames it to `path`.

    Args:
        path: the file; its folder is created where it does not exist.
        write: writes the content to the path that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
