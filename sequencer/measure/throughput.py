"""Throughput of a run: the Trainer's loop compared with a bare one, and the loader compared with the model."""

import copy
import itertools
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
from sequencer.machine import now
from sequencer.measure.short_run import Clock, without_end
from sequencer.training.launch import training_device
from sequencer.training.optim import build_optimizer, build_schedule
from sequencer.training.setup import build_parts


def measure_loops(config: Config, batches: int, rounds: int) -> dict[str, list[float]]:
    """Times a bare training loop and a run of ours in turns, epoch by epoch.

    The run logs, checks for divergence, schedules and saves as any other run.

    Args:
        config: A run on CIFAR-10. Its images are replaced by noise.
        batches: Training batches per epoch.
        rounds: Epochs of each, after an epoch of warm-up.

    Returns:
        Seconds of every epoch, under `bare loop` and `Lightning`.
    """
    with TemporaryDirectory() as folder:
        limits = {"max_epochs": rounds + 1, "limit_train_batches": batches, "limit_val_batches": 1}
        config = without_end(config, Path(folder, "run"), **limits)
        data = _noise_data(config, batches)
        bare, clock = _BareLoop(config, data, batches), Clock()
        parts = build_parts(config, bare, clock, data=data)
        bare.copy(parts.model)
        parts.trainer.fit(parts.module, datamodule=data)
    return {"bare loop": bare.seconds[1:], "Lightning": [sum(steps) for steps in clock.steps[1:]]}


def measure_loader(config: Config, seconds: float) -> tuple[float, float]:
    """Measures the training loader alone, and the model alone while it trains on one batch.

    Args:
        config: The run.
        seconds: How long each is measured, after a warm-up.

    Returns:
        Images per second of the loader and of the model.

    Raises:
        RequestError: As for a run.
    """
    with TemporaryDirectory() as folder:
        parts = build_parts(without_end(config, Path(folder, "run")))
        device = parts.trainer.strategy.root_device
        batches = _endless(parts.data.train_dataloader())
        images, labels = (tensor.to(device) for tensor in next(batches))
        loads = _rate(lambda: next(batches), device, max(2, 2 * config.data.num_workers), seconds)
        batches.close()  # ends the workers
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
    """Yields the batches of epoch after epoch."""
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)
        yield from loader


def _rate(work: Callable[[], object], device: torch.device, warmup: int, seconds: float) -> float:
    """Calls of `work` per second, measured for `seconds` after `warmup` calls."""
    for _ in range(warmup):
        work()
    start, calls = now(device), 0
    while (elapsed := now(device) - start) < seconds:
        work()
        calls += 1
    return calls / elapsed


def _noise_data(config: Config, batches: int) -> DataModule:
    """Noise in the shape of CIFAR-10's images for `batches` batches; training and validation split are the same."""
    number, classes = batches * config.data.batch_size, [str(label) for label in range(10)]
    images = np.random.RandomState(0).randint(256, size=(number, 32, 32, 3), dtype=np.uint8)
    split = MemorySplit(images, np.arange(number) % len(classes), classes, "noise")
    device = training_device(config)
    return DataModule(config.data, config.seed, device=device, splits={"train": split, "val": split})


class _BareLoop(Callback):
    """A training loop without the Trainer, which runs an epoch before every epoch of the Trainer.

    Attributes:
        seconds: Seconds of every epoch.
    """

    def __init__(self, config: Config, data: DataModule, batches: int) -> None:
        self.config, self.data, self.batches = config, data, batches
        self.seconds: list[float] = []

    def copy(self, model: nn.Module) -> None:
        """Trains a copy of `model`."""
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
        start, total = now(device), torch.zeros((), device=device)
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
        return now(device) - start
