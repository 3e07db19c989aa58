"""The processor of this machine."""

import functools
import platform
from pathlib import Path


@functools.cache
def _lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # only Linux has this file
        return []


def processor_flags() -> frozenset[str]:
    """Returns the names of the instruction sets, as Linux lists them."""
    lines = (line for line in _lines() if line.startswith("flags"))
    return frozenset(next(lines, ":").split(":", 1)[1].split())


def processor_name() -> str:
    """Returns the name of the model."""
    names = (line.split(":", 1)[1].strip() for line in _lines() if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
