"""The folder in which what was built or measured for this machine is kept, and the processor that it is for."""

import functools
import hashlib
import os
import platform
from pathlib import Path


def cache_folder() -> Path:
    """Returns the folder, which need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sequencer"


def digest(*parts: str) -> str:
    """Returns a part of a file's name that identifies `parts`."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _processor_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def processor_flags() -> frozenset[str]:
    """Returns the names of the processor's instruction sets, as Linux lists them."""
    lines = (line for line in _processor_lines() if line.startswith("flags"))
    return frozenset(next(lines, ":").split(":", 1)[1].split())


def processor_name() -> str:
    """Returns the model of the processor."""
    names = [line.split(":", 1)[1].strip() for line in _processor_lines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
