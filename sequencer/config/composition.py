"""Composition of overrides into a typed configuration, by Hydra."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import MarkedYAMLError

from sequencer.config.conf_files import ConfigFiles, conf_dir
from sequencer.config.errors import RequestError, show
from sequencer.config.hydra_internals import VERSION_BASE
from sequencer.config.inheritance import inherited_values
from sequencer.config.named_runs import find_run
from sequencer.config.overrides import complete, describe_unknown, parse_overrides, quoted
from sequencer.config.schema import Config, leaves
from sequencer.config.validation import validate
from sequencer.printing import first_line

ConfigStore.instance().store(name="schema", node=Config)


def compose(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Config:
    """Composes the configuration that `python train.py OVERRIDES...` would run with.

    Args:
        overrides: as on the command line, e.g. `["data=cifar10", "optim.lr=1e-3"]`; no sweep.
        config_dir: a second folder with groups, as `--config-dir`.

    Raises:
        RequestError: An unknown key or choice, or an illegal value.
    """
    files = ConfigFiles(conf_dir(), None if config_dir is None else Path(config_dir))
    return to_config(compose_lines(complete(parse_overrides(overrides), files.groups), files).config)


@dataclass(frozen=True)
class Composed:
    """A composed configuration, and Hydra's own settings of a sweep."""

    config: DictConfig
    lines: list[str]  # the overrides, those that follow from `init_from` included
    inherited: dict[str, Any]  # what follows from `init_from`, by key; the overrides may say otherwise
    multirun: bool  # a recipe asks for a sweep
    sweeper: dict[str, Any]


def compose_lines(lines: list[str], files: ConfigFiles) -> Composed:
    """Composes overrides that `complete` has checked, in which nothing is swept over.

    Where `init_from` names a run, its architecture, channels, image size and normalisation take the place of those of
    the files. Overrides come after them, and another `model.name` leaves out the arguments of the run's model.

    Raises:
        RequestError: A value of the wrong type, or another error of the composition.
    """
    node = _compose(lines, files)
    try:
        source = None if node.init_from is None else str(find_run(node.init_from, besides=node.run_dir))
    except OmegaConfBaseException as error:
        raise _from_omegaconf(error) from error
    if inherited := inherited_values(source):
        names = [str(line.value()) for line in parse_overrides(lines) if line.key_or_group == "model.name"]
        if names and names[-1] != inherited["model.name"]:
            del inherited["model.kwargs"]
        values = (f"++{key}={_literal(value)}" for key, value in inherited.items())
        lines = [*values, *lines]
        node = _compose(lines, files)
    mode, sweeper = node.hydra.mode, OmegaConf.to_container(node.hydra.sweeper, resolve=False)
    assert isinstance(sweeper, dict)
    with open_dict(node):
        del node["hydra"]
    settings = {str(key): value for key, value in sweeper.items()}
    return Composed(node, lines, inherited, mode == RunMode.MULTIRUN, settings)


def _compose(lines: list[str], files: ConfigFiles) -> DictConfig:
    try:
        with initialize_config_dir(str(files.main.absolute()), version_base=VERSION_BASE):
            return hydra_compose(files.name, overrides=[*lines, *files.lines], return_hydra_config=True)
    except ConfigCompositionException as error:
        raise _from_composition(error, files) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RequestError(
            f"{mark.name}, line {mark.line + 1}: {error.problem}" if mark else first_line(error)
        ) from error
    except Exception as error:  # Hydra and OmegaConf raise Python's own errors too
        raise RequestError(first_line(error)) from error


def _literal(value: Any) -> str:
    """Returns a value in Hydra's grammar of overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(_literal, value))}]"
    return quoted(value) if isinstance(value, str) else "null" if value is None else str(value)


def to_config(node: DictConfig) -> Config:
    """Resolves a composed configuration into its dataclasses and checks its values.

    Raises:
        RequestError: A value is missing, ill-typed or illegal, values contradict each other, or a logger is not
            installed.
    """
    try:
        if OmegaConf.get_type(node) is not Config:
            raise RequestError("the primary configuration file has to name `schema` first among its defaults")
        _check_lists(OmegaConf.to_container(node, resolve=True))
        config = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise _from_omegaconf(error) from error
    assert isinstance(config, Config)
    validate(config)
    config.run_dir = os.path.expanduser(config.run_dir)  # only some shells do it in key=value
    return config


def _check_lists(values: Any) -> None:
    """Checks that lists have plain entries, of which OmegaConf converts the type; it accepts lists in lists.

    Raises:
        RequestError: A list has an entry that is a list or a dictionary.
    """
    for key, value in leaves(values).items():
        if isinstance(value, list) and not key.startswith("model.kwargs"):
            for entry in value:
                if isinstance(entry, (list, dict)):
                    raise RequestError(f"{key}={show(value)}: its entries are numbers")


def _from_composition(error: ConfigCompositionException, files: ConfigFiles) -> RequestError:
    """Returns the error of an override, or of a file, which the message then names."""
    if error.__cause__ is not None:
        return _from_omegaconf(error.__cause__)
    found = re.match(r"In '(.+?)': ", str(error))
    path = files.find(found[1]) if found else None
    cause = error.__context__
    if path is None or not isinstance(cause, OmegaConfBaseException):
        return _from_omegaconf(error)
    key = str(cause.full_key)
    if key == path.parent.name:
        return RequestError(f"{path}: a file of this group begins with the line `# @package _global_`")
    reason = describe_unknown(key) if isinstance(cause, ConfigKeyError) else _from_omegaconf(cause)
    return RequestError(f"{path}: {reason}")


def _from_omegaconf(error: BaseException) -> RequestError:
    key = getattr(error, "full_key", None)
    message = first_line(getattr(error, "msg", None) or error)
    return RequestError(f"{key}: {message}" if key else message)
