"""What several test modules share."""

import csv
import functools
import importlib
import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from sequencer.config import Config, DataConfig, compose
from sequencer.export import save_model_folder
from sequencer.models import (
    CheckpointError,
    LoadedModel,
    create_model,
    load_model,
    read_checkpoint,
    timm_preprocessing,
)
from sequencer.training import run

SCRIPTS = Path(__file__).parents[1] / "scripts"
ARGS = {"layers": [1], "patch_sizes": [2], "embed_dims": [16], "hidden_sizes": [4]}  # of a model small enough for tests
DIGITS = DataConfig(
    name="digits",
    num_classes=10,
    in_chans=1,
    img_size=8,
    mean=[0.3],
    std=[0.4],
    default_model="sequencer2d_t_8",
    num_workers=0,
)

FIGURES = {  # of a model of two classes, as config.json has them
    "split": "test",
    "images": 40,
    "top1": 0.75,
    "top1_interval": (0.6, 0.86),
    "loss": 0.8125,
    "calibration_error": 0.05,
    "operations": 4_130_000,
    "confusion": [[18, 2], [8, 12]],
}

# overrides of a run of two short epochs, which takes about a second
SMALL = [
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "optim.opt=adamw",
    "optim.lr=3e-3",
    "optim.warmup_epochs=0",
    "trainer.limit_train_batches=4",
    "trainer.enable_progress_bar=false",
    "logger.report=false",
    "data.num_workers=0",
    "data.batch_size=32",
]
SMALL_MODEL = "model.kwargs={layers: [1], patch_sizes: [2], embed_dims: [16], hidden_sizes: [4]}"
EMA = ["optim.ema_decay=0.9", "trainer.slot=ema", "trainer.best_metric=val_ema/top1"]
# everything that draws random numbers
RANDOM = ["data.augment.mixup=0.4", "data.augment.crop_padding=1", "model.drop_path_rate=0.3", "model.drop_rate=0.2"]
# everything that a checkpoint has to hold; what interrupted and resumed runs are compared with
STATEFUL = [*RANDOM, *EMA, "optim.opt=nmuon", "trainer.max_epochs=3", "trainer.accumulate_grad_batches=2"]
STATEFUL += ["trainer.early_stopping_patience=5"]


def save_run(folder: Path, data: DataConfig, class_names: list[str], seed: int = 0, **entries) -> Path:
    """Writes the files of a run folder that evaluation reads: untrained weights and the configuration.

    The head is drawn at random, because a new head is zero. `entries` are added to the data section.
    """
    torch.manual_seed(seed)
    size = {"in_chans": data.in_chans, "img_size": data.img_size}
    model = create_model("sequencer2d_t_8", num_classes=len(class_names), **size, **ARGS)
    torch.nn.init.normal_(model.get_classifier().weight)
    about = {"config": {"data": asdict(data) | entries}}
    cfg = timm_preprocessing(asdict(data))
    loaded = LoadedModel(model, "sequencer2d_t_8", "raw", tuple(class_names), cfg, size | ARGS, about)
    save_model_folder(loaded, folder / "model")
    (folder / "config.yaml").touch()
    return folder


def refused(source: Path, *said: str, **options) -> str:
    """The message with which a model is refused, in at most two lines that contain all texts of `said`."""
    with pytest.raises(CheckpointError) as error:
        load_model(source, **options)
    message = str(error.value)
    assert len(message.splitlines()) <= 2
    for text in (str(source), *said):
        assert text in message
    return message


def edit(folder: Path, **entries: Any) -> None:
    """Replaces entries of a model folder's `config.json`."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def exit_code(script: ModuleType, arguments: list[str]) -> int:
    """The exit code of a script, whether its work or argparse ends it."""
    try:
        return script.main(arguments)
    except SystemExit as error:
        return error.code


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def small_config(run_dir: Path, *overrides: str) -> Config:
    """Composes a small run on the digits."""
    inherits = any(override.startswith("init_from=") for override in overrides)  # from files that a test may change
    config = (_compose_small if inherits else _composed_before)(*overrides)
    return replace(deepcopy(config), run_dir=str(run_dir))


def _compose_small(*overrides: str) -> Config:
    model = [] if any(override.startswith("model.name=") for override in overrides) else [SMALL_MODEL]
    return compose([*SMALL, *model, "run_dir=run", *overrides])


_composed_before = functools.cache(_compose_small)  # composing takes as long as several batches


def read_rows(run_dir: Path) -> list[dict[str, str]]:
    """Reads metrics.csv."""
    return read_csv(run_dir / "metrics.csv")


def read_last(run_dir: Path) -> dict[str, Any]:
    """Reads the last checkpoint of a run."""
    return read_checkpoint(run_dir / "checkpoints" / "last.ckpt")


def equal_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_equal_states(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Compares an optimizer's states of two parameters, tensors bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]


def assert_same_run(whole: Path, broken: Path) -> None:
    """Compares weights, averages, optimizer states, random states and rows bit for bit."""
    for name in ("last.ckpt", "best.ckpt"):
        a, b = (read_checkpoint(folder / "checkpoints" / name) for folder in (whole, broken))
        assert equal_tensors(a["state_dict"], b["state_dict"])
        assert equal_tensors(a["state_dict_ema"], b["state_dict_ema"])
        for x, y in zip(*(c["optimizer_states"][0]["state"].values() for c in (a, b)), strict=True):
            assert_equal_states(x, y)
        for x, y in zip(a["ranks"], b["ranks"], strict=True):
            assert torch.equal(x["random"].pop("torch"), y["random"].pop("torch"))
            assert x == y
        assert a["train_totals"] == b["train_totals"]
    untimed = [
        [{key: value for key, value in row.items() if not key.startswith("time/")} for row in read_rows(folder)]
        for folder in (whole, broken)
    ]
    assert untimed[0] == untimed[1]


class Interrupt(pl.Callback):
    """Calls `action` in the second epoch of a run: before its third batch, or as its validation begins."""

    def __init__(self, action: Callable[[], None], hook: str) -> None:
        self.action, self.hook = action, hook

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.hook == "training" and trainer.current_epoch == 1 and batch_idx == 2:
            self.action()

    def on_validation_batch_start(self, trainer, *args) -> None:
        if self.hook == "validation" and trainer.current_epoch == 1:
            self.action()


def run_interrupted(
    config: Config, action: Callable[[], None], expected: type[BaseException], hook: str = "training", *, resume=False
) -> BaseException:
    """Runs until `action` interrupts the second epoch; returns the exception, which has to be of the expected type."""
    module = importlib.import_module("sequencer.training.setup")
    build = module._build_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_build_trainer", lambda c, callbacks: build(c, [Interrupt(action, hook), *callbacks]))
        with pytest.raises(expected) as error:
            run(config, resume=resume)
    return error.value


def fail() -> None:
    raise RuntimeError("power failure")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fill(folder: Path) -> None:
    """Fills the file system of a folder."""
    with open(folder / "filler", "ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1024))
