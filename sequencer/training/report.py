"""What a run says: one row an epoch in metrics.csv, the loggers and the log."""

import csv
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from sequencer.distributed import gather
from sequencer.files import write_atomically
from sequencer.training.ema import WeightEma
from sequencer.training.module import Classifier

log = logging.getLogger("sequencer")


class EpochReport(Callback):
    """Turns the metrics of an epoch into one row, and the row into everything that shows it.

    The rows are part of the checkpoint: a resumed run rewrites the file from them, so that it has one header and
    no epoch twice.
    """

    def __init__(self, path: Path, ema: WeightEma | None, best_metric: str) -> None:
        self.path, self.ema, self.best_metric = path, ema, best_metric
        self.rows: list[dict[str, float]] = []
        self._images = 0
        self._elapsed = 0.0  # seconds of this epoch that a run resumed within it has behind it
        self._started = self._trained = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "images": self._images, "elapsed": time.perf_counter() - self._started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self._images = state_dict["rows"], state_dict["images"]
        self._elapsed = state_dict["elapsed"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Classifier) -> None:
        self._started = self._trained = time.perf_counter() - self._elapsed

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Classifier, outputs: Any, batch: Sequence[Tensor], *args: Any
    ) -> None:
        self._images += len(batch[0]) * trainer.world_size
        self._trained = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Classifier) -> None:
        row = self._row(trainer, pl_module)
        self.rows.append(row)
        pl_module.log_dict({name: value for name, value in row.items() if name not in ("epoch", "step")})
        if trainer.is_global_zero:
            write_atomically(self.path, self._write)
        log.info(self._line(trainer))
        self._images, self._started = 0, time.perf_counter()

    def _row(self, trainer: pl.Trainer, pl_module: Classifier) -> dict[str, float]:
        total, images = (sum(part) for part in zip(*gather(pl_module.train_totals.tolist()), strict=True))
        row: dict[str, float] = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": max(group["lr"] for group in trainer.optimizers[0].param_groups),
            "train/loss": total / images,
        }
        slots = {"val": pl_module.val_metrics} | ({"val_ema": self.ema.metrics} if self.ema else {})
        for slot, metrics in slots.items():
            values = metrics.compute()
            row |= {f"{slot}/{name}": float(values[name]) for name in ("loss", "top1", "top5")}
            metrics.reset()
        pl_module.train_totals.zero_()
        now = time.perf_counter()
        row["time/epoch_s"] = round(now - self._started, 3)
        row["time/images_per_s"] = round(self._images / max(self._trained - self._started, 1e-9), 1)
        return row

    def _write(self, path: Path) -> None:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)

    def _line(self, trainer: pl.Trainer) -> str:
        row = self.rows[-1]
        values = [earlier[self.best_metric] for earlier in self.rows]
        best = min(values) if self.best_metric.endswith("loss") else max(values)
        parts = [
            f"epoch {row['epoch'] + 1:>{len(str(trainer.max_epochs))}}/{trainer.max_epochs}",
            f"train {row['train/loss']:.4f}",
            f"val {row['val/loss']:.4f}",
            f"top-1 {row['val/top1']:.2%}",
            *([f"ema {row['val_ema/top1']:.2%}"] if self.ema else []),
            f"{row['time/epoch_s']:.1f} s",
            *(["best"] if values.index(best) == len(values) - 1 else []),
        ]
        return "  ".join(parts)
