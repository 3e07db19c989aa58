"""Detection of divergence before an update is applied: a loss or gradient that is not finite, or a large loss."""

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch.nn.utils import get_total_norm

from sequencer import distributed
from sequencer.config.errors import SharedError
from sequencer.data import DataModule
from sequencer.files import write_json
from sequencer.training.checkpoints import keep
from sequencer.training.module import Classifier

RECORD = "divergence.json"
BEFORE = "before_divergence.ckpt"  # the checkpoint that scripts/replay.py starts from


class Diverged(SharedError):
    """Training has diverged, and the update was not applied; raised identically on every rank.

    `record` is the content of the run's divergence.json.
    """

    def __init__(self, record: dict[str, Any], run_dir: Path) -> None:
        self.record = record
        super().__init__(
            f"epoch {record['epoch'] + 1}, batch {record['batches'][-1]['batch'] + 1}: {record['reason']}; the update "
            f"was not applied and {run_dir / RECORD} has the details\n"
            f"repeat it with: python scripts/replay.py {run_dir}"
        )


class DivergenceGuard(Callback):
    """Checks the losses and the gradient of every update before it is applied, and raises `Diverged`.

    A float16 gradient may overflow, which the gradient scaler handles: in this precision only the loss is checked.
    """

    def __init__(self, run_dir: Path, max_loss: float, data: DataModule) -> None:
        """
        Args:
            run_dir: folder that divergence.json is written to.
            max_loss: a larger training loss counts as divergence.
            data: names the images of a batch.
        """
        self.run_dir, self.max_loss, self.data = run_dir, max_loss, data
        self._batch = 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Classifier, batch: Any, batch_idx: int) -> None:
        self._batch = batch_idx

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: Classifier, optimizer: torch.optim.Optimizer
    ) -> None:
        # the norm first: its kernels are queued while a GPU is still busy with the backward pass
        norm = float(get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None]))
        losses = pl_module.take_window_losses()
        reason = self._reason(losses, norm, str(trainer.precision))
        reasons = [found for found in distributed.gather(reason) if found]
        if reasons:
            raise Diverged(self._record(trainer, pl_module, reasons[0], losses, norm), self.run_dir)
        if math.isfinite(norm):
            pl_module.add_gradient_norm(norm)

    def _reason(self, losses: list[float], norm: float, precision: str) -> str | None:
        for loss in losses:
            if not math.isfinite(loss):
                return f"the training loss is {loss}"
            if loss > self.max_loss:
                return f"the training loss is {loss:.4g}, above trainer.max_loss={self.max_loss:g}"
        if not math.isfinite(norm) and precision != "16-mixed":
            return f"the norm of the gradient is {norm}"
        return None

    def _record(
        self, trainer: pl.Trainer, pl_module: Classifier, reason: str, losses: list[float], norm: float
    ) -> dict[str, Any]:
        first = self._batch + 1 - len(losses)
        record = {
            "reason": reason,
            "epoch": trainer.current_epoch,
            "update": trainer.global_step + 1,
            "reshuffles": self.data.state_dict()["reshuffles"],
            "batches": [
                {"batch": batch, "loss": loss, "images": self.data.images_of(trainer.current_epoch, batch)}
                for batch, loss in enumerate(losses, start=first)
            ],
            "gradient_norm": norm,
            "weight_norm": float(get_total_norm([p.detach() for p in pl_module.parameters()])),
            "lr": [group["lr"] for group in trainer.optimizers[0].param_groups],
            "seed": pl_module.config.seed,
            "command": f"python scripts/replay.py {self.run_dir}",
        }
        if distributed.is_first():
            folder = self.run_dir / "checkpoints"
            (folder / BEFORE).unlink(missing_ok=True)
            keep(folder / "last.ckpt", folder / BEFORE)
            write_json(self.run_dir / RECORD, record)
        return record
