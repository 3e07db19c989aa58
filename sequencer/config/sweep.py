"""Sweeps: every trial is `python train.py` with overrides of its own, in a process and a folder of its own.

The process gives back all that a trial took, and a trial can be repeated by hand. The folder is named by what the
trial varies, so that the same command goes on with a sweep that was broken off: trials that are done say so at once.
Standard library, omegaconf and hydra only.
"""

import ctypes
import hashlib
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.types import RunMode
from omegaconf import DictConfig

from sequencer.config.errors import RequestError
from sequencer.config.request import check_overrides, compose, parse_overrides, to_config

LONGEST_NAME = 150  # characters; file systems allow 255
INTERRUPTED = (130, 143, -signal.SIGINT, -signal.SIGTERM)


def is_sweep(overrides: list[str], multirun: bool) -> bool:
    """Whether the request is for several runs: by `-m`, or by a recipe that says so."""
    _check_sweeper(overrides)
    return multirun or compose(overrides, with_hydra=True).hydra.mode == RunMode.MULTIRUN


def prepare_sweep(overrides: list[str]) -> tuple[Path, list[str]]:
    """The sweep's folder, and the overrides for Hydra, after every value of every key was checked with the first
    values of the others.

    Raises:
        RequestError: as `sequencer.config.request.compose` and `to_config`.
    """
    if "RANK" in os.environ:
        raise RequestError("a sweep is started without torchrun: trainer.devices=N gives every trial its devices")
    parsed, params = parse_overrides(overrides), _params(overrides)
    if params and any(override.key_or_group == "experiment" and override.is_sweep_override() for override in parsed):
        raise RequestError("a recipe that is a sweep stands alone: give one experiment=")
    config = to_config(compose([*params, *overrides]))
    _check_direction(compose(overrides, with_hydra=True).hydra.sweeper.get("direction"), config.trainer.best_metric)
    folder = Path(config.run_dir)
    for override in parse_overrides(params) + parsed:
        if override.is_sweep_override():
            for value in _values(override):
                to_config(compose([*params, *overrides, f"{override.get_key_element()}={value}"]))
    completed = check_overrides(overrides)
    constant = {override.key_or_group for override in parse_overrides(completed) if not override.is_sweep_override()}
    excluded = ",".join(sorted({*constant, "run_dir"}))
    fixed = [f"run_dir={_quoted(folder)}", f"hydra.job.config.override_dirname.exclude_keys=[{excluded}]"]
    return folder, [*completed, *fixed]


def start_folder(folder: Path) -> None:
    """The sweep's folder, without what was noted of failed trials, which are tried again.

    Raises:
        RequestError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for noted in folder.glob("*.failed"):
            noted.unlink()
    except OSError as error:
        raise RequestError(f"run_dir={folder} cannot be written: {error.strerror}") from error


def first_trial(overrides: list[str]) -> tuple[list[str], int]:
    """The overrides of a sweep's first trial, and how many trials there are."""
    parsed = parse_overrides([*_params(overrides), *overrides])
    swept = {override.key_or_group: override for override in parsed if override.is_sweep_override()}
    if any(isinstance(override.value(), IntervalSweep) for override in swept.values()):
        trials = compose(overrides, with_hydra=True).hydra.sweeper.get("n_trials", 1)
    else:
        trials = math.prod(len(list(_values(override))) for override in swept.values())
    return [*_params(overrides), *overrides], trials


def _params(overrides: list[str]) -> list[str]:
    """What a recipe that is a sweep varies."""
    params = compose(overrides, with_hydra=True).hydra.sweeper.get("params") or {}
    return [f"{key}={value}" for key, value in params.items()]


def run_trial(script: str, composed: DictConfig) -> float | None:
    """Runs the trial that Hydra has composed; returns its best metric, or None where it failed.

    Raises:
        SystemExit: the trial was interrupted, and so is the sweep; or the very first one was refused, as the others
            would be.
    """
    job = HydraConfig.get()
    folder = Path(composed.run_dir, _folder_name(job.job.override_dirname))
    overrides = [override for override in job.overrides.task if not override.startswith("run_dir=")]
    print(f"\n{folder}", flush=True)
    command = [sys.executable, script, *overrides, f"run_dir={_quoted(folder)}", "hydra.mode=RUN"]
    code = _run(command)
    if code == 0:
        return _value(json.loads((folder / "summary.json").read_text()), composed.trainer)
    if code in INTERRUPTED:
        raise SystemExit(code if code > 0 else 128 - code)
    if code == 2 and job.job.num == 0 and job.runtime.choices["hydra/launcher"] == "basic":
        raise SystemExit(code)
    folder.with_name(f"{folder.name}.failed").write_text(f"exit code {code}\n")
    return None


def _value(summary: dict[str, Any], trainer: DictConfig) -> float:
    """What a search is for: the best metric, or top-1 of the slot where the last epoch was taken."""
    last = "val_ema/top1" if trainer.slot == "ema" else "val/top1"
    return float(summary[last if trainer.best_metric == "epoch" else trainer.best_metric])


def _run(command: list[str]) -> int:
    """The exit code; a signal that ends the sweep is passed on, and waited for while the trial saves."""
    terminate = signal.getsignal(signal.SIGTERM)
    process = subprocess.Popen(command, preexec_fn=_end_with_parent)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the terminal has told the trial too
                continue
    finally:
        signal.signal(signal.SIGTERM, terminate)


def _end_with_parent() -> None:
    """Has Linux send SIGTERM when the sweep is killed, so that no trial goes on behind the back of the next sweep."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _values(override: Override) -> Iterator[Any]:
    value = override.value()
    if isinstance(value, IntervalSweep):
        return iter((value.start, value.end))
    return iter(override.sweep_string_iterator())


def _folder_name(overrides: str) -> str:
    name = re.sub(r"[{}\[\]'\"+ ]", "", overrides).replace(":", "=")
    name = re.sub(r"[^\w.,=-]", "-", name) or "trial"
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"
    return name


def _quoted(path: Path) -> str:
    """In Hydra's grammar."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


def _check_direction(direction: str | None, metric: str) -> None:
    """A search the wrong way would find the worst."""
    wanted = "minimize" if metric.endswith("loss") else "maximize"
    if (direction := getattr(direction, "name", direction)) not in (None, wanted):  # the plugin has an enum
        raise RequestError(
            f"hydra.sweeper.direction={direction}, but trainer.best_metric={metric}: add "
            f"hydra.sweeper.direction={wanted}, or choose another metric"
        )


def _check_sweeper(overrides: list[str]) -> None:
    for override in parse_overrides(overrides):
        for key, package in (("hydra/sweeper", "hydra_optuna_sweeper"), ("hydra/launcher", "hydra_submitit_launcher")):
            needed = override.key_or_group == key and override.value() not in ("basic", None)
            if needed and importlib.util.find_spec(f"hydra_plugins.{package}") is None:
                raise RequestError(
                    f"{key}={override.value()} needs {package}: install the extra 'sweep', e.g. "
                    "python -m pip install -e '.[sweep]'"
                )
