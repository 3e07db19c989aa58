"""Starting the ranks of a run, one per device, by torchrun."""

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy

from sequencer.config.errors import RequestError
from sequencer.config.schema import Config
from sequencer.distributed import world_size


def launch(config: Config, environment: Mapping[str, str] | None = None) -> None:
    """Starts this command again under torchrun where the run wants several devices and was started without it.

    Args:
        config: The run.
        environment: Variables that are added for the ranks.

    Raises:
        RequestError: `trainer.devices` is no number of devices, or does not divide `data.batch_size`; this command does
            not run on `trainer.num_nodes` machines; or it is no script.
    """
    _check_machines(config)
    if "RANK" not in os.environ:
        devices = _devices(config)
        if devices > 1:
            _check_batch(config, devices)
            if not hasattr(sys.modules["__main__"], "__file__"):
                raise RequestError(
                    f"trainer.devices={config.trainer.devices} starts this script again for each device, and a "
                    "notebook or a prompt is no script: use train.py, or trainer.devices=1"
                )
            command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}", *sys.argv]
            os.execve(sys.executable, [sys.executable, *command], os.environ | (environment or {}))
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
    """Whether the run trains on a GPU."""
    return config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def training_device(config: Config) -> torch.device:
    """The device that this rank trains on."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if uses_gpu(config) else torch.device("cpu")


def _check_machines(config: Config) -> None:
    """Checks that torchrun has started this command on `trainer.num_nodes` machines; 1 leaves it to torchrun."""
    wanted = config.trainer.num_nodes
    started = world_size() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if wanted not in (1, started):
        raise RequestError(
            f"trainer.num_nodes={wanted}, but this command runs on {started}: start torchrun on every machine\n"
            f"torchrun --nnodes={wanted} --node-rank=N --nproc-per-node=DEVICES --master-addr=HOST --master-port=29500 "
            "train.py ..., or sbatch scripts/slurm.sh RUN_DIR ..."
        )


def _check_batch(config: Config, devices: int) -> None:
    if config.data.batch_size % devices:
        raise RequestError(
            f"data.batch_size={config.data.batch_size} cannot be shared evenly by {devices} devices: it counts the "
            "images of all of them"
        )


class Ddp(DDPStrategy):
    """DDP that validates the bare module: DDP's wrapper would synchronise the ranks at every batch.

    Ranks may have different numbers of validation batches, since evaluation does not pad its shards.
    """

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            module = self.lightning_module
            assert module is not None
            return module.validation_step(*args, **kwargs)


def trainer_settings(config: Config) -> dict[str, Any]:
    """Returns the Trainer's arguments for the ranks that torchrun has started."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    strategy = Ddp() if config.trainer.strategy in ("auto", "ddp") else config.trainer.strategy
    return {"devices": local, "num_nodes": world_size() // local, "strategy": strategy}
