"""Exponential moving average of the weights (EMA), kept beside the raw weights."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from timm.utils import ModelEmaV3
from torch import Tensor

from sequencer.evaluation import ClassificationMetrics
from sequencer.training.module import Classifier

CHECKPOINT_KEY = "state_dict_ema"  # timm's name for the slot


class WeightEma(Callback):
    """Updates the average after every update of the weights, validates it on the same batches and saves it.

    Its metrics are logged as `val_ema/loss`, `val_ema/top1` and the like; its weights stand in the checkpoint under
    `state_dict_ema`.
    """

    average: ModelEmaV3  # built in `on_fit_start`, when the model is on its device

    def __init__(self, decay: float, warmup: bool, num_classes: int) -> None:
        """
        Args:
            decay: weight of the old average in an update.
            warmup: whether the decay rises from 0 in the first updates.
            num_classes: number of logits.
        """
        self.decay, self.warmup = decay, warmup
        self.metrics = ClassificationMetrics(num_classes)
        self._restored: dict[str, Tensor] | None = None
        self._updates = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Classifier) -> None:
        self.average = ModelEmaV3(pl_module.model, decay=self.decay, use_warmup=self.warmup)
        self.average.module.requires_grad_(False)
        if self._restored is not None:
            self.average.module.load_state_dict(self._restored)
            self._restored = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Classifier) -> None:
        self._updates = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Classifier, *args: Any) -> None:
        if trainer.global_step > self._updates:  # not in the middle of an accumulation
            self._updates = trainer.global_step
            self.average.update(pl_module.model, step=self._updates)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Classifier) -> None:
        self.metrics.reset(pl_module.device)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Classifier, outputs: Any, batch: Sequence[Tensor], *args: Any
    ) -> None:
        images, labels = batch[:2]
        if not len(labels):  # every image of the batch was unreadable
            return
        with trainer.precision_plugin.forward_context():
            self.metrics.update(self.average.module(images), labels)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Classifier) -> None:
        pl_module.log_metrics("val_ema", self.metrics)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Classifier, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = self.average.module.state_dict()

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Classifier, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint[CHECKPOINT_KEY]
