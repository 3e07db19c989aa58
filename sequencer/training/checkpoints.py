"""`checkpoints/last.ckpt` and `checkpoints/best.ckpt` of a run."""

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from sequencer.training.files import write_atomically
from sequencer.training.random_state import get_random_state, set_random_state

STATE_KEY = "random_state"


class RunCheckpoints(Checkpoint):
    """Saves after every epoch, with the best value so far and all random states.

    A run resumed from a checkpoint goes on as the interrupted one would have; its best never gets worse.
    Derived from Lightning's `Checkpoint` so that it comes last among the callbacks, when the epoch's metrics stand.
    """

    def __init__(self, folder: Path, best_metric: str) -> None:
        self.folder, self.best_metric = folder, best_metric
        self.sign = -1.0 if best_metric.endswith("loss") else 1.0
        self.best_value: float | None = None
        self.best_epoch: int | None = None
        self._random_state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value, self.best_epoch = state_dict["best_value"], state_dict["best_epoch"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = float(trainer.callback_metrics[self.best_metric])
        best = self.best_value
        # NaN compares false, so it replaces nothing; a first epoch of NaN still leaves a checkpoint
        improved = best is None or math.isnan(best) or self.sign * value > self.sign * best
        if improved:
            self.best_value, self.best_epoch = value, trainer.current_epoch
        write_atomically(self.folder / "last.ckpt", trainer.save_checkpoint)
        if improved:
            write_atomically(self.folder / "best.ckpt", trainer.save_checkpoint)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[STATE_KEY] = get_random_state()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._random_state = checkpoint[STATE_KEY]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None
