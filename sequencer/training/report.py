"""The metrics of a run: one row per epoch in metrics.csv, the loggers and the log."""

import csv
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from sequencer.config.schema import lower_is_better
from sequencer.files import write_atomically
from sequencer.training.module import Classifier

log = logging.getLogger("sequencer")


class EpochReport(Callback):
    """Collects an epoch's metrics in a row and sends it to metrics.csv, the loggers and the log.

    The rows are saved in checkpoints: a resumed run rewrites the file from them, so that it has one header and each
    epoch once. In a checkpoint epochs count from 0, as in Lightning; everywhere else they count from 1.
    """

    def __init__(self, path: Path, slots: Sequence[str], metrics: Sequence[str], best_metric: str) -> None:
        """
        Args:
            path: the CSV file.
            slots: prefixes of the validation metrics, `val` and, with an average of the weights, `val_ema`.
            metrics: names of the validation metrics.
            best_metric: metric whose best epoch is marked in the log.
        """
        self.path, self.best_metric = path, best_metric
        self.slots, self.metrics = slots, metrics
        self.rows: list[dict[str, float]] = []
        self._images = 0  # trained on in this epoch, by all ranks
        self._elapsed = 0.0  # seconds that a run resumed within this epoch has spent on it before
        self._waited = self._stepped = 0.0  # seconds of this epoch spent waiting for batches, and on training steps
        self._started = self._trained = self._fetched = 0.0

    def state_dict(self) -> dict[str, Any]:
        elapsed = time.perf_counter() - self._started
        times = {"elapsed": elapsed, "waited": self._waited, "stepped": self._stepped}
        return {"rows": self.rows, "images": self._images} | times

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self._images = state_dict["rows"], state_dict["images"]
        self._elapsed = state_dict["elapsed"]
        self._waited, self._stepped = state_dict["waited"], state_dict["stepped"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Classifier) -> None:
        now = time.perf_counter()
        self._started, self._trained = now - self._elapsed, now

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Classifier, *args: Any) -> None:
        self._fetched = time.perf_counter()
        self._waited += self._fetched - self._trained

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Classifier, outputs: Any, batch: Sequence[Tensor], *args: Any
    ) -> None:
        self._images += len(batch[0]) * trainer.world_size
        self._trained = time.perf_counter()
        self._stepped += self._trained - self._fetched

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Classifier) -> None:
        row = self._row(trainer, pl_module)
        self.rows.append(row)
        pl_module.log_dict(_from_one({name: value for name, value in row.items() if name != "step"}))
        if trainer.is_global_zero:
            self.write()
        log.info(self._line(trainer, pl_module))
        self._images, self._waited, self._stepped = 0, 0.0, 0.0
        self._started = self._trained = time.perf_counter()

    def _row(self, trainer: pl.Trainer, pl_module: Classifier) -> dict[str, float]:
        row: dict[str, float] = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": max(group["lr"] for group in trainer.optimizers[0].param_groups),
            **pl_module.take_train_metrics(),
        }
        for name in (f"{slot}/{metric}" for slot in self.slots for metric in self.metrics):
            row[name] = float(trainer.callback_metrics.get(name, math.nan))  # NaN without validation batches
        now = time.perf_counter()
        row["time/epoch_s"] = round(now - self._started, 3)
        row["time/data_s"] = round(self._waited, 3)
        row["time/step_s"] = round(self._stepped, 3)
        row["time/images_per_s"] = round(self._images / max(self._trained - self._started, 1e-9), 1)
        return row

    def write(self) -> None:
        """Writes metrics.csv from the rows, in place of any that is there."""
        write_atomically(self.path, self._write)

    def _write(self, path: Path) -> None:
        with open(path, "w", newline="") as file:
            columns = dict.fromkeys(name for row in self.rows for name in row)  # those of an older version may differ
            writer = csv.DictWriter(file, fieldnames=list(columns))
            writer.writeheader()
            writer.writerows(map(_from_one, self.rows))

    def _line(self, trainer: pl.Trainer, pl_module: Classifier) -> str:
        row = self.rows[-1]
        values = [earlier[self.best_metric] for earlier in self.rows]
        best = min(values) if lower_is_better(self.best_metric) else max(values)
        parts = [
            f"epoch {row['epoch'] + 1:>{len(str(trainer.max_epochs))}}/{trainer.max_epochs}",
            f"train {row['train/loss']:.4f}",
            f"val {row['val/loss']:.4f}",
            f"top-1 {row['val/top1']:.2%}",
            *([f"ema {row['val_ema/top1']:.2%}"] if "val_ema" in self.slots else []),
            *([f"balanced {row['val/balanced']:.2%}"] if pl_module.eval_metrics.unbalanced else []),
            f"{row['time/epoch_s']:.1f} s",
            *(["best"] if values.index(best) == len(values) - 1 else []),
        ]
        return "  ".join(parts)


def _from_one(row: dict[str, float]) -> dict[str, float]:
    """Returns a row in which epochs count from 1."""
    return row | {"epoch": row["epoch"] + 1}
