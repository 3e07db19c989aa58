"""A run from its configuration to its result."""

import json
import logging
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback, EarlyStopping, RichProgressBar
from pytorch_lightning.trainer.states import TrainerStatus
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import nn

from conf.errors import RequestError
from conf.schema import Config
from sequencer import distributed
from sequencer.data import DataModule, check_images
from sequencer.files import write_atomically
from sequencer.layers import RNN
from sequencer.models import CheckpointError, create_model, load_weights, read_checkpoint, read_weights
from sequencer.ops import configure, explain
from sequencer.training.checkpoints import RunCheckpoints, SafeCheckpointIO, find_checkpoint
from sequencer.training.divergence import Diverged, DivergenceGuard
from sequencer.training.ema import WeightEma
from sequencer.training.launch import launch, trainer_settings, uses_gpu
from sequencer.training.loggers import build_loggers, close_log, close_loggers, start_log
from sequencer.training.loss import build_teacher
from sequencer.training.module import Classifier, compile_in_place, parameters_of
from sequencer.training.optim import build_optimizer, describe_groups
from sequencer.training.report import EpochReport
from sequencer.training.result import finish, print_summary

log = logging.getLogger("sequencer")

OWN_KEYS = (
    "compile",
    "best_metric",
    "slot",
    "early_stopping_patience",
    "enable_progress_bar",
    "checkpoint_interval",
    "max_loss",
    "on_divergence",
)
MOST_ROLLBACKS = 3  # to one checkpoint


def run(config: Config, resume: bool = False) -> dict[str, Any]:
    """Trains, evaluates and writes `config.run_dir`; returns what stands in its `summary.json`.

    With `resume` the run goes on from its last checkpoint, or from the start where there is none yet.

    Raises:
        RequestError: what was asked for cannot be had; nothing was written.
        KeyboardInterrupt: interrupted; the run can be resumed.
        SystemExit: with 143, on SIGTERM; the run can be resumed.
    """
    launch(config)
    distributed.join(uses_gpu(config))
    return _run(*distributed.from_first((config, resume)))


def _run(config: Config, resume: bool) -> dict[str, Any]:
    run_dir = Path(config.run_dir)
    if resume and (summary := _finished(run_dir, config)):
        if distributed.is_first():
            print_summary(summary, run_dir)
        return summary
    _quieten()
    diverged: Diverged | None = None
    rollbacks: Counter[int] = Counter()  # by the update that was gone back to
    while True:
        try:
            return _train(config, resume, diverged, rollbacks)
        except Diverged as error:
            if config.trainer.on_divergence == "stop" or error is diverged:
                raise
            diverged, resume = error, True


def _train(config: Config, resume: bool, diverged: Diverged | None, rollbacks: Counter[int]) -> dict[str, Any]:
    """
    Raises:
        Diverged: `diverged` itself, where one checkpoint has been gone back to often enough.
    """
    run_dir = Path(config.run_dir)
    pl.seed_everything(config.seed, verbose=False)
    data = DataModule(config.data, config.seed, run_dir / "bad_samples.csv")
    distributed.one_by_one(data.setup)
    configure(config.model.backend, config.model.recompute)
    model = distributed.one_by_one(lambda: _build_model(config, data.num_classes))
    groups = _describe_groups(config, model)
    teacher = distributed.one_by_one(lambda: build_teacher(config.optim, config.data, data.class_names))
    module = Classifier(model, config, data.class_names, teacher)
    ema = None
    if config.optim.ema_decay is not None:
        ema = WeightEma(config.optim.ema_decay, config.optim.ema_warmup, data.num_classes)
    report = EpochReport(run_dir / "metrics.csv", ema, config.trainer.best_metric)
    checkpoints = RunCheckpoints(
        run_dir / "checkpoints", config.trainer.best_metric, config.trainer.checkpoint_interval, config.seed
    )
    guard = DivergenceGuard(run_dir, config.trainer.max_loss)
    trainer = _build_trainer(config, [callback for callback in (ema, guard, report, checkpoints) if callback])

    if distributed.is_first():
        _start_folder(config, run_dir)  # from here on the request is known to be good
        start_log(run_dir / "train.log")
    try:
        log.info("%s, %s parameters; %s", config.model.name, f"{parameters_of(model):,}", run_dir)
        log.info("%s: %d images to train, %d to validate, %d classes", config.data.name, len(data.train_set),
                 len(data.val_set), data.num_classes)  # fmt: skip
        if teacher is not None:
            log.info("teacher: %s, %g of the loss", config.optim.distill_from, config.optim.distill_weight)
        for line in [_describe_batch(config), *groups, *_describe_backends(model, trainer)]:
            log.info(line)
        if config.data.check and distributed.is_first():
            readable = check_images(config.data.name, data.parts, config.data.num_workers, sys.stdout.isatty())
            log.info("checked: %d of %d images can be read", readable, sum(map(len, data.parts.values())))
        trainer.loggers = build_loggers(config, run_dir) if distributed.is_first() else []
        if config.trainer.compile:
            compile_in_place(model)
        checkpoint = find_checkpoint(checkpoints.folder) if resume else None
        if diverged:
            _go_back(diverged, rollbacks, checkpoint, data)
        _fit(trainer, module, data, checkpoint)
        summary = finish(config, model, data, trainer.strategy.root_device, checkpoints, report)
        if distributed.is_first():
            print_summary(summary, run_dir)
        return summary
    finally:
        close_loggers(trainer.loggers)
        close_log()


def _go_back(diverged: Diverged, rollbacks: Counter[int], checkpoint: Path | None, data: DataModule) -> None:
    updates = read_checkpoint(checkpoint)["global_step"] if checkpoint else 0
    if rollbacks[updates] == MOST_ROLLBACKS:
        raise diverged
    rollbacks[updates] += 1
    data.reshuffle(rollbacks[updates])
    log.warning(
        "%s; back at update %d, attempt %d of %d: the images that follow come in another order",
        str(diverged).split(";")[0],
        updates,
        rollbacks[updates],
        MOST_ROLLBACKS,
    )


def _finished(run_dir: Path, config: Config) -> dict[str, Any] | None:
    """The summary of a run that has done all the epochs it is asked for."""
    path = run_dir / "summary.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text())
    done = OmegaConf.load(run_dir / "config.yaml").trainer.max_epochs
    return summary if config.trainer.max_epochs <= done else None


def _build_model(config: Config, num_classes: int) -> nn.Module:
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
            pretrained=section.pretrained,
            **{name: rate for name, rate in optional.items() if rate},
            **section.kwargs,
        )
        if section.grad_checkpointing:
            model.set_grad_checkpointing()  # type: ignore[operator]
        if config.init_from:
            load_weights(model, read_weights(config.init_from), source=config.init_from, replace_head=True)
    except CheckpointError as error:
        raise RequestError(str(error)) from error
    return model


def _start_folder(config: Config, run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / "config.yaml", lambda path: OmegaConf.save(OmegaConf.structured(config), path))
    except OSError as error:
        raise RequestError(f"run_dir={run_dir} cannot be written: {error.strerror}") from error


def _describe_groups(config: Config, model: nn.Module) -> list[str]:
    try:
        rows = describe_groups(model, build_optimizer(model, config.optim))
    except (ValueError, TypeError, AssertionError) as error:
        raise RequestError(f"optim.opt={config.optim.opt} cannot be built: {error}") from error
    return [
        f"parameter group {i}: {row['parameters']:,} in {row['tensors']} tensors from {row['first']}, "
        f"lr {row['lr']:.3g}, weight decay {row['weight_decay']:.3g}"
        for i, row in enumerate(rows)
    ]


def _describe_batch(config: Config) -> str:
    """What an update sees; the learning rate is the one for that, whatever the devices."""
    size, passes, devices = config.data.batch_size, config.trainer.accumulate_grad_batches, distributed.world_size()
    parts = f"{size // devices} on each of {devices} device{'s' * (devices > 1)}"
    return (
        f"batch {size * passes}: {parts}{f', {passes} passes an update' if passes > 1 else ''}; "
        f"learning rate {config.optim.lr:g}, not scaled"
    )


def _describe_backends(model: nn.Module, trainer: pl.Trainer) -> list[str]:
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(trainer.precision), torch.float32)
    choices = (
        (rnn.cell, explain(rnn.cell, rnn.hidden_size, dtype, trainer.strategy.root_device))
        for rnn in model.modules()
        if isinstance(rnn, RNN)
    )
    return list(dict.fromkeys(f"{cell}: {choice.backend} kernels ({choice.reason})" for cell, choice in choices))


def _build_trainer(config: Config, callbacks: list[Callback]) -> pl.Trainer:
    section = config.trainer
    if section.early_stopping_patience is not None:
        mode = "min" if section.best_metric.endswith("loss") else "max"
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
        callbacks.append(RichProgressBar(leave=False))
    settings = {name: value for name, value in vars(section).items() if name not in OWN_KEYS}
    if distributed.world_size() > 1:
        settings |= trainer_settings(config)
    try:
        return pl.Trainer(
            **settings,
            logger=False,
            plugins=[SafeCheckpointIO()],
            use_distributed_sampler=False,  # ours knows its share
            callbacks=callbacks,
            enable_progress_bar=bar,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=config.run_dir,
        )
    except (MisconfigurationException, ValueError) as error:
        raise RequestError(f"the trainer settings cannot be met: {str(error).splitlines()[0]}") from error


def _fit(trainer: pl.Trainer, module: Classifier, data: DataModule, checkpoint: Path | None) -> None:
    """Lightning's fit, with the exit codes of an interrupted run in place of its own 1 and 0."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException:
        raise SystemExit(143) from None
    except SystemExit:
        if trainer.state.status == TrainerStatus.INTERRUPTED:
            raise KeyboardInterrupt from None
        raise


def _quieten() -> None:
    """Leaves out what Lightning says about itself, and its advice on settings that are ours to choose."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    os.environ.setdefault("PL_DISABLE_TIPS", "1")
    for message in (
        r"The '\w+' does not have many workers",
        r"The number of training batches .* is smaller than the logging interval",
        r"Checkpoint directory .* exists and is not empty",
        r"GPU available but not used",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        r"You are using a CUDA device .* that has Tensor Cores",
        r"You're resuming from a checkpoint that ended before the epoch ended",  # the DataModule knows where
        r"It is recommended to use `self.log\(.*sync_dist=True\)`",  # what is logged has been gathered
    ):
        warnings.filterwarnings("ignore", message=f".*{message}")
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
