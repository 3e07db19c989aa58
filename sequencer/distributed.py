"""Several processes, one a device, as torchrun starts them."""

import atexit
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def join(gpu: bool) -> None:
    """Meets the other processes, if there are any, to compute on GPUs or on CPUs."""
    if world_size() == 1 or dist.is_initialized():
        return
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, *_ = next(rendezvous("env://"))
    # torchrun keeps one store for all its restarts: without a name of its own for each, the processes of one would look
    # for those of the one before
    own = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # objects travel through the CPU's backend, gradients through that of their device
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=own, rank=rank(), world_size=world_size())
    atexit.register(dist.destroy_process_group)


def from_first(value: T) -> T:
    """What the first process has for `value`."""
    if world_size() == 1:
        return value
    holder: list[Any] = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def gather(value: T) -> list[T]:
    """What every process has for `value`, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them ask."""
    return any(gather(flag))


def one_by_one(work: Callable[[], T]) -> T:
    """The first process works before the others, so that what it downloads or builds is there for them."""
    if is_first():
        result = work()
    if world_size() > 1:
        dist.barrier()
    return result if is_first() else work()
