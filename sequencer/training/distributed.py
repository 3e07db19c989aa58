"""Several processes, one a device, as torchrun starts them: one request, one folder, one result."""

import atexit
import os
import sys
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch.distributed.rendezvous import rendezvous

from conf.errors import RequestError
from conf.schema import Config

T = TypeVar("T")


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def launch(config: Config) -> None:
    """Starts this command anew under torchrun where the run is to have several devices and one process.

    Raises:
        RequestError: the batches cannot be shared evenly, or torchrun was started with another number of processes.
    """
    if "RANK" not in os.environ:
        devices = _devices(config)
        if devices > 1:
            _check_batch(config, devices)
            command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}", *sys.argv]
            os.execv(sys.executable, [sys.executable, *command])
        return
    _check_batch(config, world_size())


def _devices(config: Config) -> int:
    devices = str(config.trainer.devices)
    if devices in ("auto", "-1"):
        return torch.cuda.device_count() if uses_gpu(config) else 1
    if not devices.isdecimal() or int(devices) == 0:
        raise RequestError(
            f"trainer.devices={devices}: it is a number or auto; CUDA_VISIBLE_DEVICES chooses among GPUs"
        )
    return int(devices)


def uses_gpu(config: Config) -> bool:
    return config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def _check_batch(config: Config, processes: int) -> None:
    if config.data.batch_size % processes:
        raise RequestError(
            f"data.batch_size={config.data.batch_size} cannot be shared evenly by {processes} devices: it counts the "
            "images of all of them"
        )


def join(config: Config) -> None:
    """Meets the other processes, if there are any."""
    if world_size() == 1 or dist.is_initialized():
        return
    gpu = uses_gpu(config)
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


class Ddp(DDPStrategy):
    """Lightning's, but for validation without the wrapper, which would have the processes meet at every batch."""

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            module = self.lightning_module
            assert module is not None
            return module.validation_step(*args, **kwargs)


def trainer_settings(config: Config) -> dict[str, Any]:
    """The Trainer's arguments for what torchrun has started."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    strategy = Ddp() if config.trainer.strategy in ("auto", "ddp") else config.trainer.strategy
    return {"devices": local, "num_nodes": world_size() // local, "strategy": strategy}


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


def one_by_one(work: Any) -> Any:
    """The first process works before the others, so that what it downloads or builds is there for them."""
    if is_first():
        result = work()
    if world_size() > 1:
        dist.barrier()
    return result if is_first() else work()
