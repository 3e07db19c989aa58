"""The progress bar of a run: one line, which makes room for the lines of the log and vanishes at the end."""

import time
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from sequencer.console import CONSOLE
from sequencer.training.module import Classifier

INTERVAL = 0.2  # s between two updates of the bar; reading the loss may wait for a GPU


class EpochBar(ProgressBar):
    """Shows the epoch, counted from 1, its batches, the time that they still take, and the mean loss so far."""

    def __init__(self) -> None:
        super().__init__()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[loss]}"),
            console=CONSOLE,
            transient=True,
        )
        self._task = self._progress.add_task("", loss="")
        self._updated = 0.0
        self._enabled = True

    def disable(self) -> None:
        """Shows nothing; the Trainer calls it on all ranks but the first."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Classifier) -> None:
        self._start_epoch(trainer)  # of an epoch that is resumed Lightning announces no start
        if self._enabled:
            self._progress.start()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Classifier) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._start_epoch(trainer)

    def _start_epoch(self, trainer: pl.Trainer) -> None:
        description = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._progress.reset(self._task, total=self.total_train_batches, description=description, loss="")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Classifier, outputs: Any, batch: Sequence[Tensor], batch_idx: int
    ) -> None:
        if self._enabled and (self._is_due() or trainer.is_last_batch):
            self._progress.update(self._task, completed=batch_idx + 1, loss=f"loss {pl_module.train_loss:.4f}")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Classifier) -> None:
        self._progress.reset(self._task, total=sum(trainer.num_val_batches), description="validating", loss="")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Classifier, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if self._is_due():
            self._progress.update(self._task, completed=batch_idx + 1)

    def _is_due(self) -> bool:
        now = time.monotonic()
        if now - self._updated < INTERVAL:
            return False
        self._updated = now
        return True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._progress.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._progress.stop()
