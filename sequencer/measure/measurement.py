"""The measurement of a plan: short runs that are timed, or an estimate where there is no time or memory for them.

The steps run as in training, with the loaders, callbacks and checkpoints of the run, in a temporary folder. Batches
that take too long or too much memory are replaced by smaller ones, whose times are scaled up.
"""

import dataclasses
import math
import resource
import time
from contextlib import suppress
from pathlib import Path
from statistics import mean

import torch

from sequencer import distributed
from sequencer.config.schema import Config
from sequencer.data import DataModule
from sequencer.machine import timed
from sequencer.measure.budget import OutOfTime, together_until
from sequencer.measure.plan_result import Measured
from sequencer.measure.short_run import Clock, without_end
from sequencer.measure.size import Size
from sequencer.training.launch import training_device
from sequencer.training.module import compile_in_place
from sequencer.training.setup import build_data, build_parts

PILOT_BATCHES = 4
SECONDS = 8.0  # of training steps in each of three epochs, the first of which is a warm-up
FIRST_STEP = 0.3  # s of the pilot's steps at the rate of a matrix product, several times that in fact
SLOWEST_STEP = 4.0  # s, likewise, of a step with two images; a slower one is not measured
LARGEST_SHARE = 0.5  # of the available memory that a measurement may take


def images_per_batch(config: Config, data: DataModule) -> int:
    """Images of a training batch on one device."""
    return max(1, min(config.data.batch_size, len(data.train_set)) // distributed.world_size())


def measure(
    config: Config,
    folder: Path,
    batches: int,
    val_batches: int,
    data: DataModule,
    size: Size,
    available: int,
    deadline: float,
) -> Measured:
    """Times three short epochs, whose number and size of batches a pilot run determines; or estimates.

    Args:
        config: The run.
        folder: An empty folder for the short runs.
        batches, val_batches: Batches of training and validation in an epoch of the run.
        data: Its data, after `setup`.
        size: Size of its step.
        available: Bytes of memory that are available on one device.
        deadline: In seconds of `time.monotonic`.
    """
    device, images = training_device(config), images_per_batch(config, data)
    fixed = size.memory(config, 0)
    if not size.flops:
        memory, disk = size.memory(config, images), _disk(config, None, size)
        return Measured(math.nan, math.nan, 0.0, 0.0, memory, disk, "its operations could not be counted in time")
    most = int((LARGEST_SHARE * available - fixed) / (size.memory(config, 1) - fixed))
    seconds = size.flops / distributed.from_first(_rate(device))
    if most < min(images, 2):
        return _estimate(config, size, images, seconds, "it would take too much memory")
    if min(images, 2) * seconds > SLOWEST_STEP:
        return _estimate(config, size, images, seconds, "a step of two images would take too long")
    if distributed.is_alone() and distributed.world_size() > 1:
        return _estimate(config, size, images, seconds, "no step ended in time")
    val_images = config.data.eval_batch_size
    small = _fewer(min(most, int(FIRST_STEP / seconds)), images)
    small_val = val_images if small == images else min(val_images, 4 * small)
    few = min(PILOT_BATCHES if small == images else 2, batches)
    started, run_dir, pilot = time.monotonic(), folder / "pilot", Clock()
    _fit_until(deadline, _shorter(config, run_dir, small, small_val, (1, few, 1)), pilot, data)
    if not any(pilot.steps):
        return _estimate(config, size, images, seconds, "no step ended in time")
    times = _read(pilot, small, small_val, 1)
    now = time.monotonic()
    taken, left = distributed.from_first((now - started, deadline - now))
    if left > 2 * taken:
        spent = min(SECONDS, left / 6)
        larger = max(small, _fewer(min(most, int(small * spent / 4 / times.step_s)), images))
        larger_val = val_images if larger == images else min(val_images, 4 * larger)
        step_s, val_s = times.step_s * larger / small, times.val_s * larger_val / small_val
        number = min(batches, max(few, round(spent / step_s)))
        val_number = min(val_batches, max(2, round(spent / 3 / max(val_s, 1e-9))))
        number, val_number, larger, larger_val = distributed.from_first((number, val_number, larger, larger_val))
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
    with suppress(OutOfTime), together_until(deadline):
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
