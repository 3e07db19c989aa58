"""A run to start or to resume, checked before torch is imported and before anything is written."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, Field

from sequencer.config.command import CommandLine
from sequencer.config.composition import to_config
from sequencer.config.errors import RequestError
from sequencer.config.named_runs import named_run
from sequencer.config.overrides import check_key, swept_values, takes_list
from sequencer.config.schema import Config, leaves
from sequencer.declared import UndeclaredContent, parse_json
from sequencer.files import nearest_existing
from sequencer.printing import first_line


@dataclass(frozen=True)
class Request:
    """A run that can be started; with `resume`, from the last checkpoint in `config.run_dir`."""

    config: Config
    resume: bool = False


def request(config: Config) -> Request:
    """Decides whether a configuration starts a run or resumes the one in its `run_dir`.

    Raises:
        RequestError: `run_dir` holds another run, or files but no run, or cannot be written.
    """
    run_dir = Path(config.run_dir)
    if os.environ.get("RANK", "0") != "0":  # rank 0 decides and tells the other ranks
        return Request(config)
    _check_writable(run_dir)
    if not run_dir.exists() or (run_dir.is_dir() and all(path.name.startswith(".") for path in run_dir.iterdir())):
        return Request(config)  # a run killed as it started leaves hidden files only
    if not (run_dir / "config.yaml").is_file():
        raise RequestError(f"run_dir={run_dir} is not empty and holds no run: choose another")
    if differences := differing_settings(load_run(run_dir), config, run_dir / "config.yaml"):
        raise RequestError(f"run_dir={run_dir} holds another run: {differences}")
    return Request(config, resume=True)


def _check_writable(folder: Path) -> None:
    """Checks that a folder can be written or, if it does not exist, created.

    Raises:
        RequestError: It cannot.
    """
    nearest = nearest_existing(folder)
    if not nearest.is_dir():
        raise RequestError(f"run_dir={folder} cannot be written: {nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RequestError(f"run_dir={folder} cannot be written: no permission to write in {nearest}")


def resume_request(command: CommandLine) -> Request:
    """Returns the resumption of the run that `resume=RUN` names, with the changes that the other overrides ask for.

    Raises:
        RequestError: RUN is not a run folder, or an override changes a key that may not change.
    """
    assert command.resume is not None
    refuse_sweep(command)
    run_dir = named_run(command.resume)
    saved = load_run(run_dir)
    for override in command.overrides:
        check_key(override, command.files.groups)
        if not _may_change(override.key_or_group):
            changeable = ", ".join(CHANGEABLE)
            raise RequestError(f"{override.key_or_group} cannot change when a run is resumed; {changeable} can")
    if command.overrides:
        asked = command.compose().config
        for override in command.overrides:
            OmegaConf.update(saved, override.key_or_group, OmegaConf.select(asked, override.key_or_group))
    saved.run_dir = str(run_dir)
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
            as_list = f", or write {key}=[{values}] for a list" if takes_list(override.key_or_group) else ""
            raise RequestError(f"{override.input_line}: add -m for a sweep{as_list}")


def load_run(run_dir: Path) -> DictConfig:
    """Loads the configuration of a run, with the defaults of keys that are newer than it.

    Raises:
        RequestError: The folder has no configuration, or it cannot be read.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise RequestError(f"{run_dir} is not a run folder: there is no {path}")
    with _reading(path):
        return _complete(OmegaConf.load(path))


def _complete(saved: Any) -> DictConfig:
    loaded = OmegaConf.merge(OmegaConf.structured(Config), saved)
    assert isinstance(loaded, DictConfig)
    return loaded


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises a `RequestError` that names the file in place of any error of its configuration."""
    try:
        yield
    except Exception as error:  # YAML's own errors have no common base class with OmegaConf's
        raise RequestError(f"{path} is damaged or of another version: {first_line(error)}") from error


class _Summary(BaseModel):
    """The content of a `summary.json`, as far as the package reads it."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str | int | float | None] = Field(init=False)

    name: str
    model: str
    parameters: int
    slot: str
    epochs: int
    best_epoch: int
    train_s: float = Field(alias="time/train_s")


def load_summary(run_dir: Path) -> dict[str, Any] | None:
    """Loads the result of a run, with NaN for null, which stands for a number that is not finite.

    Returns:
        The content of its `summary.json`, or None if there is none.

    Raises:
        RequestError: `summary.json` cannot be read or is damaged.
    """
    path = run_dir / "summary.json"
    if not path.exists():
        return None
    try:
        summary = parse_json(_Summary, path.read_bytes(), str(path)).model_dump(by_alias=True)
    except (OSError, UndeclaredContent) as error:
        reason = f"{path} cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise RequestError(f"{reason}\nwithout this file, python train.py resume={run_dir} writes it again") from error
    return {key: math.nan if value is None else value for key, value in summary.items()}


def differing_settings(saved: DictConfig | dict[str, Any], config: Config, path: Path) -> str:
    """Describes how a run differs from a saved one in keys that may not change; empty if it does not.

    Args:
        saved: The configuration of the saved run; keys that are newer than it have their defaults.
        config: The run.
        path: The file that holds `saved`, for error messages.

    Raises:
        RequestError: `saved` does not follow the schema.
    """
    with _reading(path):
        before = _fixed_values(_complete(saved))
    return describe_differences(before, _fixed_values(OmegaConf.structured(config)))


def describe_differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Lists the first three entries that differ, as `key (old there, new here)`; empty if none does.

    Values are compared by their text: `limit_train_batches=1` is one batch, and `1.0` is all of them.
    """
    keys = [key for key in dict.fromkeys([*before, *now]) if repr(before.get(key)) != repr(now.get(key))]
    listed = ", ".join(f"{key} ({before.get(key)} there, {now.get(key)} here)" for key in keys[:3])
    return listed + (" ..." if keys[3:] else "")


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


def _fixed_values(config: DictConfig) -> dict[str, Any]:
    """Returns the values of the keys that may not change when a run is resumed."""
    values = leaves(OmegaConf.to_container(config, resolve=True))
    return {key: values[key] for key in sorted(values) if key != "run_dir" and not _may_change(key)}
