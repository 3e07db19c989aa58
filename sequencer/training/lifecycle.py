"""The life of a run, from its configuration to its result."""

import logging
import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerStatus
from pytorch_lightning.utilities.exceptions import SIGTERMException

from sequencer import distributed
from sequencer.config.errors import RequestError
from sequencer.config.request import load_run, load_summary, request
from sequencer.config.schema import Config
from sequencer.console import say
from sequencer.data import DataModule
from sequencer.files import WriteError
from sequencer.lightning_internals import stop_loader_workers
from sequencer.tracking.loggers import EventFiles, build_loggers
from sequencer.tracking.wandb_guard import WandbGuard
from sequencer.training.checkpoints import describe_rescue
from sequencer.training.divergence import Diverged
from sequencer.training.folder import RunFolder
from sequencer.training.launch import launch, uses_gpu
from sequencer.training.module import Classifier, compile_in_place
from sequencer.training.result import describe_result, finish
from sequencer.training.resumption import check_resumption, find_checkpoint, has_checkpoint
from sequencer.training.setup import Parts, build_parts

log = logging.getLogger("sequencer")

MOST_ROLLBACKS = 3  # to one checkpoint


def run(config: Config, resume: bool = False, origin: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Trains and evaluates a model and writes the run folder `config.run_dir`.

    With several devices it starts the current script again under torchrun.

    Args:
        config: the run; `sequencer.config.compose` makes one from overrides.
        resume: whether to resume from the last checkpoint in the folder; without one the run starts from the beginning.
        origin: the command and the source of each value, as `sequencer.config.sources.describe_origin` returns them,
            for the page of the run.

    Returns:
        The content of the run's `summary.json`.

    Raises:
        RequestError: the configuration cannot be realised, or the run in the folder is in use, another one, or one with
            other data; or the folder holds files and `resume` is false. Nothing was written.
        WriteError: a file of the run cannot be written, as on a full disk; the last good checkpoint stays.
        Diverged: training has diverged, with `trainer.on_divergence=stop` or after the last rollback.
        KeyboardInterrupt: interrupted; the run can be resumed.
        SystemExit: with 143, on SIGTERM; the run can be resumed.
    """
    launch(config)
    distributed.join(uses_gpu(config))
    return _run(*distributed.from_first((config, resume, origin or {})))


def _run(config: Config, resume: bool, origin: Mapping[str, Any]) -> dict[str, Any]:
    folder = RunFolder(Path(config.run_dir), origin)
    distributed.on_first(lambda: _check_folder(config, resume))
    if resume and (summary := distributed.on_first(lambda: _finished(config, folder.path))):
        if distributed.is_first():
            for line in _describe_finished(summary, config, folder.path):
                say(line)
        return summary
    rollbacks: Counter[int] = Counter()  # by the number of updates of the checkpoint
    reshuffles = 0
    try:
        while True:
            try:
                return _train(config, folder, resume, reshuffles)
            except Diverged as error:
                if config.trainer.on_divergence == "stop":
                    raise
                saved = find_checkpoint(folder.path)
                updates = saved.updates if saved else 0
                if rollbacks[updates] == MOST_ROLLBACKS:
                    raise
                rollbacks[updates] += 1
                resume, reshuffles = True, rollbacks[updates]
                log.warning(
                    "%s; back at update %d, attempt %d of %d: the images that follow come in another order",
                    str(error).split(";")[0],
                    updates,
                    reshuffles,
                    MOST_ROLLBACKS,
                )
    except (KeyboardInterrupt, SystemExit):
        if distributed.is_first() and has_checkpoint(folder.path):
            log.info("stopped; resume with:\n%s", _resume_command(folder.path))
        raise
    except WriteError as error:
        raise WriteError(error.path, f"{error.reason}\n{describe_rescue(folder.path)}") from error
    finally:
        folder.close()


def _train(config: Config, folder: RunFolder, resume: bool, reshuffles: int) -> dict[str, Any]:
    """Trains once, from the start or the last checkpoint, and writes the result.

    Args:
        config: the run.
        folder: its folder.
        resume: whether to resume from the last checkpoint.
        reshuffles: number of times that the unseen rest of the resumed epoch is reordered.

    Returns:
        The content of the run's `summary.json`.
    """
    resumed = distributed.on_first(lambda: resume and has_checkpoint(folder.path))
    parts = build_parts(config, resumed=resumed)
    data, model, trainer = parts.data, parts.model, parts.trainer
    checkpoint = distributed.on_first(lambda: _start(config, folder, parts, resume))  # the first to write
    loggers: list[EventFiles | WandbGuard] = []
    try:
        for line in parts.description:
            log.info(line)
        for line in parts.details:
            log.debug(line)
        log.info("run folder: %s", folder.path)
        if config.data.check and distributed.is_first():
            readable = data.count_readable(sys.stdout.isatty())
            log.info("checked: %d of %d images can be read", readable, sum(map(len, data.splits.values())))
        loggers = build_loggers(config, folder.path) if distributed.is_first() else []
        trainer.loggers = list(loggers)
        if config.trainer.compile:
            compile_in_place(model)
        data.reshuffle(reshuffles)
        _fit(trainer, parts.module, data, checkpoint)
        summary, written = finish(config, model, data, trainer.strategy.root_device, parts.checkpoints, parts.report)
        test = {name: value for name, value in summary.items() if name.startswith("test/")}
        for logger in loggers:
            logger.log_result(test, written, summary["updates"])
        return summary
    finally:
        for logger in loggers:
            logger.close()


def _describe_finished(summary: dict[str, Any], config: Config, run_dir: Path) -> list[str]:
    epochs = summary["epochs"]
    return [
        f"nothing is left to do: this run has finished its {epochs} epoch{'s' * (epochs != 1)}; for more:",
        f"{_resume_command(run_dir)} trainer.max_epochs={2 * epochs}",
        *describe_result(summary, run_dir, next_steps=config.logger.group is None),
    ]


def _resume_command(run_dir: Path) -> str:
    return f"python train.py resume={shlex.quote(str(run_dir))}"


def _check_folder(config: Config, resume: bool) -> None:
    """Checks, as `train.py` does, that a run overwrites nothing but the files of the run that it resumes.

    Raises:
        RequestError: The folder holds another run or other files, or the same run, which is not to be resumed.
    """
    if request(config).resume and not resume:
        raise RequestError(
            f"run_dir={config.run_dir} holds this run: run(config, resume=True) resumes it; "
            "choose another folder to start over"
        )


def _finished(config: Config, run_dir: Path) -> dict[str, Any] | None:
    """Returns the summary of a run that has done all the epochs it is asked for, otherwise None."""
    summary = load_summary(run_dir)
    if summary is None:
        return None
    may_end_early = config.trainer.early_stopping_patience is not None or config.trainer.max_steps >= 0
    done = load_run(run_dir).trainer.max_epochs if may_end_early else summary["epochs"]
    return summary if config.trainer.max_epochs <= done else None


def _start(config: Config, folder: RunFolder, parts: Parts, resume: bool) -> Path | None:
    """Starts or resumes the run in its folder, after the last checks of the request.

    Returns:
        The checkpoint to resume from, or None to start from the beginning.

    Raises:
        RequestError: the run cannot be resumed as it is asked for, or the folder cannot be written.
        WriteError: the disk is full.
    """
    saved = find_checkpoint(folder.path) if resume else None
    if saved is not None:
        check_resumption(saved, config, parts.data, parts.module.teacher)
    folder.start(config)
    for warning in saved.warnings if saved is not None else ():
        log.warning(warning)
    if saved is None:
        return None
    log.info(
        "resuming in epoch %d of %d, after %d updates, from\n%s",
        saved.epoch,
        config.trainer.max_epochs,
        saved.updates,
        saved.path,
    )
    return saved.path


def _fit(trainer: pl.Trainer, module: Classifier, data: DataModule, checkpoint: Path | None) -> None:
    """Fits the module; an interruption ends with KeyboardInterrupt or SystemExit(143), not Lightning's exit codes."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException:
        raise SystemExit(143) from None
    except SystemExit:
        if trainer.state.status == TrainerStatus.INTERRUPTED:
            raise KeyboardInterrupt from None
        raise
    finally:
        stop_loader_workers(trainer)
