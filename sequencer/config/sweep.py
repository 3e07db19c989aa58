"""Sweeps over hyper-parameters.

Every trial is `python train.py` with overrides of its own, in a process and a folder of its own. The process frees all
memory that a trial took, and a trial can be repeated by hand. The folder is named by what the trial varies, so that the
same command resumes an interrupted sweep: finished trials return their results at once.
"""

import ctypes
import hashlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig

from sequencer.config.command import CommandLine
from sequencer.config.composition import Composed, compose_lines, to_config
from sequencer.config.errors import RequestError
from sequencer.config.overrides import parse_overrides, quoted, swept_values, to_line
from sequencer.config.request import load_summary
from sequencer.config.schema import Config, lower_is_better, objective
from sequencer.console import say
from sequencer.printing import duration

LONGEST_NAME = 150  # characters; file systems allow 255
INTERRUPTED = (130, 143, -signal.SIGINT, -signal.SIGTERM)


@dataclass(frozen=True)
class Sweep:
    """A sweep whose values have been checked."""

    command: CommandLine  # including the values that the recipe sweeps over
    config: Config  # of the first trial
    trials: int
    lines: list[str]  # the overrides for Hydra

    @property
    def folder(self) -> Path:
        """The folder that holds the trials' folders."""
        return Path(self.config.run_dir)


def prepare_sweep(command: CommandLine, composed: Composed) -> Sweep:
    """Checks every value that is swept over, each with the first values of the other keys.

    Args:
        composed: what `command` composes to.

    Raises:
        RequestError: An illegal value, or a sweep that cannot start.
    """
    if "RANK" in os.environ:
        raise RequestError("a sweep is started without torchrun: trainer.devices=N gives every trial its devices")
    params = parse_overrides([f"{key}={value}" for key, value in (composed.sweeper.get("params") or {}).items()])
    swept = [override for override in command.overrides if override.is_sweep_override()]
    if params and any(override.key_or_group == "experiment" for override in swept):
        raise RequestError("a recipe that is a sweep stands alone: give one experiment=")
    if not any(override.is_sweep_override() for override in (*params, *swept)):
        raise RequestError("-m sweeps over nothing: give a key several values, as in seed=0,1,2, or leave out -m")
    whole = replace(command, overrides=(*params, *command.overrides))
    config = to_config(whole.compose().config if params else composed.config)
    _check_direction(composed.sweeper.get("direction"), config.trainer.best_metric)
    for override in (*params, *swept):
        if override.is_sweep_override():
            for value in swept_values(override):
                to_config(_with_value(whole, override, value).config)
    return Sweep(whole, config, _count(whole, composed), _hydra_lines(command, config.run_dir))


def _with_value(command: CommandLine, override: Override, value: Any) -> Composed:
    """Composes the first trial with another value for one of its keys."""
    return compose_lines([*command.first_lines, to_line(override, value)], command.files)


def _count(command: CommandLine, composed: Composed) -> int:
    """Returns the number of trials; for a search it is `hydra.sweeper.n_trials`."""
    last = {override.key_or_group: override for override in command.overrides if override.is_sweep_override()}
    if any(isinstance(override.value(), IntervalSweep) for override in last.values()):
        return int(composed.sweeper.get("n_trials", 1))
    return math.prod(len(list(swept_values(override))) for override in last.values())


def _hydra_lines(command: CommandLine, run_dir: str) -> list[str]:
    """Returns the overrides for Hydra, with the sweep's folder and the keys left out of the names of trials."""
    lines = command.lines
    constant = {override.key_or_group for override in parse_overrides(lines) if not override.is_sweep_override()}
    excluded = ",".join(sorted({*constant, "run_dir"}))
    return [*lines, f"run_dir={quoted(run_dir)}", f"hydra.job.config.override_dirname.exclude_keys=[{excluded}]"]


def start_folder(folder: Path) -> None:
    """Makes the sweep's folder and deletes the records of failed trials, which are tried again.

    Raises:
        RequestError: The folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for record in folder.glob("*.failed"):
            record.unlink()
    except OSError as error:
        raise RequestError(f"run_dir={folder} cannot be written: {error.strerror}") from error


def check_trials(folder: Path) -> None:
    """Checks that no trial of a finished sweep has failed.

    Raises:
        RuntimeError: Trials have failed; the message names the first three.
    """
    if failed := sorted(path.stem for path in folder.glob("*.failed")):
        listed = f"{'; '.join(failed[:3])}{'; ...' if len(failed) > 3 else ''}"
        raise RuntimeError(f"{len(failed)} of the trials failed, and are tried again by the same command: {listed}")


class Trials:
    """Runs the trials of a sweep, each in a process of its own.

    Args:
        script: path of `train.py`.
        count: number of trials.
    """

    def __init__(self, script: str, count: int) -> None:
        self.script, self.count = script, count
        self._seconds: list[float] = []  # that each trial has taken which was not finished before

    def run(self, composed: DictConfig) -> float | None:
        """Runs the trial that Hydra has composed, as `_run_trial`; says which one it is and how long the rest takes."""
        hydra = HydraConfig.get()
        folder = Path(composed.run_dir, _folder_name(hydra.job.override_dirname))
        finished, started = (folder / "summary.json").exists(), time.monotonic()
        left = self.count - hydra.job.num
        about = f", about {duration(left * mean(self._seconds))} left" if self._seconds and left > 0 else ""
        say(f"\ntrial {hydra.job.num + 1} of {self.count}{about}\n{folder}")
        result = _run_trial(self.script, composed, folder)
        if not finished:
            self._seconds.append(time.monotonic() - started)
        return result


def _run_trial(script: str, composed: DictConfig, folder: Path) -> float | None:
    """Runs a trial in its folder.

    Returns:
        The best metric of the trial, or None if it failed.

    Raises:
        SystemExit: The trial was interrupted, and with it the sweep; or the first trial was refused, as the others
            would be.
    """
    hydra = HydraConfig.get()
    overrides = [override for override in hydra.overrides.task if not override.startswith("run_dir=")]
    group = f"logger.group={quoted(folder.parent.name)}"  # the first, so that one of the command replaces it
    ours = [f"run_dir={quoted(str(folder))}", "hydra.mode=RUN"]
    command = [sys.executable, script, *_flags(hydra), group, *overrides, *ours]
    code = _run(command)
    if code == 0:
        summary = load_summary(folder)
        assert summary is not None  # a trial that succeeds has written it
        return float(summary[objective(composed.trainer.best_metric, composed.trainer.slot)])
    if code in INTERRUPTED:
        say("the same command resumes the sweep")
        raise SystemExit(code if code > 0 else 128 - code)
    if code == 2 and hydra.job.num == 0 and hydra.runtime.choices["hydra/launcher"] == "basic":
        raise SystemExit(code)
    folder.with_name(f"{folder.name}.failed").write_text(f"exit code {code}\n")
    return None


def _flags(hydra: Any) -> list[str]:
    """Returns the flags that name the files which the sweep is composed from."""
    folders = {source.provider: source.path for source in hydra.runtime.config_sources if source.path}
    flags = [f"--config-path={folders['main']}", f"--config-name={hydra.job.config_name}"]
    return flags + ([f"--config-dir={folders['command-line']}"] if "command-line" in folders else [])


def _run(command: list[str]) -> int:
    """Runs a command and returns its exit code; passes SIGTERM on to it and waits while it saves."""
    terminate = signal.getsignal(signal.SIGTERM)
    process = subprocess.Popen(command, preexec_fn=_end_with_parent)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the terminal has sent it to the trial too
                continue
    finally:
        signal.signal(signal.SIGTERM, terminate)


def _end_with_parent() -> None:
    """Asks Linux to send SIGTERM to this process when the sweep dies, so that no trial outlives its sweep."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _folder_name(overrides: str) -> str:
    """Returns the name of a trial's folder, from Hydra's text of the overrides that vary."""
    name = re.sub(r"[{}\[\]'\"+ ]", "", overrides).replace(":", "=")
    name = re.sub(r"[^\w.,=-]", "-", name) or "trial"
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"
    return name


def _check_direction(direction: Any, metric: str) -> None:
    """Refuses a search that would look for the worst value of the metric."""
    wanted = "minimize" if lower_is_better(metric) else "maximize"
    if (direction := getattr(direction, "name", direction)) not in (None, wanted):  # the plugin's type is an enum
        raise RequestError(
            f"hydra.sweeper.direction={direction}, but trainer.best_metric={metric}: add "
            f"hydra.sweeper.direction={wanted}, or choose another metric"
        )
