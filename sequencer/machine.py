"""Time, memory and description of the machine."""

import ctypes
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

from sequencer.processor import processor_name


def now(device: torch.device) -> float:
    """Seconds of a monotonic clock, read after the work queued on a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes."""
    start = now(device)
    work()
    return now(device) - start


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `work` holds at its peak in addition to what is held before; None if the system does not report it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if platform.system() != "Linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # memory that malloc keeps for reuse would hide new allocations
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return None
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """A size from /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The device, the CPU's instruction set, cores and threads, and the versions of torch, timm and Python."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def describe_device(device: torch.device) -> str:
    """The GPU, or the CPU with its instruction set and cores, in one line."""
    about = describe_machine(device)
    return about["device"] if device.type == "cuda" else "{device}, {instructions}, {cores} cores".format(**about)
