"""A run to start or to resume, checked before torch is imported and before anything is written."""

import json
import math
import os
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sequencer.config.command import CommandLine
from sequencer.config.composition import to_config
from sequencer.config.errors import RequestError, first_line
from sequencer.config.overrides import check_key, swept_values
from sequencer.config.schema import Config, leaves


@dataclass(frozen=True)
class Request:
    """A run that can be started; with `resume`, from the last checkpoint in `config.run_dir`."""

    config: Config
    resume: bool = False


def request(config: Config) -> Request:
    """Decides whether a configuration starts a run or resumes the one in its `run_dir`.

    Raises:
        RequestError: `run_dir` holds another run, or files but no run.
    """
    run_dir = Path(config.run_dir)
    if os.environ.get("RANK", "0") != "0":  # rank 0 decides and tells the other ranks
        return Request(config)
    if not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir())):
        return Request(config)
    if not (run_dir / "config.yaml").is_file():
        raise RequestError(f"run_dir={run_dir} is not empty and holds no run: choose another")
    before, now = _values(load_run(run_dir)), _values(OmegaConf.structured(config))
    differing = [
        key for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key != "run_dir" and not _may_change(key)
    ]  # fmt: skip
    if differing:
        listed = ", ".join(f"{key} ({before.get(key)} there, {now.get(key)} here)" for key in differing[:3])
        raise RequestError(f"run_dir={run_dir} holds another run: {listed}{' ...' if differing[3:] else ''}")
    return Request(config, resume=True)


def resume_request(command: CommandLine) -> Request:
    """Returns the resumption of the run that `resume=RUN` names, with the changes that the other overrides ask for.

    Raises:
        RequestError: RUN is not a run folder, or an override changes a key that may not change.
    """
    assert command.resume is not None
    refuse_sweep(command)
    saved = load_run(command.resume)
    for override in command.overrides:
        check_key(override, command.files.groups)
        if not _may_change(override.key_or_group):
            changeable = ", ".join(CHANGEABLE)
            raise RequestError(f"{override.key_or_group} cannot change when a run is resumed; {changeable} can")
    if command.overrides:
        asked = command.compose().config
        for override in command.overrides:
            OmegaConf.update(saved, override.key_or_group, OmegaConf.select(asked, override.key_or_group))
    saved.run_dir = str(command.resume)
    return Request(to_config(saved), resume=True)


def refuse_sweep(command: CommandLine) -> None:
    """Checks that a command for a single run gives each key one value.

    Raises:
        RequestError: A key is given several values, or a resumed run is to be a sweep.
    """
    if command.resume and command.flags.multirun:
        raise RequestError("resume=RUN resumes one run: leave out -m, or repeat the command of a sweep to resume it")
    for override in command.overrides:
        if override.is_sweep_override():
            key, values = override.get_key_element(), ",".join(map(str, swept_values(override)))
            raise RequestError(f"{override.input_line}: add -m for a sweep, or write {key}=[{values}] for a list")


def load_run(run_dir: Path) -> DictConfig:
    """Loads the configuration of a run, with the defaults of keys that are newer than it.

    Raises:
        RequestError: The folder has no configuration, or it cannot be read.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise RequestError(f"{run_dir} is not a run folder: there is no {path}")
    try:
        loaded = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
    except Exception as error:  # YAML's own errors have no common base class with OmegaConf's
        raise RequestError(f"{path} is damaged or of another version: {first_line(error)}") from error
    assert isinstance(loaded, DictConfig)
    return loaded


def load_summary(run_dir: Path) -> dict[str, Any]:
    """Loads the summary of a finished run, with NaN for null, which stands for a number that is not finite."""
    summary = json.loads((run_dir / "summary.json").read_text())
    return {key: math.nan if value is None else value for key, value in summary.items()}


def _changeable(node: type, prefix: str = "") -> list[str]:
    """Returns the keys that may change when a run is resumed; one entry for a section whose keys may all change."""
    found, complete = [], True
    for field in fields(node):
        key = f"{prefix}{field.name}"
        if is_dataclass(field.type):
            part = _changeable(field.type, f"{key}.")  # type: ignore[arg-type]
            found += part
            complete &= part == [key]
        elif field.metadata["on_resume"]:
            found.append(key)
        else:
            complete = False
    return [prefix[:-1]] if complete and prefix else found


CHANGEABLE = _changeable(Config)


def _may_change(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in CHANGEABLE)


def _values(config: DictConfig) -> dict[str, Any]:
    return leaves(OmegaConf.to_container(config, resolve=True))
