"""The LightningModule: a model with its loss, metrics, optimizer and learning-rate schedule."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from sequencer import distributed
from sequencer.config.schema import Config
from sequencer.data.mixing import build_mixup
from sequencer.evaluation import ClassificationMetrics, metric_names
from sequencer.training.loss import Teacher, build_criterion
from sequencer.training.optim import build_optimizer, build_schedule

TOTALS_KEY = "train_totals"  # in a checkpoint: what every rank has summed up in the running epoch
# what is summed up: losses and hits of the images, their number, gradient norms of the updates, their number
LOSS, HITS, IMAGES, NORM, UPDATES = range(5)


class Classifier(pl.LightningModule):
    """Trains and evaluates a model on batches of images `B C H W` and labels `B`.

    It works in any `Trainer`, with or without the callbacks of this package: evaluation also takes batches with a
    third entry, such as the images' indices, and logs `val/loss`, `val/top1` and the like (or `test/...`) at the end.
    Metrics are means over images and over all ranks, also where batches differ in size.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        class_names: list[str],
        teacher: Teacher | None = None,
        log_to_loggers: bool = True,
    ) -> None:
        """
        Args:
            model: gives logits `B K`.
            config: its sections `data.augment` and `optim` are used.
            class_names: names of the K classes, saved in checkpoints.
            teacher: model to learn from, see `optim.distill_from`.
            log_to_loggers: whether metrics go to the Trainer's loggers; False where a callback sends them.
        """
        super().__init__()
        self.model, self.config, self.class_names, self.teacher = model, config, class_names, teacher
        self._to_loggers = None if log_to_loggers else False  # Lightning warns of True where there are no loggers
        self.criterion = build_criterion(config.optim, config.data.augment.smoothing)
        self.mix = build_mixup(config.data.augment, len(class_names))
        self.eval_metrics = ClassificationMetrics(len(class_names))  # of the evaluation that is running or was the last
        self._train_totals = torch.zeros(5, dtype=torch.float64)
        self._window_losses: list[Tensor] = []
        self._scheduled_lr = self.lr

    @property
    def lr(self) -> float:
        """Peak learning rate, which Lightning's `LearningRateFinder` sets."""
        return self.config.optim.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.config = replace(self.config, optim=replace(self.config.optim, lr=value))

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        return self.model(images)

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)

    def on_train_start(self) -> None:
        if self.lr != self._scheduled_lr:  # LearningRateFinder sets it after the optimizer is built
            self.trainer.strategy.setup_optimizers(self.trainer)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        if self.mix is not None:
            images, targets = self.mix(images, targets)  # to soft targets, smoothed
        if sizes := self.config.data.augment.sizes:
            images = reduce(images, training_size(sizes, self.current_epoch, self.trainer.max_epochs or 1))
        logits = self(images)
        loss = self.criterion(logits, targets)
        if self.teacher is not None:
            loss = torch.lerp(loss, self.teacher.distance(images, logits), self.config.optim.distill_weight)
        wanted = targets if targets.ndim == 1 else targets.argmax(dim=1)  # of a mixed image, the larger share
        hits = (logits.detach().argmax(dim=1) == wanted).sum()
        totals = torch.stack([loss.detach() * len(images), hits, loss.new_full((), len(images))])  # no synchronisation
        self._train_totals = self._train_totals.to(loss.device)
        self._train_totals[: len(totals)] += totals
        self._window_losses.append(loss.detach())
        return loss * self._share_of_window(batch_idx)

    def _share_of_window(self, batch_idx: int) -> float:
        """Factor of the loss in the epoch's last accumulation window, which may be shorter than the others.

        Lightning divides every loss by `accumulate_grad_batches`.
        """
        window, batches = self.trainer.accumulate_grad_batches, int(self.trainer.num_training_batches)
        last = batches % window
        return window / last if batch_idx >= batches - last else 1.0

    def take_window_losses(self) -> list[float]:
        """Returns the losses of this rank's batches since the last update, and resets them.

        Call it in `on_before_optimizer_step`, after which they are reset in any case.
        """
        losses = torch.stack(self._window_losses).tolist()
        self._window_losses.clear()
        return losses

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._window_losses.clear()  # comes after the callbacks' hooks

    @property
    def train_loss(self) -> float:
        """Mean training loss per image of the running epoch so far, on this rank; reading it synchronises a GPU."""
        totals = self._train_totals.tolist()
        return totals[LOSS] / totals[IMAGES]

    def add_gradient_norm(self, norm: float) -> None:
        """Adds the norm of an update's gradient, before clipping, to the means of the epoch."""
        self._train_totals[NORM] += norm
        self._train_totals[UPDATES] += 1

    def take_train_metrics(self) -> dict[str, float]:
        """Returns means of the epoch over all ranks, and resets their sums.

        Call it on every rank, in `on_train_epoch_end`. If no callback does, they are logged.

        Returns:
            `train/loss` and `train/top1` per image, as augmented and mixed (of a mixed image the class with the larger
            share counts), and `train/grad_norm` per update, NaN if no norm was added.
        """
        sums = [sum(part) for part in zip(*distributed.gather(self._train_totals.tolist()), strict=True)]
        self._train_totals.zero_()
        norm = sums[NORM] / sums[UPDATES] if sums[UPDATES] else math.nan
        return {
            "train/loss": sums[LOSS] / sums[IMAGES],
            "train/top1": sums[HITS] / sums[IMAGES],
            "train/grad_norm": norm,
        }

    def on_train_epoch_end(self) -> None:
        if self._train_totals[IMAGES] > 0:  # comes after the callbacks' hooks, and none has taken them
            found = {name: value for name, value in self.take_train_metrics().items() if math.isfinite(value)}
            self.log_dict(found, logger=self._to_loggers)

    def on_validation_epoch_start(self) -> None:
        self.eval_metrics.reset(self.device)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        images, labels = batch[:2]
        if len(labels):  # every image of the batch may have been unreadable
            self.eval_metrics.update(self(images), labels)

    def on_validation_epoch_end(self) -> None:
        self.log_metrics("val", self.eval_metrics)

    def on_test_epoch_start(self) -> None:
        self.eval_metrics.reset(self.device)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.log_metrics("test", self.eval_metrics)

    def log_metrics(self, prefix: str, metrics: ClassificationMetrics) -> None:
        """Merges the metrics of all ranks and logs those of `metric_names`, as `prefix/loss` and so on."""
        metrics.merge_processes()
        values = metrics.compute()
        named = {f"{prefix}/{name}": values[name] for name in metric_names(metrics.num_classes)}
        self.log_dict(named, logger=self._to_loggers, batch_size=1)

    def predict_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> Float[Tensor, "B K"]:
        """Class probabilities of a batch of images, alone or followed by labels."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).softmax(dim=1)

    def configure_optimizers(self) -> dict[str, Any]:
        """Builds the optimizer and the schedule with the peak learning rate `self.lr`.

        Raises:
            MisconfigurationException: the number of updates is not known.
        """
        optimizer = build_optimizer(self.model, self.config.optim)
        updates, batches = self.trainer.estimated_stepping_batches, self.trainer.num_training_batches
        if math.isinf(updates) or math.isinf(batches):
            raise MisconfigurationException(
                "the learning-rate schedule needs the number of updates: give the Trainer max_epochs, and a training "
                "loader that has a length"
            )
        updates_per_epoch = math.ceil(batches / self.trainer.accumulate_grad_batches)
        schedule = build_schedule(optimizer, self.config.optim, max(int(updates), 1), updates_per_epoch)
        self._scheduled_lr = self.lr
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if isinstance(scheduler, Scheduler):
            scheduler.step_update(self.trainer.global_step)
        else:  # LearningRateFinder's own
            super().lr_scheduler_step(scheduler, metric)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds plain values only, so that the file loads with `weights_only=True`, and without this package."""
        checkpoint["config"] = asdict(self.config)
        checkpoint["class_names"] = list(self.class_names)
        checkpoint["teacher"] = None if self.teacher is None else self.teacher.fingerprint
        checkpoint[TOTALS_KEY] = distributed.gather(self._train_totals.tolist())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.lr = checkpoint["config"]["optim"]["lr"]
        # the schedule is a function of the number of updates and of the configuration, which may ask for more epochs
        checkpoint["lr_schedulers"] = []
        ranks = checkpoint.get(TOTALS_KEY, [[0.0] * len(self._train_totals)])
        totals = [sum(part) for part in zip(*ranks, strict=True)]
        if len(ranks) == distributed.world_size():
            totals = ranks[distributed.rank()]
        elif not distributed.is_first():  # another number of ranks than before: rank 0 takes the sums of all
            totals = [0.0] * len(self._train_totals)
        self._train_totals = torch.tensor(totals, dtype=torch.float64)


def size_phases(sizes: Sequence[int], epochs: int) -> list[tuple[int, int, int]]:
    """Returns each size of the training images with its first epoch, counted from 0, and the first one after it.

    The last epoch has the last size; where there are fewer epochs than sizes, some sizes have none. See
    `data.augment.sizes`.
    """
    bounds = [part * epochs // len(sizes) for part in range(len(sizes) + 1)]
    return list(zip(sizes, bounds[:-1], bounds[1:], strict=True))


def training_size(sizes: Sequence[int], epoch: int, epochs: int) -> int:
    """Returns the size of the training images of an epoch, counted from 0."""
    return [size for size, first, _ in size_phases(sizes, epochs) if first <= epoch][-1]


def reduce(images: Float[Tensor, "B C H W"], size: int) -> Float[Tensor, "B C S S"]:
    """Reduces images to `size` pixels by bilinear interpolation with antialiasing, as PIL does."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def parameters_of(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def compile_in_place(model: nn.Module) -> None:
    """Compiles a model by `torch.compile` without a wrapping module, so that the names in its state dict stay."""
    model.compile()
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
