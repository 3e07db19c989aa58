"""The plan of a run: its size, and a forecast of its time, memory and disk space from a few steps that are timed.

A plan has a deadline, which the clock of rank 0 decides: what is not known by then is left out, and said.
"""

import dataclasses
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from sequencer import distributed
from sequencer.config.schema import Config
from sequencer.config.sources import Sources
from sequencer.data import DataModule
from sequencer.measure.budget import OutOfTime, available_memory, together_until, until
from sequencer.measure.measurement import LARGEST_SHARE, images_per_batch, measure
from sequencer.measure.plan_result import RATES, Plan, print_plan, print_problems, print_values
from sequencer.measure.problems import (
    find_data_problems,
    find_disk_problems,
    find_memory_problems,
    find_weights_problems,
)
from sequencer.measure.progress import stages
from sequencer.measure.size import Size, count_parameters, estimate_size
from sequencer.training.launch import launch, training_device, uses_gpu
from sequencer.training.module import size_phases
from sequencer.training.optim import build_optimizer, build_schedule
from sequencer.training.result import limited
from sequencer.training.setup import Parts, build_data, build_parts

LIMIT = 45.0  # s that a plan may take, imports included, after which it is printed without what is missing
LEAST = 15.0  # s that it has after the imports
OPENING, SIZING, EXAMINING = 20.0, 9.0, 5.0  # s of these for opening the data, the size of a step, and the images
STARTED = "SEQUENCER_PLAN_STARTED"  # environment variable in which the ranks find when their command was started


def plan(config: Config, sources: Sources, trials: int = 1, started: float | None = None, full: bool = False) -> Plan:
    """Prints the plan of a run and returns it; nothing that is trained or written is kept.

    Args:
        config: The run.
        sources: Where its values come from.
        trials: Number of trials, if the run is the first trial of a sweep.
        started: When the command started, before its imports, in seconds of `time.monotonic`; by default now.
        full: Print every value of the configuration, not only those that differ from their defaults.

    Raises:
        RequestError: As for the run itself.
        RuntimeError: The data could not be opened in time.
    """
    started = float(os.environ.get(STARTED) or started or time.monotonic())
    launch(config, {STARTED: str(started)})
    distributed.join(uses_gpu(config))
    now = time.monotonic()
    deadline = now + distributed.from_first(max(started + LIMIT - now, LEAST))
    problems = find_weights_problems(config)
    asked, model = config, dataclasses.replace(config.model, pretrained=False)  # no download
    config = dataclasses.replace(config, model=model)
    available = distributed.from_first(available_memory(training_device(config)))
    with TemporaryDirectory(prefix="plan", ignore_cleanup_errors=True) as folder, stages() as show:
        folder = distributed.from_first(folder)
        whole = dataclasses.replace(config, run_dir=str(Path(folder, "whole")))
        show("opening the data")
        data = _open_data(whole, deadline)
        show("counting the operations of a step")
        size = distributed.on_first(lambda: _size(config, data.num_classes, deadline))
        images = images_per_batch(config, data)
        needed = size.memory(config, images)
        show("building the model and the optimizer")
        parts = _build(whole, data, deadline, size.memory(config, 0) < LARGEST_SHARE * available)
        show("examining images")
        problems += _examine(data, config, deadline)
        problems += find_memory_problems(needed, available)
        batches, val_batches, test_batches = _count_batches(data, config)
        updates, per_epoch = _count_updates(config, batches)
        rates = _sample_rates(config, parts.model, updates, per_epoch)
        show("timing training steps")
        measured = measure(config, Path(folder), batches, val_batches, data, size, available, deadline)
    epochs = updates / per_epoch
    share = _share_of_pixels(config)
    result = Plan(
        batches=batches,
        updates=updates,
        epochs=epochs,
        images=batches * images * distributed.world_size(),
        parameters=size.parameters,
        rates=rates,
        measured=measured,
        train_s=measured.start_s
        + epochs * (batches * measured.step_s * share + val_batches * measured.val_s + measured.rest_s),
        test_s=test_batches * measured.val_s,
        flops=size.flops,
        problems=problems + find_disk_problems(Path(config.run_dir), trials * measured.disk),
    )
    if distributed.is_first():
        print_problems(result.problems)
        print_values(asked, sources, full)
        print_plan(result, config, [*parts.description, *parts.details], trials)
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


def _share_of_pixels(config: Config) -> float:
    """Pixels of all training images over those that they would have at the full size; a step costs as much."""
    full, epochs = config.data.img_size, config.trainer.max_epochs
    phases = size_phases(config.data.augment.sizes or [full], epochs)
    return sum(size**2 * (end - first) for size, first, end in phases) / (epochs * full**2)


def _sample_rates(config: Config, model: nn.Module, updates: int, per_epoch: int) -> list[float]:
    optimizer = build_optimizer(model, config.optim)
    schedule = build_schedule(optimizer, config.optim, updates, per_epoch)
    rates = []
    for number in range(RATES):
        schedule.step_update(round(number * updates / (RATES - 1)))
        rates.append(max(group["lr"] for group in optimizer.param_groups))
    return rates


def _open_data(config: Config, deadline: float) -> DataModule:
    data = build_data(config)
    try:
        with together_until(min(deadline, time.monotonic() + OPENING)):
            distributed.one_by_one(data.setup)
    except OutOfTime:
        raise RuntimeError(
            f"data={config.data.name} could not be opened within {OPENING:.0f} s, and a plan needs its number of images"
            "\nthe run itself waits for as long as it takes"
        ) from None
    return data


def _size(config: Config, num_classes: int, deadline: float) -> Size:
    """Returns the size of a step, if need be from images of a fraction of the height and width.

    Recurrences other than the LSTM have several operations per step. Their cost is proportional to the number of
    tokens; the memory is an upper bound, since it counts copies of weights as well. If there is no time for that
    either, the parameters alone are counted.
    """
    for part in (1, 4, 8):
        with suppress(OutOfTime), until(min(deadline, time.monotonic() + SIZING)):
            size = estimate_size(config, num_classes, config.model.img_size // part)
            return Size(size.parameters, size.flops * part**2, size.activations * part**2)
    return Size(count_parameters(config, num_classes))


def _build(config: Config, data: DataModule, deadline: float, fits: bool) -> Parts:
    """Builds the components of the run, without memory for the weights where there is not enough, or no time."""
    if fits:
        alone = distributed.world_size() == 1
        try:
            with together_until(deadline - (deadline - time.monotonic()) / 2 if alone else deadline):
                return build_parts(config, data=data)
        except OutOfTime:
            pass
    optim = dataclasses.replace(config.optim, distill_from=None)
    with torch.device("meta"):
        return build_parts(dataclasses.replace(config, optim=optim, init_from=None), data=data)


def _examine(data: DataModule, config: Config, deadline: float) -> list[str]:
    if not distributed.is_first():  # which prints the problems
        return []
    try:
        with until(min(deadline, time.monotonic() + EXAMINING)):
            return find_data_problems(data, config)
    except OutOfTime:
        return [f"data: examining the images took more than {EXAMINING:.0f} s and was given up: reading them is slow"]
