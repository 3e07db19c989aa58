"""The checkpoints of a run, `last.ckpt`, `previous.ckpt` and `best.ckpt`: written atomically, exact to resume from."""

import math
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins import CheckpointIO
from pytorch_lightning.utilities.exceptions import SIGTERMException

from sequencer import distributed
from sequencer.config.schema import lower_is_better
from sequencer.files import write_atomically, writing
from sequencer.lightning_internals import restart_validation
from sequencer.models import read_checkpoint
from sequencer.training.interruption import Interruption
from sequencer.training.module import Classifier
from sequencer.training.random_state import get_random_state, seed_rank, set_random_state

CHECKPOINTS = "checkpoints"  # folder of a run
RANKS_KEY = "ranks"  # in a checkpoint: the random states of every rank


class SafeCheckpointIO(CheckpointIO):
    """Writes the Trainer's checkpoints atomically and verifies them when they are read."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Raises:
            WriteError: The checkpoint cannot be written, as on a full disk; an existing one is unchanged.
        """
        write_atomically(Path(path), partial(_write, checkpoint))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    with open(path, "wb") as file:  # given a path, torch reports a full disk without saying that it is full
        torch.save(checkpoint, file)


def describe_rescue(run_dir: Path) -> str:
    """Says how a run continues after a file could not be written."""
    last = run_dir / CHECKPOINTS / "last.ckpt"
    if not last.exists():
        return "no checkpoint has been written; free disk space and repeat the command"
    return f"{last} is the last good checkpoint; free disk space and resume with resume={run_dir}"


class RunCheckpoints(Checkpoint):
    """Saves after every epoch, within an epoch every `interval` seconds, and when the run is told to stop.

    A checkpoint is taken between two updates, or before or during a validation, which a resumed run then repeats. It
    holds the best value so far and the random states of every rank, so that a resumed run continues exactly as the
    interrupted one would have. A subclass of Lightning's `Checkpoint`, whose hooks are called after those of the other
    callbacks, when the metrics of the epoch are known.
    """

    def __init__(self, folder: Path, best_metric: str, interval: float, seed: int) -> None:
        """
        Args:
            folder: where the checkpoints are written.
            best_metric: decides `best.ckpt`, see `trainer.best_metric`.
            interval: seconds between two saves within an epoch; 0 saves after every update.
            seed: seed of the run, from which the random states of several ranks are derived.
        """
        self.folder, self.best_metric, self.interval, self.seed = folder, best_metric, interval, seed
        self.sign = -1.0 if lower_is_better(best_metric) else 1.0
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
        updated = trainer.global_step > self._updates  # false between the batches of one update
        self._updates = trainer.global_step
        if updated and not trainer.is_last_batch:  # the last one is followed by validation, which saves at its start
            self._save_or_stop(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Classifier) -> None:
        self._save_or_stop(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Classifier, *args: Any) -> None:
        if trainer.world_size == 1:  # ranks may have different numbers of batches, and would wait for each other
            self._save_or_stop(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Classifier) -> None:
        metrics = {"epoch": trainer.current_epoch} | trainer.callback_metrics
        value = float(metrics[self.best_metric])
        best = self.best_value
        # NaN compares false, so it replaces nothing; a first value of NaN is saved, and replaced by any later one
        improved = best is None or math.isnan(best) or self.sign * value > self.sign * best
        if improved:
            self.best_value, self.best_epoch = value, trainer.current_epoch
            # before last.ckpt: a run killed between the two repeats the epoch and finds the same best value
            trainer.save_checkpoint(self.folder / "best.ckpt")
        self._save(trainer)
        signals = distributed.gather(self.interruption.signal)
        self._stop_if_told(next((number for number in signals if number is not None), None))

    def _save_or_stop(self, trainer: pl.Trainer) -> None:
        """Saves where the interval has passed on rank 0 or a signal has come on any rank, which also ends the run."""
        due = time.monotonic() - self._saved_at >= self.interval
        states = distributed.gather((self.interruption.signal, due))
        received = next((number for number, _ in states if number is not None), None)
        if received is not None or states[0][1]:
            self._save(trainer)
        self._stop_if_told(received)

    def _stop_if_told(self, number: int | None) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number is not None:
            raise SIGTERMException

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            keep(self.folder / "last.ckpt", self.folder / "previous.ckpt")
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self._saved_at = time.monotonic()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Classifier, checkpoint: dict[str, Any]) -> None:
        # the state loaded at the start holds until the next training batch, even if a validation is repeated before it
        checkpoint[RANKS_KEY] = distributed.gather({"random": self._random_state or get_random_state()})
        if trainer.validating:
            restart_validation(checkpoint)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Classifier, checkpoint: dict[str, Any]) -> None:
        ranks = checkpoint[RANKS_KEY]
        if len(ranks) == trainer.world_size:  # otherwise every rank is seeded again
            self._random_state = ranks[trainer.global_rank]["random"]


def keep(last: Path, previous: Path) -> None:
    """Gives a checkpoint a second name, under which it survives when the first name is written again.

    Raises:
        WriteError: The file system refuses.
    """
    if not last.exists():
        return
    link = previous.with_name(f".{previous.name}.partial")
    with writing(previous):
        link.unlink(missing_ok=True)
        try:
            os.link(last, link)
        except OSError:  # the file system has no hard links
            link = last
        os.replace(link, previous)
