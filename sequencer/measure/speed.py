"""The size and speed of trained models, measured in turns, so that other load on the machine affects all alike."""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

from sequencer.machine import timed
from sequencer.measure.contest import Case
from sequencer.report.results import count_operations

ROUNDS = 9
WARMUP = 2  # rounds


class Subject(NamedTuple):
    """A model on the device of the measurement, and how it was trained."""

    model: nn.Module
    input_size: tuple[int, int, int]  # channels, height and width
    batch_size: int
    dtype: torch.dtype  # float32, or that of autocast


class Speed(NamedTuple):
    """What one model takes, medians of `ROUNDS` passes."""

    operations: int  # floating-point operations of a forward pass of one image
    training: float  # images a second, forward and backward, without the optimizer
    inference: float  # images a second
    latency: float  # milliseconds of one image


def measure_speeds(subjects: Sequence[Subject], device: torch.device) -> list[Speed]:
    """Measures the speed of models on batches of noise of the size that they were trained with."""
    passes = [_passes(subject, device) for subject in subjects]
    seconds: list[list[list[float]]] = [[[] for _ in each] for each in passes]
    for number in range(WARMUP + ROUNDS):
        for kind in range(len(passes[0])):
            for index, each in enumerate(passes):
                taken = timed(each[kind], device)
                if number >= WARMUP:
                    seconds[index][kind].append(taken)
    speeds = []
    for subject, found in zip(subjects, seconds, strict=True):
        training, inference, single = map(median, found)
        operations = count_operations(subject.model.eval(), subject.input_size)
        speeds.append(Speed(operations, subject.batch_size / training, subject.batch_size / inference, 1e3 * single))
    return speeds


def _passes(subject: Subject, device: torch.device) -> list[Callable[[], object]]:
    """Returns a pass of training, of inference, and of inference with one image."""
    model, dtype = subject.model, subject.dtype
    images = torch.randn(subject.batch_size, *subject.input_size, device=device)
    with torch.inference_mode():
        classes = model.eval()(images[:1]).shape[1]
    upstream = torch.randn(len(images), classes, device=device)
    batch, single = Case(images, upstream, dtype), Case(images[:1], upstream[:1], dtype)
    return [partial(batch.train, model), partial(batch.infer, model), partial(single.infer, model)]
