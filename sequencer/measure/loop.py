"""What stands between a model and its full speed: Lightning's loop beside a bare one, and the loader."""

import copy
import itertools
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn

from sequencer.config.schema import Config
from sequencer.data import DataModule, MemorySplit
from sequencer.measure.forecast import Clock, without_end
from sequencer.training.launch import training_device
from sequencer.training.optim import build_optimizer, build_schedule
from sequencer.training.setup import build_parts


def measure_loops(config: Config, batches: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of `batches` training steps in a bare loop and in a run of ours, by turns, `rounds` times each after a
    warm-up. The run logs, guards, schedules and saves as any other.

    Args:
        config: of a run on CIFAR-10; its data need not be there.
    """
    with TemporaryDirectory() as folder:
        limits = {"max_epochs": rounds + 1, "limit_train_batches": batches, "limit_val_batches": 1}
        config = without_end(config, Path(folder, "run"), **limits)
        data = _made(config, batches)
        bare, clock = _BareLoop(config, data, batches), Clock()
        parts = build_parts(config, bare, clock, data=data)
        bare.copy(parts.model)
        parts.trainer.fit(parts.module, datamodule=data)
    return {"bare loop": bare.seconds[1:], "Lightning": [sum(steps) for steps in clock.steps[1:]]}


def measure_loader(config: Config, seconds: float) -> tuple[float, float]:
    """Images a second of the training loader alone, and of the model alone in training on one batch again and again,
    for so many seconds each after a warm-up.

    Raises:
        RequestError: as for a run.
    """
    with TemporaryDirectory() as folder:
        parts = build_parts(without_end(config, Path(folder, "run")))
        device = parts.trainer.strategy.root_device
        batches = _endless(parts.data.train_dataloader())
        images, labels = (tensor.to(device) for tensor in next(batches))
        loads = _rate(lambda: next(batches), device, max(2, 2 * config.data.num_workers), seconds)
        batches.close()  # and with it the workers
        model = parts.model.to(device)
        optimizer = build_optimizer(model, config.optim)

        def step() -> None:
            with parts.trainer.precision_plugin.forward_context():
                loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return loads * len(images), _rate(step, device, 3, seconds) * len(images)


def _endless(loader: Any) -> Generator[Any, None, None]:
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)
        yield from loader


def _rate(work: Callable[[], object], device: torch.device, warmup: int, seconds: float) -> float:
    """Calls a second."""
    for _ in range(warmup):
        work()
    start, calls = _now(device), 0
    while (elapsed := _now(device) - start) < seconds:
        work()
        calls += 1
    return calls / elapsed


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _made(config: Config, batches: int) -> DataModule:
    """Serves as many images of noise as `batches` need, of CIFAR-10's shape."""
    number, classes = batches * config.data.batch_size, [str(label) for label in range(10)]
    images = np.random.RandomState(0).randint(256, size=(number, 32, 32, 3), dtype=np.uint8)
    split = MemorySplit(images, np.arange(number) % len(classes), classes, "noise")
    device = training_device(config)
    return DataModule(config.data, config.seed, device=device, splits={"train": split, "val": split})


class _BareLoop(Callback):
    """Takes its turn before every epoch of the Trainer."""

    def __init__(self, config: Config, data: DataModule, batches: int) -> None:
        self.config, self.data, self.batches = config, data, batches
        self.seconds: list[float] = []

    def copy(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.seconds:
            self.model.to(pl_module.device)
            self.optimizer = build_optimizer(self.model, self.config.optim)
            updates = self.batches * trainer.max_epochs  # type: ignore[operator]
            self.schedule = build_schedule(self.optimizer, self.config.optim, updates, self.batches)
            self.loader = self.data.train_dataloader()
        self.seconds.append(self._epoch(pl_module.device, trainer.precision_plugin.forward_context))

    def _epoch(self, device: torch.device, autocast: Callable[[], AbstractContextManager[None]]) -> float:
        start, total = _now(device), torch.zeros((), device=device)
        for number, (images, labels) in enumerate(self.loader):
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with autocast():
                loss = nn.functional.cross_entropy(self.model(images), labels)
            loss.backward()
            if self.config.trainer.gradient_clip_val:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.trainer.gradient_clip_val)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step_update(len(self.seconds) * self.batches + number + 1)
            total += loss.detach()
        return _now(device) - start
