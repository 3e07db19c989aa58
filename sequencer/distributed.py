"""Collective operations of the ranks of a run, one device each, as torchrun starts them; trivial for a single rank."""

import atexit
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")
_alone = False  # whether the other ranks have ended


def rank() -> int:
    """Rank of this process: that of its process group or, before there is one, of the environment."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of ranks: that of the process group or, before there is one, of the environment."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def go_alone() -> None:
    """Ends this process, unless it is rank 0, whose collective operations are trivial from now on."""
    global _alone
    if not is_first():
        os._exit(0)
    _alone = True


def is_alone() -> bool:
    """Whether this rank has no other to communicate with."""
    return _alone or world_size() == 1


def is_first() -> bool:
    """Whether this is rank 0, which writes the files and prints."""
    return rank() == 0


def join(gpu: bool) -> None:
    """Initializes the process group, if there are several ranks, for computation on GPUs or on CPUs."""
    if world_size() == 1 or dist.is_initialized():
        return
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, *_ = next(rendezvous("env://"))
    # torchrun keeps one store over all restarts; without a prefix for each, restarted ranks would read the keys of
    # those before them
    own = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # Python objects are sent through gloo, gradients through the backend of their device
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=own, rank=rank(), world_size=world_size())
    atexit.register(dist.destroy_process_group)


def from_first(value: T) -> T:
    """Broadcasts the value of rank 0."""
    if is_alone():
        return value
    holder: list[Any] = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def on_first(work: Callable[[], T]) -> T:
    """Calls `work` on rank 0 and broadcasts what it returns, or raises its exception on every rank."""
    result: tuple[Any, Exception | None] = (None, None)
    if is_first():
        try:
            result = (work(), None)
        except Exception as error:
            result = (None, error)
    value, raised = from_first(result)
    if raised is not None:
        raise raised
    return value


def gather(value: T) -> list[T]:
    """Gathers the values of all ranks on every rank, in the order of ranks."""
    if is_alone():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def one_by_one(work: Callable[[], T]) -> T:
    """Calls `work` on rank 0 and then on the others, so that they find what it downloads or builds."""
    if is_first():
        result = work()
    if not is_alone():
        dist.barrier()
    return result if is_first() else work()
