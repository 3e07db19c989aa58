"""The checkpoint that a run is resumed from, compared with the run and its data before anything is written.

A run is identified by its configuration, the seed included, and by its data: runs that have these in common are
interchangeable.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from sequencer.config.errors import RequestError
from sequencer.config.request import describe_differences, differing_settings
from sequencer.config.schema import Config
from sequencer.data import DataModule
from sequencer.declared import UndeclaredContent, check_type
from sequencer.models import CheckpointError, read_checkpoint
from sequencer.training.checkpoints import CHECKPOINTS
from sequencer.training.loss import Teacher

NAMES = ("last.ckpt", "previous.ckpt")  # newest first


class _Data(BaseModel):
    """State of the `DataModule`."""

    epoch: int = Field(ge=0)  # that is trained on, or trained on next
    batches: int = Field(ge=0)  # of this epoch that have been trained on
    reshuffles: list[int]
    fingerprints: dict[str, str] | None = None  # missing in checkpoints of version 0.1.0


class _Best(BaseModel):
    """State of `RunCheckpoints`."""

    best_value: float | None
    best_epoch: int | None


class _Report(BaseModel):
    """State of `EpochReport`."""

    rows: list[dict[str, float]]
    images: int
    elapsed: float


class _Callbacks(BaseModel):
    best: _Best = Field(alias="RunCheckpoints")
    report: _Report = Field(alias="EpochReport")


class _Checkpoint(BaseModel):
    """The content of a run's checkpoint. Lightning and the callbacks check the types of what is `Any` here."""

    state_dict: dict[str, Any]
    optimizer_states: list[dict[str, Any]]
    loops: dict[str, Any]
    ranks: list[dict[str, Any]]
    callbacks: _Callbacks
    global_step: int = Field(ge=0)
    config: dict[str, Any]
    class_names: list[str]
    teacher: str | None = None  # its fingerprint; missing in checkpoints of version 0.1.0
    data: _Data = Field(alias="DataModule")


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint says about its run, without the tensors."""

    path: Path
    updates: int
    epochs: int  # that have been started
    epoch: int  # that is trained next or in part, counted from 1
    best_epoch: int | None
    config: dict[str, Any]
    class_names: list[str]
    fingerprints: dict[str, str] | None
    teacher: str | None
    warnings: tuple[str, ...] = ()


def read_run(path: Path, *warnings: str) -> SavedRun:
    """Reads a run's checkpoint.

    Args:
        path: The file.
        warnings: Added to the result.

    Raises:
        CheckpointError: The file cannot be read, is damaged, or would run code.
        UndeclaredContent: It is not a checkpoint of a run.
    """
    content = check_type(_Checkpoint, read_checkpoint(path), str(path))
    if content.data.fingerprints is None:
        warnings += (f"{path} has no fingerprints of the data: nothing shows whether its images are the same",)
    return SavedRun(
        path,
        updates=content.global_step,
        epochs=content.data.epoch + (content.data.batches > 0),
        epoch=content.data.epoch + 1,
        best_epoch=content.callbacks.best.best_epoch,
        config=content.config,
        class_names=content.class_names,
        fingerprints=content.data.fingerprints,
        teacher=content.teacher,
        warnings=warnings,
    )


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run has saved a checkpoint, which need not be intact."""
    return any((run_dir / CHECKPOINTS / name).exists() for name in NAMES)


def find_checkpoint(run_dir: Path) -> SavedRun | None:
    """Finds the newest intact checkpoint of a run.

    Returns:
        The checkpoint, with a warning if a newer one is damaged; None if the run has saved none.

    Raises:
        RequestError: There are checkpoints, and none is intact; or the run has a result and no checkpoint.
    """
    folder = run_dir / CHECKPOINTS
    damaged: list[str] = []
    for path in (folder / name for name in NAMES):
        if not path.exists():
            continue
        try:
            return read_run(path, *(f"{problem}; resuming from {path}" for problem in damaged))
        except (CheckpointError, UndeclaredContent) as error:
            damaged.append(str(error))
    if damaged:
        raise RequestError(f"{damaged[0]}\n{folder} has no intact checkpoint to resume from")
    if (run_dir / "model").exists():
        raise RequestError(
            f"{run_dir} holds the result of a run, but no checkpoint to resume from: choose another run_dir"
        )
    return None


def check_resumption(saved: SavedRun, config: Config, data: DataModule, teacher: Teacher | None) -> None:
    """Checks that a checkpoint was saved by this run, with the same data and teacher, and within its epochs.

    Args:
        saved: The checkpoint to resume from.
        config: The run.
        data: Its data, after `setup`.
        teacher: Its teacher, if it has one.

    Raises:
        RequestError: The checkpoint does not fit, or the best weights of the run are lost.
    """
    _check_same_run(saved, config)
    _check_same_data(saved, config, data)
    if saved.teacher is not None and teacher is not None and teacher.fingerprint != saved.teacher:
        raise RequestError(
            f"optim.distill_from={config.optim.distill_from} has changed since {saved.path} was saved: the teacher has "
            "other weights or another preprocessing\nrestore it, or start a new run with another run_dir"
        )
    if saved.epochs > config.trainer.max_epochs:
        raise RequestError(
            f"trainer.max_epochs={config.trainer.max_epochs}, but {saved.path} is in epoch {saved.epochs}: "
            f"set trainer.max_epochs to {saved.epochs} or more"
        )
    if saved.best_epoch is not None:
        _check_best(saved.path.with_name("best.ckpt"), config)


def _check_same_run(saved: SavedRun, config: Config) -> None:
    if differences := differing_settings(saved.config, config, saved.path):
        raise RequestError(
            f"{saved.path} and {Path(config.run_dir, 'config.yaml')} are not of the same run: {differences}\n"
            "restore the file that has changed, or choose another run_dir for another run"
        )


def _check_same_data(saved: SavedRun, config: Config, data: DataModule) -> None:
    before, now = (
        {f"class {i}": repr(name) for i, name in enumerate(n)} for n in (saved.class_names, data.class_names)
    )
    if saved.fingerprints is not None:
        before |= {f"{name} split": text for name, text in saved.fingerprints.items()}
        now |= {f"{name} split": text for name, text in data.fingerprints.items()}
    if differences := describe_differences(before, now):
        raise RequestError(
            f"data={config.data.name} has changed since {saved.path} was saved: {differences}\n"
            "restore the data, or start a new run with another run_dir"
        )


def _check_best(path: Path, config: Config) -> None:
    try:
        best = read_run(path)
    except (CheckpointError, UndeclaredContent) as error:
        raise RequestError(
            f"{error}\nit held the best weights so far, without which the run has no result: restore it, or start a "
            "new run with another run_dir"
        ) from error
    _check_same_run(best, config)
