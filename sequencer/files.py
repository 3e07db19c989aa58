"""Writing files: atomically, with errors that name the file, and JSON that every parser accepts."""

import errno
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class WriteError(RuntimeError):
    """A file that could not be written; the message is one line, which names the file and the reason."""


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
        reason = failed.strerror if failed else (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WriteError(f"{path} could not be written: {reason}") from error


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

    A reader finds the old file or the new one, never part of either.

    Args:
        path: The file; its folder is created where it does not exist.
        write: Writes the content to the path that it is given.

    Raises:
        WriteError: The file cannot be written; an existing file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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
