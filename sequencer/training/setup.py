"""The components of a run, built from its configuration and checked against each other."""

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping
from pytorch_lightning.plugins.environments import LightningEnvironment
from torch import Tensor, nn

from sequencer import distributed
from sequencer.config.errors import RequestError
from sequencer.config.request import describe_differences
from sequencer.config.schema import Config, lightning_settings, lower_is_better
from sequencer.data import DataModule, Split
from sequencer.data.seeding import own_random_states
from sequencer.data.split import SplitName
from sequencer.evaluation import metric_names
from sequencer.layers import RNN
from sequencer.models import CheckpointError, create_model, load_weights, read_weights
from sequencer.ops import configure, explain
from sequencer.printing import first_line
from sequencer.training.checkpoints import CHECKPOINTS, RunCheckpoints, SafeCheckpointIO
from sequencer.training.divergence import DivergenceGuard
from sequencer.training.ema import WeightEma
from sequencer.training.launch import trainer_settings, training_device
from sequencer.training.loss import Teacher, build_teacher
from sequencer.training.module import Classifier, parameters_of, size_phases
from sequencer.training.optim import build_optimizer, describe_groups, describe_phases, try_optimizer
from sequencer.training.progress import EpochBar
from sequencer.training.report import EpochReport
from sequencer.training.result import limited
from sequencer.training.start import describe_start, suggest_inheriting


@dataclass(frozen=True)
class Parts:
    """The components of a run that is ready to start, and what the console and the log say of them."""

    data: DataModule
    model: nn.Module
    module: Classifier
    report: EpochReport
    checkpoints: RunCheckpoints
    trainer: pl.Trainer
    description: list[str]
    details: list[str]  # for the log alone


def build_parts(config: Config, *callbacks: Callback, data: DataModule | None = None, resumed: bool = False) -> Parts:
    """Builds the components of a run; writes nothing.

    Args:
        callbacks: added to those of every run.
        data: used in place of the DataModule that `config.data` describes.
        resumed: whether a checkpoint holds the weights; those of `init_from` and timm are then not read.

    Raises:
        RequestError: the configuration cannot be realised.
    """
    run_dir = Path(config.run_dir)
    quieten()
    pl.seed_everything(config.seed, verbose=False)
    data = data or build_data(config)
    distributed.one_by_one(data.setup)
    configure(config.model.backend, config.model.recompute)
    model = distributed.one_by_one(lambda: build_model(config, data.num_classes, resumed))
    _try_model(config, model, data.num_classes)
    groups = _describe_groups(config, model)
    teacher = distributed.one_by_one(lambda: build_teacher(config.optim, config.data, data.class_names))
    _check_ranks(data, teacher)
    module = Classifier(model, config, data.class_names, teacher, log_to_loggers=False)  # EpochReport does
    ema = []
    if config.optim.ema_decay is not None:
        ema = [WeightEma(config.optim.ema_decay, config.optim.ema_warmup, data.num_classes)]
    metrics, best_metric = metric_names(data.num_classes), config.trainer.best_metric
    if best_metric.endswith("top5") and "top5" not in metrics:
        raise RequestError(f"trainer.best_metric={best_metric}: the data has {data.num_classes} classes")
    report = EpochReport(run_dir / "metrics.csv", ["val", *(["val_ema"] if ema else [])], metrics, best_metric)
    checkpoints = RunCheckpoints(run_dir / CHECKPOINTS, best_metric, config.trainer.checkpoint_interval, config.seed)
    guard = DivergenceGuard(run_dir, config.trainer.max_loss, data)
    trainer = _build_trainer(config, [*ema, guard, report, checkpoints, *callbacks])
    _check_limits(config, data)
    kernels = _kernels(model, trainer)
    description = [
        f"{config.model.name}, {parameters_of(model):,} parameters",
        f"{config.data.name}: {len(data.train_set):,} images to train, {len(data.val_set):,} to validate, "
        f"{data.num_classes:,} classes",
        *([] if resumed else describe_start(config)),
        _describe_batch(config),
        *_describe_sizes(config),
        *describe_phases(config),
        *([f"teacher: {config.optim.distill_from}, {config.optim.distill_weight:g} of the loss"] if teacher else []),
        *([f"kernels: {', '.join(dict.fromkeys(name for name, _ in kernels))}"] if kernels else []),
    ]
    details = [*groups, *(f"{name} kernels: {reason}" for name, reason in kernels)]
    return Parts(data, model, module, report, checkpoints, trainer, description, details)


def _check_ranks(data: DataModule, teacher: Teacher | None) -> None:
    """Checks that all ranks have the same images and teacher: machines may have copies that differ."""
    own = {"classes": data.class_names, **data.fingerprints, "teacher": teacher.fingerprint if teacher else None}
    first, *others = distributed.gather(own)
    for rank, other in enumerate(others, start=1):
        if differences := describe_differences(first, other):
            raise RequestError(f"the data of rank {rank} differ from those of rank 0: {differences}")


def build_data(config: Config, splits: Mapping[SplitName, Split] | None = None) -> DataModule:
    """Builds this rank's DataModule of a run, which opens the splits in its `setup` unless they are given."""
    return DataModule(
        config.data,
        config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        device=training_device(config),
        bad_samples=Path(config.run_dir, "bad_samples.csv"),
        splits=splits,
    )


def build_model(config: Config, num_classes: int, resumed: bool = False) -> nn.Module:
    """Builds the model of a run with its first weights, or with random ones if it is resumed.

    Raises:
        RequestError: The model cannot be built.
    """
    section = config.model
    if section.num_classes not in (None, num_classes):
        raise RequestError(f"model.num_classes={section.num_classes}, but the data has {num_classes} classes")
    optional = {"drop_rate": section.drop_rate, "drop_path_rate": section.drop_path_rate}
    try:
        model = create_model(
            section.name,
            img_size=section.img_size,
            in_chans=section.in_chans,
            num_classes=num_classes,
            pretrained=section.pretrained and not resumed,
            **{name: rate for name, rate in optional.items() if rate},
            **section.kwargs,
        )
        if section.grad_checkpointing:
            model.set_grad_checkpointing()  # type: ignore[operator]
        if config.init_from and not resumed:
            load_weights(model, read_weights(config.init_from), source=config.init_from, replace_head=True)
    except CheckpointError as error:
        raise RequestError(f"{error}{suggest_inheriting(config)}") from error
    return model


def _try_model(config: Config, model: nn.Module, num_classes: int) -> None:
    """Checks by a forward pass on the CPU that the model trains on images of every size and returns logits.

    Neither the model nor a random state changes. A model on the meta device, which has no memory, is not tried.

    Raises:
        RequestError: It does not.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    for size in dict.fromkeys([config.data.img_size, *(config.data.augment.sizes or [])]):
        _try_size(config, model, num_classes, size)


def _try_size(config: Config, model: nn.Module, num_classes: int, size: int) -> None:
    """Does the same for one size."""
    chans = config.data.in_chans
    images = torch.zeros(min(config.data.batch_size // distributed.world_size(), 2), chans, size, size)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with own_random_states(), torch.no_grad():
            logits = torch.func.functional_call(model, buffers, (images,))
    except Exception as error:  # timm's models refuse sizes by errors of many types
        raise RequestError(
            f"{config.model.name} cannot train on batches of {len(images)} images of {size} px: {first_line(error)}"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (len(images), num_classes):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise RequestError(
            f"{config.model.name} with model.kwargs={config.model.kwargs} is no classifier: for {len(images)} images "
            f"and {num_classes} classes it returns {found}"
        )


def _check_limits(config: Config, data: DataModule) -> None:
    """Checks that a fraction of the batches of a split is one batch or more, where it is above 0.

    Raises:
        RequestError: It is less.
    """
    loaders = {"train": data.train_dataloader, "val": data.val_dataloader, "test": data.test_dataloader}
    for name in data.splits:
        limit = getattr(config.trainer, f"limit_{name}_batches")
        if isinstance(limit, float) and limit > 0 and limited(batches := len(loaders[name]()), limit) == 0:
            raise RequestError(
                f"trainer.limit_{name}_batches={limit} of {batches} batches is less than one batch: give a larger "
                "fraction, or a number of batches without a decimal point"
            )


def _describe_groups(config: Config, model: nn.Module) -> list[str]:
    try:
        try_optimizer(config.optim)
        rows = describe_groups(model, build_optimizer(model, config.optim))
    except Exception as error:  # of timm's factory, torch's optimizers and their plug-ins
        raise RequestError(f"optim.opt={config.optim.opt} cannot be built: {first_line(error)}") from error
    return [
        f"parameter group {i}: {row['parameters']:,} from {row['first']}, "
        f"lr {row['lr']:.3g}, weight decay {row['weight_decay']:.3g}"
        for i, row in enumerate(rows)
    ]


def _describe_batch(config: Config) -> str:
    """Describes the batch of an update, which is the same on any number of devices, and the learning rate."""
    size, passes, devices = config.data.batch_size, config.trainer.accumulate_grad_batches, distributed.world_size()
    factors = [
        *([f"{devices} devices"] if devices > 1 else []),
        *([f"{passes} passes per update"] if passes > 1 else []),
    ]
    made = f" ({' x '.join([str(size // devices), *factors])})" if factors else ""
    return f"batch {size * passes:,}{made}, learning rate {config.optim.lr:g}"


def _describe_sizes(config: Config) -> list[str]:
    """Describes the sizes of the training images, where they change."""
    sizes = config.data.augment.sizes
    phases = size_phases(sizes, config.trainer.max_epochs) if sizes else []
    counts = [(size, end - first) for size, first, end in phases if first < end]
    parts = [f"{size} px for {sum(n for _, n in same)}" for size, same in groupby(counts, lambda each: each[0])]
    return [f"sizes of training images: {', '.join(parts)} epochs"] if parts else []


def _kernels(model: nn.Module, trainer: pl.Trainer) -> list[tuple[str, str]]:
    """Names the kernels of each kind of recurrence in a model, as in `fused lstm`, each with the reason."""
    dtype = dtype_of(str(trainer.precision))
    choices = (
        (rnn.cell, explain(rnn.cell, rnn.hidden_size, dtype, trainer.strategy.root_device))
        for rnn in model.modules()
        if isinstance(rnn, RNN)
    )
    return list(dict.fromkeys((f"{choice.backend} {cell}", choice.reason) for cell, choice in choices))


def dtype_of(precision: str) -> torch.dtype:
    """Returns the dtype of autocast for a `trainer.precision`, and float32 where there is none."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision, torch.float32)


def _build_trainer(config: Config, callbacks: list[Callback]) -> pl.Trainer:
    section = config.trainer
    if section.early_stopping_patience is not None:
        mode = "min" if lower_is_better(section.best_metric) else "max"
        callbacks.append(
            EarlyStopping(
                section.best_metric,
                patience=section.early_stopping_patience,
                mode=mode,
                check_on_train_epoch_end=True,
                check_finite=False,
            )
        )
    bar = section.enable_progress_bar and sys.stdout.isatty()
    if bar:
        callbacks.append(EpochBar())
    settings = lightning_settings(section)
    plugins: list[Any] = [SafeCheckpointIO()]
    if distributed.world_size() > 1:
        settings |= trainer_settings(config)
    else:  # and the variables of SLURM, MPI and other launchers, which Lightning would look for, do not count
        settings["devices"] = 1
        plugins.append(LightningEnvironment())
    try:
        return pl.Trainer(
            **settings,
            logger=False,
            plugins=plugins,
            use_distributed_sampler=False,  # the DataModule's samplers serve each rank its shard
            callbacks=callbacks,
            enable_progress_bar=bar,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=config.run_dir,
        )
    except Exception as error:  # Lightning's own, and those of packages that a device or a strategy needs
        raise RequestError(f"the trainer settings cannot be met: {first_line(error)}") from error


def quieten() -> None:
    """Silences Lightning's messages about itself, and its advice on settings that are chosen here on purpose."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("timm.scheduler.cosine_lr").setLevel(logging.ERROR)  # a run of one update has no curve
    os.environ.setdefault("PL_DISABLE_TIPS", "1")
    for message in (
        r"The '\w+' does not have many workers",
        r"The number of training batches .* is smaller than the logging interval",
        r"Checkpoint directory .* exists and is not empty",
        r"GPU available but not used",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        r"You are using a CUDA device .* that has Tensor Cores",
        r"You're resuming from a checkpoint that ended before the epoch ended",  # the DataModule restores the position
        r"It is recommended to use `self.log\(.*sync_dist=True\)`",  # metrics are synchronised before they are logged
    ):
        warnings.filterwarnings("ignore", message=f".*{message}")
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
