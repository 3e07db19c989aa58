"""A smoke test: every part of a run once, on a few images, in a folder that is deleted."""

import dataclasses
import logging
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sequencer.config.schema import Config
from sequencer.console import say
from sequencer.distributed import is_first
from sequencer.models import load_model
from sequencer.training.launch import launch
from sequencer.training.lifecycle import run

log = logging.getLogger("sequencer")

IMAGES = 2  # of a batch on each device; mixup needs an even number


def smoke(config: Config) -> None:
    """Runs a configuration with one batch of each split: training, validation, checkpoints, test, pictures and model.

    Nothing that it writes is kept, and nothing is sent to W&B. Only the device, the model and the data are those of the
    run in full.

    Raises:
        Exception: what the run would raise.
    """
    started = time.monotonic()
    launch(config)
    log.disabled = True  # figures of two images and the path of a deleted folder say nothing
    try:
        with TemporaryDirectory(prefix="smoke", ignore_cleanup_errors=True) as folder:
            summary = run(shorten(config, Path(folder, "run")))
            if is_first():
                load_model(Path(folder, "run"))
    finally:
        log.disabled = False
    if is_first():
        say(
            f"smoke test passed in {time.monotonic() - started:.0f} s: {summary['model']} on {summary['data']}, one "
            "batch each of training, validation and test, checkpoints, pictures and the model folder; nothing was kept"
        )


def shorten(config: Config, run_dir: Path) -> Config:
    """Returns the configuration of the smoke test of a run, in another folder."""
    devices = int(config.trainer.devices) if str(config.trainer.devices).isdecimal() else 0
    images = IMAGES * devices * config.trainer.num_nodes or config.data.batch_size
    data = dataclasses.replace(
        config.data,
        batch_size=min(config.data.batch_size, images),
        eval_batch_size=min(config.data.eval_batch_size, IMAGES),
        num_workers=min(config.data.num_workers, 1),
    )
    once: dict[str, Any] = {f"limit_{split}_batches": 1 for split in ("train", "val", "test")}
    trainer = dataclasses.replace(config.trainer, max_epochs=1, accumulate_grad_batches=1, **once)
    logger = dataclasses.replace(config.logger, wandb=False)
    return dataclasses.replace(
        config, name="smoke test", run_dir=str(run_dir), data=data, trainer=trainer, logger=logger
    )
