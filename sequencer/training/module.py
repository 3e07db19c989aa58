"""What one step does: the model, its loss, its metrics, its optimizer."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sequencer.config.schema import Config
from sequencer.data.mixing import build_mixup
from sequencer.evaluation import ClassificationMetrics
from sequencer.training.loss import Teacher, build_criterion
from sequencer.training.optim import build_optimizer, build_schedule


class Classifier(pl.LightningModule):
    """Trains `model` on `(images B C H W, labels B)`.

    Validation metrics of the weights as they are stand in `self.val_metrics`; the sum of this process's training
    losses in the epoch, and how many images they are of, in `self.train_totals`. Both are read and reset by the epoch
    report.
    """

    def __init__(
        self, model: nn.Module, config: Config, class_names: list[str], teacher: Teacher | None = None
    ) -> None:
        super().__init__()
        self.model, self.config, self.class_names, self.teacher = model, config, class_names, teacher
        self.criterion = build_criterion(config.optim, config.data.augment.smoothing)
        self.mix = build_mixup(config.data.augment, len(class_names))
        self.train_totals = torch.zeros(2, dtype=torch.float64)
        self.window_losses: list[Tensor] = []  # since the last update
        self.val_metrics = ClassificationMetrics(len(class_names))

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        if self.mix is not None:
            images, targets = self.mix(images, targets)  # to soft targets, smoothed
        logits = self(images)
        loss = self.criterion(logits, targets)
        if self.teacher is not None:
            loss = torch.lerp(loss, self.teacher.distance(images, logits), self.config.optim.distill_weight)
        totals = torch.stack([loss.detach() * len(images), loss.new_full((), len(images))])  # no wait for the GPU
        self.train_totals = self.train_totals.to(loss.device) + totals
        self.window_losses.append(loss.detach())
        if self.trainer.progress_bar_callback is not None:  # nobody else reads it, and it takes its time
            self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss * self._share_of_window(batch_idx)

    def _share_of_window(self, batch_idx: int) -> float:
        """Lightning divides by the length of a whole window of accumulation, the last of an epoch may be shorter."""
        window, batches = self.trainer.accumulate_grad_batches, int(self.trainer.num_training_batches)
        last = batches % window
        return window / last if batch_idx >= batches - last else 1.0

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        images, labels, _ = batch
        if len(labels):  # none of the batch may have been readable
            self.val_metrics.update(self(images), labels)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.model, self.config.optim)
        updates = max(int(self.trainer.estimated_stepping_batches), 1)
        updates_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        schedule = build_schedule(optimizer, self.config.optim, updates, updates_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Primitives and tensors only, so that the file loads with `weights_only=True` and stands on its own."""
        checkpoint["config"] = asdict(self.config)
        checkpoint["class_names"] = list(self.class_names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # the schedule is a function of the number of updates and of the configuration, which may now ask for more
        checkpoint["lr_schedulers"] = []


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def compile_in_place(model: nn.Module) -> None:
    """`torch.compile` without a wrapping module, so that no name in the state dict changes."""
    model.compile()
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
