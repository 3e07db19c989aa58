"""Short runs that are timed: their configuration and a clock."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from sequencer.config.schema import Config
from sequencer.machine import now


def without_end(config: Config, run_dir: Path, **trainer: Any) -> Config:
    """The configuration of a silent run in `run_dir` that nothing ends early, on images of the full size.

    Args:
        config: The run to imitate.
        run_dir: Folder of the new run.
        trainer: Keys of the trainer section with new values, e.g. the number of epochs and batches.
    """
    ends = {"max_steps": -1, "early_stopping_patience": None, "max_loss": math.inf, "enable_progress_bar": False}
    section = dataclasses.replace(config.trainer, **ends | trainer)
    augment = dataclasses.replace(config.data.augment, sizes=None)
    data = dataclasses.replace(config.data, augment=augment)
    return dataclasses.replace(config, run_dir=str(run_dir), data=data, trainer=section)


class Clock(Callback):
    """Times every training batch, every validation and the start of every epoch of a run.

    Attributes:
        epochs: Time at the start of every epoch, in seconds of a monotonic clock.
        steps: Seconds of every training batch, by epoch.
        validations: Seconds of every validation.
    """

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.steps: list[list[float]] = []
        self.validations: list[float] = []
        self._last = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lap(trainer)
        self.epochs.append(self._last)
        self.steps.append([])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.steps[-1].append(self._lap(trainer))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lap(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validations.append(self._lap(trainer))

    def _lap(self, trainer: pl.Trainer) -> float:
        """Seconds since the previous lap."""
        before, self._last = self._last, now(trainer.strategy.root_device)
        return self._last - before
