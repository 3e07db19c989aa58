"""The plan of a run: its size, and a forecast of its time, memory and disk space from a few steps that are timed.

The steps run as in training, with the loaders, callbacks and checkpoints of the run, in a temporary folder. A plan has
a deadline: batches that take too long or too much memory are replaced by smaller ones, whose times are scaled up.
"""

import dataclasses
import math
import resource
import time
from contextlib import suppress
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import torch
from torch import nn

from sequencer import distributed
from sequencer.config.schema import Config
from sequencer.config.sources import Sources
from sequencer.data import DataModule
from sequencer.measure.budget import OutOfTime, available_memory, until
from sequencer.measure.machine import timed
from sequencer.measure.plan_result import RATES, Measured, Plan, print_plan, print_values
from sequencer.measure.problems import (
    find_data_problems,
    find_disk_problems,
    find_memory_problems,
    find_weights_problems,
)
from sequencer.measure.short_run import Clock, without_end
from sequencer.measure.size import Size, estimate_size
from sequencer.training.launch import launch, training_device, uses_gpu
from sequencer.training.module import compile_in_place
from sequencer.training.optim import build_optimizer, build_schedule
from sequencer.training.result import limited
from sequencer.training.setup import Parts, build_data, build_parts

LIMIT = 45.0  # s that a plan may take, imports included, after which it is printed without what is missing
LEAST = 15.0  # s that it has after the imports
OPENING, SIZING, EXAMINING = 20.0, 9.0, 5.0  # s of these for opening the data, the size of a step, and the images
PILOT_BATCHES = 4
SECONDS = 8.0  # of training steps in each of three epochs, the first of which is a warm-up
FIRST_STEP = 0.3  # s of the pilot's steps at the rate of a matrix product, several times that in fact
SLOWEST_STEP = 4.0  # s, likewise, of a step with two images; a slower one is not measured
LARGEST_SHARE = 0.5  # of the available memory that a measurement may take


def plan(config: Config, sources: Sources, trials: int = 1, started: float | None = None) -> Plan:
    """Prints the plan of a run and returns it; nothing that is trained or written is kept.

    Args:
        config: The run.
        sources: Where its values come from.
        trials: Number of trials, if the run is the first trial of a sweep.
        started: When the command started, before its imports, in seconds of `time.monotonic`; by default now.

    Raises:
        RequestError: As for the run itself.
        RuntimeError: The data could not be opened in time.
    """
    launch(config)
    distributed.join(uses_gpu(config))
    now = time.monotonic()
    deadline = max((now if started is None else started) + LIMIT, now + LEAST)
    problems = find_weights_problems(config)
    asked, model = config, dataclasses.replace(config.model, pretrained=False)  # no download
    config = dataclasses.replace(config, model=model)
    available = available_memory(training_device(config))
    with TemporaryDirectory(prefix="plan", ignore_cleanup_errors=True) as folder:
        folder = distributed.from_first(folder)
        whole = dataclasses.replace(config, run_dir=str(Path(folder, "whole")))
        data = _open_data(whole, deadline)
        size = _size(config, data.num_classes, deadline)
        images = _images_per_batch(config, data)
        needed = size.memory(config, images)
        parts = _build(whole, data, deadline, size.memory(config, 0) < LARGEST_SHARE * available)
        problems += _examine(data, config, deadline)
        problems += find_memory_problems(needed, available)
        batches, val_batches, test_batches = _count_batches(data, config)
        updates, per_epoch = _count_updates(config, batches)
        rates = _sample_rates(config, parts.model, updates, per_epoch)
        measured = _measure(config, Path(folder), batches, val_batches, data, size, deadline)
    epochs = updates / per_epoch
    result = Plan(
        batches=batches,
        updates=updates,
        epochs=epochs,
        images=batches * images * distributed.world_size(),
        parameters=size.parameters,
        rates=rates,
        measured=measured,
        train_s=measured.start_s
        + epochs * (batches * measured.step_s + val_batches * measured.val_s + measured.rest_s),
        test_s=test_batches * measured.val_s,
        flops=size.flops,
        problems=problems + find_disk_problems(Path(config.run_dir), trials * measured.disk),
    )
    if distributed.is_first():
        print_values(asked, sources)
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
        with until(min(deadline, time.monotonic() + OPENING)):
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
    tokens; the memory is an upper bound, since it counts copies of weights as well.

    Raises:
        RuntimeError: It could not be found in time.
    """
    for part in (1, 4, 8):
        with suppress(OutOfTime), until(min(deadline, time.monotonic() + SIZING)):
            size = estimate_size(config, num_classes, config.model.img_size // part)
            return Size(size.parameters, size.flops * part**2, size.activations * part**2)
    raise RuntimeError(f"the size of a step of {config.model.name} could not be found within {3 * SIZING:.0f} s")


def _images_per_batch(config: Config, data: DataModule) -> int:
    """Images of a training batch on one device."""
    return max(1, min(config.data.batch_size, len(data.train_set)) // distributed.world_size())


def _build(config: Config, data: DataModule, deadline: float, fits: bool) -> Parts:
    """Builds the components of the run, without memory for the weights where there is not enough, or no time."""
    if fits:
        try:
            with until(deadline - (deadline - time.monotonic()) / 2):
                return build_parts(config, data=data)
        except OutOfTime:
            pass
    optim = dataclasses.replace(config.optim, distill_from=None)
    with torch.device("meta"):
        return build_parts(dataclasses.replace(config, optim=optim, init_from=None), data=data)


def _examine(data: DataModule, config: Config, deadline: float) -> list[str]:
    try:
        with until(min(deadline, time.monotonic() + EXAMINING)):
            return find_data_problems(data, config)
    except OutOfTime:
        return [f"data: examining the images took more than {EXAMINING:.0f} s and was given up: reading them is slow"]


def _measure(
    config: Config, folder: Path, batches: int, val_batches: int, data: DataModule, size: Size, deadline: float
) -> Measured:
    """Times three short epochs, whose number and size of batches a pilot run determines."""
    device = training_device(config)
    images, val_images = _images_per_batch(config, data), config.data.eval_batch_size
    fixed = size.memory(config, 0)
    room = LARGEST_SHARE * available_memory(device) - fixed
    # every rank takes the same steps
    most, seconds = distributed.from_first((int(room / (size.memory(config, 1) - fixed)), size.flops / _rate(device)))
    if most < min(images, 2):
        return _estimate(config, size, images, seconds, "it would take too much memory")
    if min(images, 2) * seconds > SLOWEST_STEP:
        return _estimate(config, size, images, seconds, "a step of two images would take too long")
    started = time.monotonic()
    small = _fewer(min(most, int(FIRST_STEP / seconds)), images)
    small_val = val_images if small == images else min(val_images, 4 * small)
    few = min(PILOT_BATCHES if small == images else 2, batches)
    pilot = Clock()
    _fit_until(deadline, _shorter(config, folder / "pilot", small, small_val, (1, few, 1)), pilot, data)
    if not any(pilot.steps):
        return _estimate(config, size, images, seconds, "no step ended in time")
    times = _read(pilot, small, small_val, 1)
    left = distributed.from_first(deadline - time.monotonic())
    run_dir = folder / "pilot"
    if left > 2 * (time.monotonic() - started):
        spent = min(SECONDS, left / 6)
        larger = max(small, _fewer(min(most, int(small * spent / 4 / times.step_s)), images))
        larger_val = val_images if larger == images else min(val_images, 4 * larger)
        step_s, val_s = times.step_s * larger / small, times.val_s * larger_val / small_val
        number = min(batches, max(few, round(spent / step_s)))
        val_number = min(val_batches, max(2, round(spent / 3 / max(val_s, 1e-9))))
        number, val_number, larger = distributed.from_first((number, val_number, larger))
        clock, run_dir = Clock(), folder / "timed"
        limits = (3, number, val_number)
        _fit_until(deadline, _shorter(config, run_dir, larger, larger_val, limits), clock, data)
        if len(clock.steps) > 1 and clock.steps[1]:
            small, small_val, times = larger, larger_val, _read(clock, larger, larger_val, val_number)
    return dataclasses.replace(
        times,
        step_s=times.step_s * images / small,
        val_s=times.val_s * val_images / small_val,
        memory=_peak_memory(device) + size.memory(config, images) - size.memory(config, small),
        disk=_disk(config, run_dir, size),
        note="measured: " if small == images else f"measured with {small} images per device and scaled to {images}: ",
    )


def _fewer(wanted: int, images: int) -> int:
    """Returns a number of images of at most `images`, and at least 2 and even if possible, as mixup demands."""
    return images if wanted >= images else min(images, max(2, wanted - wanted % 2))


def _shorter(config: Config, run_dir: Path, images: int, val_images: int, limits: tuple[int, int, int]) -> Config:
    """The configuration of a short run with other batches.

    Args:
        images, val_images: Images of a batch on one device.
        limits: Epochs, and batches of training and validation in each.
    """
    data = dataclasses.replace(config.data, batch_size=images * distributed.world_size(), eval_batch_size=val_images)
    names = ("max_epochs", "limit_train_batches", "limit_val_batches")
    return without_end(dataclasses.replace(config, data=data), run_dir, **dict(zip(names, limits, strict=True)))


def _fit_until(deadline: float, config: Config, clock: Clock, data: DataModule) -> None:
    with suppress(OutOfTime), until(deadline):
        _fit(config, clock, data)


def _fit(config: Config, clock: Clock, data: DataModule) -> None:
    parts = build_parts(config, clock, data=build_data(config, data.splits))
    if config.trainer.compile:
        compile_in_place(parts.model)
    parts.trainer.fit(parts.module, datamodule=parts.data)


def _read(clock: Clock, images: int, val_images: int, val_batches: int) -> Measured:
    """Returns the times of a short run, which may have ended early; without sizes.

    The second of three epochs counts, without its first step. A validation that has not taken place takes a third of
    a step per image.
    """
    steps = clock.steps[1] if len(clock.steps) > 1 and clock.steps[1] else clock.steps[0]
    step_s = mean(steps[1:] or steps)
    val_s = clock.validations[:2][-1] / val_batches if clock.validations else step_s / 3 * val_images / images
    rest_s = start_s = 0.0
    if len(clock.epochs) == 3:
        first_s, second_s = clock.epochs[1] - clock.epochs[0], clock.epochs[2] - clock.epochs[1]
        rest_s = max(second_s - len(clock.steps[1]) * step_s - clock.validations[1], 0.0)
        start_s = max(first_s - second_s, 0.0)
    return Measured(step_s, val_s, rest_s, start_s, memory=0, disk=0)


def _estimate(config: Config, size: Size, images: int, seconds: float, why: str) -> Measured:
    """Returns what a step takes at least, by its operations; a forward pass takes a third of them."""
    memory = size.memory(config, images)
    val_s = seconds / 3 * config.data.eval_batch_size
    return Measured(
        images * seconds,
        val_s,
        0.0,
        0.0,
        memory,
        _disk(config, None, size),
        f"estimated by operations, since {why}: at least ",
    )


def _rate(device: torch.device) -> float:
    """FLOP/s of a matrix product."""
    a = torch.ones(1024, 1024, device=device)
    return 2 * 1024**3 / min(timed(lambda: torch.mm(a, a), device) for _ in range(5))


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _disk(config: Config, run_dir: Path | None, size: Size) -> int:
    """Bytes of a run folder at its largest: the last, the previous and the best checkpoint, and the model folder."""
    written = run_dir.glob("checkpoints/*.ckpt") if run_dir else ()
    checkpoint = max((path.stat().st_size for path in written), default=size.checkpoint(config))
    return 3 * checkpoint + 4 * size.parameters
