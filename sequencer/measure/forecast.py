"""The plan of a run: its size, and a forecast of its time, memory and disk space from a few steps that are timed.

The steps run as in training, with the loaders, callbacks and checkpoints of the run, in a temporary folder.
"""

import dataclasses
import math
import resource
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sequencer import distributed
from sequencer.config.schema import Config
from sequencer.config.sources import Sources
from sequencer.data import DataModule
from sequencer.measure.plan_result import RATES, Measured, Plan, print_plan, print_values
from sequencer.measure.problems import find_data_problems, find_disk_problems
from sequencer.measure.short_run import Clock, without_end
from sequencer.training.launch import launch, uses_gpu
from sequencer.training.module import compile_in_place, parameters_of
from sequencer.training.optim import build_optimizer, build_schedule
from sequencer.training.result import limited
from sequencer.training.setup import Parts, build_parts

PILOT_BATCHES = 4
SECONDS = 8.0  # of training steps in each of three epochs, the first of which is a warm-up


def plan(config: Config, sources: Sources, trials: int = 1) -> Plan:
    """Prints the plan of a run and returns it; nothing that is trained or written is kept.

    Args:
        config: The run.
        sources: Where its values come from.
        trials: Number of trials, if the run is the first trial of a sweep.

    Raises:
        RequestError: As for the run itself.
    """
    launch(config)
    distributed.join(uses_gpu(config))
    with TemporaryDirectory(prefix="plan") as folder:
        folder = distributed.from_first(folder)
        parts = build_parts(dataclasses.replace(config, run_dir=str(Path(folder, "whole"))))
        problems = find_data_problems(parts.data, config)
        batches, val_batches, test_batches = _count_batches(parts.data, config)
        updates, per_epoch = _count_updates(config, batches)
        rates = _sample_rates(config, parts.model, updates, per_epoch)
        flops = _count_flops(parts.model, config)
        measured = _measure(config, Path(folder), batches, val_batches)
    epochs = updates / per_epoch
    result = Plan(
        batches=batches,
        updates=updates,
        epochs=epochs,
        images=batches * min(config.data.batch_size, len(parts.data.train_set)),
        parameters=parameters_of(parts.model),
        rates=rates,
        measured=measured,
        train_s=measured.start_s
        + epochs * (batches * measured.step_s + val_batches * measured.val_s + measured.rest_s),
        test_s=test_batches * measured.val_s,
        flops=flops,
        problems=problems + find_disk_problems(Path(config.run_dir), trials * measured.disk),
    )
    if distributed.is_first():
        print_values(config, sources)
        print_plan(result, config, parts.description, trials)
    return result


def _count_batches(data: DataModule, config: Config) -> tuple[int, int, int]:
    """Batches of training and validation per epoch, and of the test."""
    trainer = config.trainer
    train = limited(len(data.train_dataloader()), trainer.limit_train_batches)
    val = limited(len(data.val_dataloader()), trainer.limit_val_batches)
    test = 0 if data.test_set is None else limited(len(data.test_dataloader()), trainer.limit_test_batches)
    return train, val, test


def _count_updates(config: Config, batches: int) -> tuple[int, int]:
    """Updates in all and per epoch."""
    per_epoch = math.ceil(batches / config.trainer.accumulate_grad_batches)
    updates = config.trainer.max_epochs * per_epoch
    if config.trainer.max_steps >= 0:
        updates = min(updates, config.trainer.max_steps)
    return updates, per_epoch


def _sample_rates(config: Config, model: nn.Module, updates: int, per_epoch: int) -> list[float]:
    optimizer = build_optimizer(model, config.optim)
    schedule = build_schedule(optimizer, config.optim, updates, per_epoch)
    rates = []
    for number in range(RATES):
        schedule.step_update(round(number * updates / (RATES - 1)))
        rates.append(max(group["lr"] for group in optimizer.param_groups))
    return rates


def _count_flops(model: nn.Module, config: Config) -> int:
    """Operations of forward and backward pass on one image; a multiplication with an addition counts as two."""
    images = torch.randn(2, config.data.in_chans, config.data.img_size, config.data.img_size)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    model.zero_grad()
    return counter.get_total_flops() // 2


def _measure(config: Config, folder: Path, batches: int, val_batches: int) -> Measured:
    """Times three short epochs, whose number of batches a pilot run determines."""
    pilot = Clock()
    few = min(PILOT_BATCHES, batches)
    _fit(without_end(config, folder / "pilot", **_limits(1, few, 1)), pilot)
    step_s = mean(pilot.steps[0][1:] or pilot.steps[0])
    number = min(batches, max(few, round(SECONDS / step_s)))
    val_number = min(val_batches, max(2, round(SECONDS / 3 / max(pilot.validations[0], 1e-9))))
    number, val_number = distributed.from_first((number, val_number))  # every rank takes the same steps
    clock, run_dir = Clock(), folder / "timed"
    parts = _fit(without_end(config, run_dir, **_limits(3, number, val_number)), clock)
    steps = clock.steps[1]
    step_s, val_s = mean(steps[1:] or steps), clock.validations[1] / val_number
    first_s, second_s = clock.epochs[1] - clock.epochs[0], clock.epochs[2] - clock.epochs[1]
    rest_s = max(second_s - number * step_s - clock.validations[1], 0.0)
    if torch.cuda.is_available() and parts.trainer.strategy.root_device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    checkpoint = max((path.stat().st_size for path in run_dir.glob("checkpoints/*.ckpt")), default=0)
    disk = 3 * checkpoint + 4 * parameters_of(parts.model)  # last, previous and best; the model folder
    return Measured(step_s, val_s, rest_s, max(first_s - second_s, 0.0), memory, disk)


def _limits(epochs: int, batches: int, val_batches: int) -> dict[str, Any]:
    return {"max_epochs": epochs, "limit_train_batches": batches, "limit_val_batches": val_batches}


def _fit(config: Config, clock: Clock) -> Parts:
    parts = build_parts(config, clock)
    if config.trainer.compile:
        compile_in_place(parts.model)
    parts.trainer.fit(parts.module, datamodule=parts.data)
    return parts
