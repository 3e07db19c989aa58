"""Every private interface of PyTorch Lightning that the package relies on, each with the version it was read in.

Lightning documents its hooks and the Trainer's attributes, but not the progress counters of its loops, which are
needed to resume a run within an epoch. The bound on `pytorch-lightning` in `pyproject.toml` stands for this file.
"""

from typing import Any

import pytorch_lightning as pl


def training_progress(trainer: pl.Trainer) -> tuple[int, int]:
    """Position of the training loop: the current epoch and how many of its batches have been trained on.

    Between two epochs it is the next epoch with 0 batches, whereas `trainer.fit_loop` still holds the batches of the
    last one. Read in 2.6.6: `_FitLoop.epoch_progress` and `_TrainingEpochLoop.batch_progress`.
    """
    loop: Any = trainer.fit_loop
    epoch = loop.epoch_progress.current
    between_epochs = epoch.processed == epoch.started
    return epoch.processed, 0 if between_epochs else loop.epoch_loop.batch_progress.current.ready


def restart_validation(checkpoint: dict[str, Any]) -> None:
    """Edits a checkpoint saved during validation so that resuming repeats the validation from its first batch.

    Lightning skips a validation that was interrupted between two batches, or before its first one, and repeats one
    whose counters say that its first batch has started. Read in 2.6.6: the layout of `checkpoint["loops"]` and
    `_EvaluationLoop.update_restart_stage`.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    for counters in (progress["total"], progress["current"]):
        counters |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def stop_loader_workers(trainer: pl.Trainer) -> None:
    """Ends the worker processes of the training and validation loaders.

    When a fit is interrupted during validation, Lightning ends those of the validation loader only; the others would
    delay the exit of the process by 5 s each. Read in 2.6.6: `Trainer._teardown` and `_FitLoop.teardown`.
    """
    trainer.fit_loop.teardown()
