"""Standard streams that cannot end a command: output that nobody reads is dropped.

A pipe whose reader has ended, a terminal that is gone, a full disk behind `> FILE` and a stream that the shell has
closed (`>&-`) all make Python's own streams raise errors, at the latest when it exits.
"""

import io
import os
import select
import sys
from contextlib import suppress
from typing import Any

STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}  # with their file descriptors


def drop_unread_output(*names: str) -> None:
    """Opens the standard streams that are closed and makes those named drop what cannot be written.

    Call it before other files are opened: one of them would get the descriptor of a closed stream and receive what is
    printed. Streams that have been replaced, as by pytest, stay as they are.

    Args:
        names: `stdout`, `stderr` or both.
    """
    for name, descriptor in STREAMS.items():
        if getattr(sys, name) is None:
            _open_null(name, descriptor)
    for name in names:
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _tolerant(stream))


def _open_null(name: str, descriptor: int) -> None:
    """Opens the null device as a stream, and as its descriptor unless a file has got that in the meantime."""
    try:
        os.fstat(descriptor)
        is_free = False
    except OSError:
        is_free = True
    stream = os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w")
    setattr(sys, name, stream)
    if is_free:
        os.dup2(stream.fileno(), descriptor)
        os.set_inheritable(descriptor, True)


def _tolerant(stream: Any) -> io.TextIOWrapper:
    """Returns a text stream with the settings of another one that drops what cannot be written."""
    with suppress(OSError):
        stream.flush()
    raw = _Tolerant(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # type: ignore[type-var]  # raw has all of its methods
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Tolerant(io.FileIO):
    """A file descriptor that writes everything or, after an error, drops the rest."""

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            try:
                written = super().write(rest)
            except OSError:
                break
            if written is None:  # a pipe that some process has set to non-blocking is full
                select.select([], [self], [])
            else:
                rest = rest[written:]
        return size
