"""What a run will be and what it will take, told before it is paid for: its first steps are taken and timed.

The steps run as in training, with the run's own loaders, callbacks and checkpoints, in a folder that is thrown away.
"""

import dataclasses
import math
import resource
import shutil
import time
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback
from rich import get_console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sequencer import distributed
from sequencer.config.schema import Config, leaves
from sequencer.config.sources import SCHEMA, Sources
from sequencer.data import DataModule, TooManyBadImages
from sequencer.training.launch import launch, uses_gpu
from sequencer.training.module import compile_in_place, parameters_of
from sequencer.training.optim import build_optimizer, build_schedule
from sequencer.training.result import limited
from sequencer.training.setup import Parts, build_parts

PILOT_BATCHES = 4
SECONDS = 8.0  # of training steps in each of three epochs, of which the first warms up
MOST_IMAGES = 500  # of a part, which are looked at
BARS = "▁▂▃▄▅▆▇█"


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of a step, of a validation batch, of the rest of an epoch and of the first start; bytes."""

    step_s: float
    val_s: float
    rest_s: float
    start_s: float
    memory: int
    disk: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run's size and forecast; `train_s` is what its `time/train_s` is expected to be."""

    batches: int  # of an epoch
    updates: int
    epochs: float
    rates: list[float]  # learning rate at 60 times from the first update to after the last
    measured: Measured
    train_s: float
    test_s: float
    flops: int  # of training, per image
    problems: list[str]


def plan(config: Config, sources: Sources, trials: int = 1) -> Plan:
    """Prints the plan of a run and returns it; trains nothing that is kept and writes nothing.

    Args:
        sources: where the values come from.
        trials: of the sweep that the run is the first of.

    Raises:
        RequestError: as for the run itself.
    """
    launch(config)
    distributed.join(uses_gpu(config))
    with TemporaryDirectory(prefix="plan") as folder:
        folder = distributed.from_first(folder)
        parts = build_parts(dataclasses.replace(config, run_dir=str(Path(folder, "whole"))))
        problems = _problems(parts.data, config)
        batches = limited(len(parts.data.train_dataloader()), config.trainer.limit_train_batches)
        val_batches = limited(len(parts.data.val_dataloader()), config.trainer.limit_val_batches)
        test_batches = 0
        if parts.data.test_set is not None:
            test_batches = limited(len(parts.data.test_dataloader()), config.trainer.limit_test_batches)
        per_epoch = math.ceil(batches / config.trainer.accumulate_grad_batches)
        updates = config.trainer.max_epochs * per_epoch
        if config.trainer.max_steps >= 0:
            updates = min(updates, config.trainer.max_steps)
        epochs = updates / per_epoch
        rates = _rates(config, parts.model, updates, per_epoch)
        flops = _flops(parts.model, config)
        measured = _measure(config, Path(folder), batches, val_batches)
    train_s = measured.start_s + epochs * (batches * measured.step_s + val_batches * measured.val_s + measured.rest_s)
    result = Plan(
        batches, updates, epochs, rates, measured, train_s, test_batches * measured.val_s, flops, problems
    )  # fmt: skip
    if distributed.is_first():
        _print_values(config, sources)
        _print(result, config, parts, trials)
    return result


def without_end(config: Config, run_dir: Path, **trainer: Any) -> Config:
    """The run in another folder with another number of epochs and batches, ended by nothing else, and silent."""
    ends = {"max_steps": -1, "early_stopping_patience": None, "max_loss": math.inf, "enable_progress_bar": False}
    section = dataclasses.replace(config.trainer, **ends | trainer)
    return dataclasses.replace(config, run_dir=str(run_dir), trainer=section)


def _measure(config: Config, folder: Path, batches: int, val_batches: int) -> Measured:
    pilot = Clock()
    few = min(PILOT_BATCHES, batches)
    _fit(without_end(config, folder / "pilot", **_limits(1, few, 1)), pilot)
    step_s = mean(pilot.steps[0][1:] or pilot.steps[0])
    number = min(batches, max(few, round(SECONDS / step_s)))
    val_number = min(val_batches, max(2, round(SECONDS / 3 / max(pilot.validations[0], 1e-9))))
    number, val_number = distributed.from_first((number, val_number))  # all processes take the same steps
    clock, run_dir = Clock(), folder / "timed"
    parts = _fit(without_end(config, run_dir, **_limits(3, number, val_number)), clock)
    steps = clock.steps[1]
    step_s, val_s = mean(steps[1:] or steps), clock.validations[1] / val_number
    epochs = [later - earlier for earlier, later in zip(clock.epochs, clock.epochs[1:], strict=False)]
    rest_s = max(epochs[1] - number * step_s - clock.validations[1], 0.0)
    if torch.cuda.is_available() and parts.trainer.strategy.root_device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    last = max((path.stat().st_size for path in run_dir.glob("checkpoints/*.ckpt")), default=0)
    disk = 3 * last + 4 * parameters_of(parts.model)  # last, previous and best; the model folder
    return Measured(step_s, val_s, rest_s, max(epochs[0] - epochs[1], 0.0), memory, disk)


def _limits(epochs: int, batches: int, val_batches: int) -> dict[str, Any]:
    return {"max_epochs": epochs, "limit_train_batches": batches, "limit_val_batches": val_batches}


def _fit(config: Config, clock: "Clock") -> Parts:
    parts = build_parts(config, clock)
    if config.trainer.compile:
        compile_in_place(parts.model)
    parts.trainer.fit(parts.module, datamodule=parts.data)
    return parts


class Clock(Callback):
    """Seconds of every step and every validation, by epoch, and the times at which epochs start."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.steps: list[list[float]] = []
        self.validations: list[float] = []
        self._last = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append(self._lap(trainer)[1])
        self.steps.append([])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.steps[-1].append(self._lap(trainer)[0])

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lap(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validations.append(self._lap(trainer)[0])

    def _lap(self, trainer: pl.Trainer) -> tuple[float, float]:
        """Seconds since the last lap, and the time."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        before, self._last = self._last, time.perf_counter()
        return self._last - before, self._last


def _rates(config: Config, model: nn.Module, updates: int, per_epoch: int) -> list[float]:
    optimizer = build_optimizer(model, config.optim)
    schedule = build_schedule(optimizer, config.optim, updates, per_epoch)
    rates = []
    for number in range(60):
        schedule.step_update(round(number * updates / 59))
        rates.append(max(group["lr"] for group in optimizer.param_groups))
    return rates


def _flops(model: nn.Module, config: Config) -> int:
    """Of a training step on one image: forward and backward, a product and a sum counted as two."""
    images = torch.randn(2, config.data.in_chans, config.data.img_size, config.data.img_size)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    model.zero_grad()
    return counter.get_total_flops() // 2


def _problems(data: DataModule, config: Config) -> list[str]:
    """What is wrong with the images and labels, as far as a look at some of them tells."""
    found = []
    for name, split in data.splits.items():
        if split.labels is not None and (missing := set(range(data.num_classes)) - set(split.labels.tolist())):
            named = ", ".join(data.class_names[label] for label in sorted(missing)[:5])
            found.append(f"{name}: no image of {len(missing)} classes: {named}{', ...' if len(missing) > 5 else ''}")
        try:
            decoded, bad = split.probe(MOST_IMAGES)
        except TooManyBadImages as error:
            found.append(f"{name}: {error}")
            continue
        if bad:
            found.append(f"{name}: {len(bad)} of {decoded} images looked at cannot be read, e.g. {bad[0]}")
    if config.data.batch_size > len(data.train_set):
        found.append(f"train: data.batch_size={config.data.batch_size} is more than its {len(data.train_set)} images")
    return found


def _print_values(config: Config, sources: Sources) -> None:
    values = leaves(OmegaConf.to_container(OmegaConf.structured(config)))
    for key, value in values.items():
        line = f"{key:<34} {value!s:<28} {sources[key]}"
        get_console().print(line, style=None if sources[key] != SCHEMA else "dim", soft_wrap=True, highlight=False)


def _print(plan: Plan, config: Config, parts: Parts, trials: int) -> None:
    measured, say = plan.measured, get_console().print
    passes = config.trainer.accumulate_grad_batches
    say(f"\n{config.model.name}, {parameters_of(parts.model):,} parameters", highlight=False)
    for line in parts.description[1:]:
        say(line, highlight=False, soft_wrap=True)
    images = plan.batches * min(config.data.batch_size, len(parts.data.train_set))
    say(
        f"{plan.updates:,} updates in {plan.epochs:g} epochs of {plan.batches:,} batches"
        f"{f', {passes} an update' if passes > 1 else ''}; {images:,} images an epoch"
    )
    say(f"learning rate {_sparkline(plan.rates)}", highlight=False)
    say(f"  {plan.rates[0]:.3g} first, {max(plan.rates):.3g} highest, {plan.rates[-1]:.3g} last", highlight=False)
    say(f"{plan.flops / 1e9:.3g} GFLOP an image, forward and backward; {plan.flops * images / 1e12:.3g} TFLOP an epoch")
    speed = config.data.batch_size / measured.step_s
    say(f"measured: {1e3 * measured.step_s:.1f} ms a batch of training, {speed:.0f} images/s; peak memory "
        f"{measured.memory / 2**20:.0f} MiB", soft_wrap=True)  # fmt: skip
    about = "at most " if config.trainer.early_stopping_patience else ""
    say(f"forecast: {about}{_duration(plan.train_s)} of training, {_duration(plan.test_s)} of testing"
        f"{f'; {trials} trials {_duration(trials * (plan.train_s + plan.test_s))}' if trials > 1 else ''}")  # fmt: skip
    say(f"disk: {trials * measured.disk / 2**20:.0f} MiB in {config.run_dir}", soft_wrap=True)
    for problem in [*plan.problems, *_disk_problem(config, trials * measured.disk)] or ["none found"]:
        say(f"problems: {problem}", soft_wrap=True, highlight=False)


def _disk_problem(config: Config, needed: int) -> list[str]:
    folder = Path(config.run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return [f"disk: {free / 2**20:.0f} MiB are free in {folder}"] if free < needed else []


def _sparkline(values: list[float]) -> str:
    highest = max(values) or 1.0
    return "".join(BARS[round(value / highest * (len(BARS) - 1))] for value in values)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
