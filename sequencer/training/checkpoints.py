"""`last.ckpt`, `previous.ckpt` and `best.ckpt` of a run: whole or not there, and enough to go on exactly."""

import logging
import math
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException

from sequencer import distributed
from sequencer.files import write_atomically
from sequencer.models import CheckpointError, read_checkpoint
from sequencer.training.interruption import Interruption
from sequencer.training.module import Classifier
from sequencer.training.random_state import get_random_state, seed_rank, set_random_state

log = logging.getLogger("sequencer")

RANKS_KEY = "ranks"  # what differs from process to process


class SaveError(RuntimeError):
    """A checkpoint could not be written; the ones before it stand."""


class SafeCheckpointIO(CheckpointIO):
    """How the Trainer's checkpoints get to disk and back."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """
        Raises:
            SaveError: the disk is full, or something like it.
        """
        path = Path(path)
        try:
            write_atomically(path, partial(torch.save, checkpoint))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of several lines
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
            raise SaveError(f"{path} could not be written: {reason}\n{_good(path.parent)}") from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def _good(folder: Path) -> str:
    last = folder / "last.ckpt"
    return f"{last} is the last good one; make room and go on with resume={folder.parent}" if last.exists() else ""


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that can be read, None where there is none.

    Raises:
        CheckpointError: there are some, and none of them can be read.
    """
    damaged: list[CheckpointError] = []
    for path in (folder / "last.ckpt", folder / "previous.ckpt"):
        if not path.exists():
            continue
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            damaged.append(error)
            continue
        if damaged:
            log.warning("%s; going on from %s", damaged[0], path)
        return path
    if damaged:
        raise damaged[0]
    return None


class RunCheckpoints(Checkpoint):
    """Saves after every epoch, within an epoch every `interval` seconds, and when the run is told to stop.

    What is saved is the state between two updates, or before or after a validation, with the best value so far and
    the random states of every process; a run resumed from it goes on as the interrupted one would have, and its best
    never gets worse. Derived from Lightning's `Checkpoint` so that it comes last among the callbacks, when the
    epoch's metrics stand.
    """

    def __init__(self, folder: Path, best_metric: str, interval: float, seed: int) -> None:
        self.folder, self.best_metric, self.interval, self.seed = folder, best_metric, interval, seed
        self.sign = -1.0 if best_metric.endswith("loss") else 1.0
        self.best_value: float | None = None
        self.best_epoch: int | None = None
        self.interruption = Interruption()
        self._saved_at = 0.0
        self._updates = 0
        self._random_state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value, self.best_epoch = state_dict["best_value"], state_dict["best_epoch"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Classifier) -> None:
        self.interruption.listen()
        self._saved_at, self._updates = time.monotonic(), trainer.global_step
        if self._random_state is None and trainer.world_size > 1:
            seed_rank(self.seed, trainer.global_step, trainer.global_rank)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Classifier, *args: Any) -> None:
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Classifier, *args: Any) -> None:
        updated = trainer.global_step > self._updates  # not in the middle of an accumulation
        self._updates = trainer.global_step
        if updated and not trainer.is_last_batch:  # after the last one comes validation, which knows where it stands
            self._save_or_stop(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Classifier) -> None:
        self._save_or_stop(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Classifier, *args: Any) -> None:
        if trainer.world_size == 1:  # several processes need not have the same number of batches to meet at
            self._save_or_stop(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Classifier) -> None:
        metrics = {"epoch": trainer.current_epoch} | trainer.callback_metrics
        value = float(metrics[self.best_metric])
        best = self.best_value
        # NaN compares false, so it replaces nothing; a first epoch of NaN still leaves a checkpoint
        improved = best is None or math.isnan(best) or self.sign * value > self.sign * best
        if improved:
            self.best_value, self.best_epoch = value, trainer.current_epoch
            # before last.ckpt: a run killed between the two does the epoch again and finds the same best
            trainer.save_checkpoint(self.folder / "best.ckpt")
        self._save(trainer)
        self._stop_if_told(self._signal())

    def _save_or_stop(self, trainer: pl.Trainer) -> None:
        due = time.monotonic() - self._saved_at >= self.interval
        wishes = distributed.gather((self.interruption.signal, due))
        told = next((number for number, _ in wishes if number is not None), None)
        if told is not None or wishes[0][1]:
            self._save(trainer)
        self._stop_if_told(told)

    def _signal(self) -> int | None:
        return next((number for number in distributed.gather(self.interruption.signal) if number is not None), None)

    def _stop_if_told(self, number: int | None) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGTERM:
            raise SIGTERMException

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            keep(self.folder / "last.ckpt", self.folder / "previous.ckpt")
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self._saved_at = time.monotonic()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Classifier, checkpoint: dict[str, Any]) -> None:
        # what was loaded holds until the next training batch, and so over a validation that is done again
        random = self._random_state or get_random_state()
        own = {"random": random, "totals": pl_module.train_totals.tolist()}
        checkpoint[RANKS_KEY] = distributed.gather(own)
        if trainer.validating:  # a resumed run does the validation over from its first batch
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for part in ("total", "current"):
                progress[part] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Classifier, checkpoint: dict[str, Any]) -> None:
        ranks = checkpoint[RANKS_KEY]
        if len(ranks) == trainer.world_size:
            own = ranks[trainer.global_rank]
            self._random_state = own["random"]
            totals = own["totals"]
        else:  # sums of all go on in the first process, random states begin anew
            totals = [sum(part) for part in zip(*(one["totals"] for one in ranks), strict=True)]
            totals = totals if trainer.is_global_zero else [0.0] * len(totals)
        pl_module.train_totals = torch.tensor(totals, dtype=torch.float64)


def keep(last: Path, previous: Path) -> None:
    """Gives a checkpoint a second name, under which it survives the one that is to take its place."""
    if not last.exists():
        return
    link = previous.with_name(f".{previous.name}.partial")
    link.unlink(missing_ok=True)
    try:
        os.link(last, link)
    except OSError:  # a file system without links
        link = last
    os.replace(link, previous)
