"""The life of a run, from its configuration to its result."""

import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import OmegaConf
from pytorch_lightning.trainer.states import TrainerStatus
from pytorch_lightning.utilities.exceptions import SIGTERMException

from sequencer import distributed
from sequencer.config.errors import RequestError, summarise_error
from sequencer.config.request import load_summary
from sequencer.config.schema import Config
from sequencer.data import DataModule
from sequencer.files import WriteError, is_full, write_atomically
from sequencer.lightning_internals import stop_loader_workers
from sequencer.models import read_checkpoint
from sequencer.tracking.loggers import build_loggers, close_log, close_loggers, start_log
from sequencer.training.checkpoints import CHECKPOINTS, describe_rescue, find_checkpoint
from sequencer.training.divergence import Diverged
from sequencer.training.launch import launch, uses_gpu
from sequencer.training.module import Classifier, compile_in_place
from sequencer.training.result import finish, print_summary
from sequencer.training.setup import build_parts

log = logging.getLogger("sequencer")

MOST_ROLLBACKS = 3  # to one checkpoint


def run(config: Config, resume: bool = False) -> dict[str, Any]:
    """Trains and evaluates a model and writes the run folder `config.run_dir`.

    With several devices it starts the current command again under torchrun.

    Args:
        config: the run; `sequencer.config.compose` makes one from overrides.
        resume: whether to resume from the last checkpoint in the folder; without one the run starts from the beginning.

    Returns:
        The content of the run's `summary.json`.

    Raises:
        RequestError: the configuration cannot be realised; nothing was written.
        WriteError: a file of the run cannot be written, as on a full disk; the last good checkpoint stays.
        Diverged: training has diverged, with `trainer.on_divergence=stop` or after the last rollback.
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
    rollbacks: Counter[int] = Counter()  # by the number of updates of the checkpoint
    reshuffles = 0
    try:
        while True:
            try:
                return _train(config, resume, reshuffles)
            except Diverged as error:
                checkpoint = find_checkpoint(run_dir / CHECKPOINTS)
                updates = read_checkpoint(checkpoint)["global_step"] if checkpoint else 0
                if config.trainer.on_divergence == "stop" or rollbacks[updates] == MOST_ROLLBACKS:
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
    except WriteError as error:
        raise WriteError(f"{summarise_error(error)}\n{describe_rescue(run_dir)}") from error
    finally:
        close_log()


def _train(config: Config, resume: bool, reshuffles: int) -> dict[str, Any]:
    """Trains once, from the start or the last checkpoint, and writes the result.

    Args:
        reshuffles: number of times that the unseen rest of the resumed epoch is reordered.

    Returns:
        The content of the run's `summary.json`.
    """
    run_dir = Path(config.run_dir)
    parts = build_parts(config)
    data, model, trainer, checkpoints = parts.data, parts.model, parts.trainer, parts.checkpoints
    if distributed.is_first():
        _start_folder(config, run_dir)  # from here on the request is known to be good
        start_log(run_dir / "train.log")
    try:
        for line in parts.description:
            log.info(line)
        if config.data.check and distributed.is_first():
            readable = data.count_readable(sys.stdout.isatty())
            log.info("checked: %d of %d images can be read", readable, sum(map(len, data.splits.values())))
        trainer.loggers = build_loggers(config, run_dir) if distributed.is_first() else []
        if config.trainer.compile:
            compile_in_place(model)
        checkpoint = find_checkpoint(checkpoints.folder) if resume else None
        data.reshuffle(reshuffles)
        _fit(trainer, parts.module, data, checkpoint)
        summary = finish(config, model, data, trainer.strategy.root_device, checkpoints, parts.report)
        if distributed.is_first():
            print_summary(summary, run_dir)
        return summary
    finally:
        close_loggers(trainer.loggers)


def _finished(run_dir: Path, config: Config) -> dict[str, Any] | None:
    """Returns the summary of a run that has done all the epochs it is asked for, otherwise None."""
    if not (run_dir / "summary.json").exists():
        return None
    summary = load_summary(run_dir)
    done = OmegaConf.load(run_dir / "config.yaml").trainer.max_epochs
    return summary if config.trainer.max_epochs <= done else None


def _start_folder(config: Config, run_dir: Path) -> None:
    """Creates the run folder with its `config.yaml`.

    Raises:
        RequestError: The folder cannot be written.
        WriteError: The disk is full.
    """
    try:
        write_atomically(run_dir / "config.yaml", lambda path: OmegaConf.save(OmegaConf.structured(config), path))
    except WriteError as error:
        if is_full(error):
            raise
        raise RequestError(f"run_dir={run_dir} cannot be used: {error}") from error


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
