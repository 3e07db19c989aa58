"""The plan of a run, and its text."""

import math
from dataclasses import dataclass

from omegaconf import OmegaConf

from sequencer.config.schema import Config, leaves
from sequencer.config.sources import SCHEMA, Sources
from sequencer.console import say
from sequencer.printing import duration, printable

BARS = "▁▂▃▄▅▆▇█"
LONGEST_VALUE = 24  # characters that the column of values is wide at most
RATES = 60  # samples of the learning rate's schedule


@dataclass(frozen=True)
class Measured:
    """Measurements of a short run, times in seconds (NaN if they are not known) and sizes in bytes."""

    step_s: float  # a training batch
    val_s: float  # a validation batch
    rest_s: float  # an epoch without its training and validation batches
    start_s: float  # what the first epoch takes longer than a later one
    memory: int  # peak: of the GPU, otherwise of the process
    disk: int  # the run folder at its largest
    note: str = "measured: "  # how the times were found, or why they were not


@dataclass(frozen=True)
class Plan:
    """Size and forecast of a run.

    Attributes:
        batches: Training batches per epoch.
        updates: Updates of the weights in all.
        epochs: Epochs in all; a fraction if `trainer.max_steps` ends the run.
        images: Training images per epoch.
        parameters: Parameters of the model.
        rates: Learning rate at `RATES` evenly spaced updates, from before the first to after the last.
        measured: Measurements of the short run.
        train_s: Forecast of the run's `time/train_s`.
        test_s: Forecast of the seconds of the test.
        flops: Operations of training per image; 0 if they are not known.
        problems: What is wrong with the data or the disk, a line each.
    """

    batches: int
    updates: int
    epochs: float
    images: int
    parameters: int
    rates: list[float]
    measured: Measured
    train_s: float
    test_s: float
    flops: int
    problems: list[str]


def print_values(config: Config, sources: Sources, full: bool) -> None:
    """Prints the keys that differ from their defaults, with their values and sources.

    Args:
        full: Print every key; values that the schema gives are dimmed.
    """
    values = leaves(OmegaConf.to_container(OmegaConf.structured(config)))
    shown = {key: printable(value) for key, value in values.items() if full or sources.differs(key)}
    key_width = max(map(len, shown), default=0)
    value_width = min(max(map(len, shown.values()), default=0), LONGEST_VALUE)
    for key, value in shown.items():
        line = f"{key:<{key_width}}  {value:<{value_width}}  {sources[key]}"
        say(line, style=None if sources[key] != SCHEMA else "dim")
    if not full:
        say("every other key has its default: plan=full lists them")


def print_problems(problems: list[str]) -> None:
    """Prints the problems of a plan, a line each."""
    for problem in problems or ["none found"]:
        say(f"problems: {problem}", style="bold" if problems else None)


def print_plan(plan: Plan, config: Config, description: list[str], trials: int) -> None:
    """Prints the size of a run, its learning rate and the forecast.

    Args:
        plan: What to print.
        config: The run.
        description: what the log says of it, whose first line is left out, since the model is printed anyway.
        trials: Number of trials, if the run is the first trial of a sweep.
    """
    measured, passes = plan.measured, config.trainer.accumulate_grad_batches
    say(f"\n{config.model.name}, {plan.parameters:,} parameters")
    for line in description[1:]:
        say(line)
    say(
        f"{plan.updates:,} updates in {plan.epochs:g} epochs of {plan.batches:,} batches"
        f"{f', {passes} batches per update' if passes > 1 else ''}; {plan.images:,} images per epoch"
    )
    say(f"learning rate {_sparkline(plan.rates)}")
    say(f"  first {plan.rates[0]:.3g}, highest {max(plan.rates):.3g}, last {plan.rates[-1]:.3g}")
    if math.isnan(measured.step_s):
        say(
            f"time and memory of a step are not known, since {measured.note}: at least "
            f"{measured.memory / 2**20:.0f} MiB",
        )
    else:
        say(
            f"{plan.flops / 1e9:.3g} GFLOP per image, forward and backward;"
            f" {plan.flops * plan.images / 1e12:.3g} TFLOP per epoch"
        )
        say(
            f"{measured.note}{1e3 * measured.step_s:.1f} ms per training batch,"
            f" {plan.images / max(plan.batches, 1) / measured.step_s:.3g} images/s;"
            f" peak memory {measured.memory / 2**20:.0f} MiB",
        )
    at_most = "at most " if config.trainer.early_stopping_patience else ""
    whole = f"; {trials} trials {duration(trials * (plan.train_s + plan.test_s))}" if trials > 1 else ""
    say(f"forecast: {at_most}{duration(plan.train_s)} of training, {duration(plan.test_s)} of testing{whole}")
    say(f"disk: {trials * measured.disk / 2**20:.0f} MiB in {config.run_dir}")


def _sparkline(values: list[float]) -> str:
    """A bar for each value, relative to the highest."""
    highest = max(values) or 1.0
    return "".join(BARS[round(value / highest * (len(BARS) - 1))] for value in values)
