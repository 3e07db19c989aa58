"""What a plan may take: time, by a deadline that also ends waits, and the memory that is free."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch

from sequencer import distributed

GROUP = Path("/sys/fs/cgroup")
GROUP_FILES = (  # limit and use, in versions 2 and 1 of control groups
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
SLACK = 1.0  # s between the deadlines of two ranks, at most
AGAIN = 5.0  # s after which the deadline is enforced again, if a library has swallowed the error


class OutOfTime(BaseException):
    """The deadline has passed; no Exception, so that no library takes it for one of its own errors."""


@contextmanager
def until(deadline: float) -> Iterator[None]:
    """Ends the block at a deadline, whether it computes or waits for a disk or a network.

    A single operation of torch is not interrupted. Outside of the main thread there is no deadline.

    Args:
        deadline: In seconds of `time.monotonic`.

    Raises:
        OutOfTime: The deadline has passed.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 1e-3), AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def together_until(deadline: float) -> Iterator[None]:
    """Ends a block in which ranks communicate at a deadline, as `until`; rank 0 then goes on alone.

    Ranks that are interrupted at different points cannot communicate any more. The others end with exit code 0, also
    where they wait for rank 0 in an operation of torch, which fails as soon as rank 0 has ended.

    Args:
        deadline: In seconds of `time.monotonic`, and on every rank at about the same time.

    Raises:
        OutOfTime: The deadline has passed, on rank 0.
    """
    try:
        with until(deadline):
            yield
    except (OutOfTime, Exception) as error:
        late = isinstance(error, OutOfTime) or time.monotonic() > deadline - SLACK
        if distributed.world_size() == 1 or not late:
            raise
        distributed.go_alone()
        raise OutOfTime from None


def available_memory(device: torch.device) -> int:
    """Bytes that are free: on a GPU, otherwise in the machine or under the limit of this process's control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [_meminfo("MemAvailable")] if Path("/proc/meminfo").exists() else []
    for limit, used in GROUP_FILES:
        with suppress(OSError, ValueError):  # another system, or `max` for no limit
            found.append(int((GROUP / limit).read_text()) - int((GROUP / used).read_text()))
    return max(min(found, default=1 << 62), 0)


def _meminfo(key: str) -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
