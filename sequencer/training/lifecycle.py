"""A run from its configuration to its result."""

import json
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
from sequencer.config.errors import RequestError
from sequencer.config.schema import Config
from sequencer.data import DataModule
from sequencer.files import write_atomically
from sequencer.models import read_checkpoint
from sequencer.tracking.loggers import build_loggers, close_log, close_loggers, start_log
from sequencer.training.checkpoints import find_checkpoint
from sequencer.training.divergence import Diverged
from sequencer.training.launch import launch, uses_gpu
from sequencer.training.module import Classifier, compile_in_place
from sequencer.training.result import finish, print_summary
from sequencer.training.setup import build_parts

log = logging.getLogger("sequencer")

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
        if diverged:
            _go_back(diverged, rollbacks, checkpoint, data)
        _fit(trainer, parts.module, data, checkpoint)
        summary = finish(config, model, data, trainer.strategy.root_device, checkpoints, parts.report)
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


def _start_folder(config: Config, run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / "config.yaml", lambda path: OmegaConf.save(OmegaConf.structured(config), path))
    except OSError as error:
        raise RequestError(f"run_dir={run_dir} cannot be written: {error.strerror}") from error


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
