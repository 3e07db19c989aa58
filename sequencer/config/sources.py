"""The origin of each value of a configuration."""

import re
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from sequencer.config.command import CommandLine
from sequencer.config.hydra_internals import VERSION_BASE
from sequencer.config.overrides import KEYS
from sequencer.config.schema import Config, leaves

SCHEMA = "schema"
COMMAND_LINE = "command line"
DEFAULTS = leaves(OmegaConf.to_container(OmegaConf.structured(Config), resolve=False))


class Sources:
    """The place that gives each key its final value: the schema, a YAML file, a run, or the command line.

    Args:
        command: a valid command; a swept key has its first value.
    """

    def __init__(self, command: CommandLine) -> None:
        files = command.files
        with initialize_config_dir(str(files.main.absolute()), version_base=VERSION_BASE):
            loader = GlobalHydra.instance().config_loader()
            chosen = loader.compute_defaults_list(files.name, [*command.first_lines, *files.lines], RunMode.RUN)
        self._places: dict[str, tuple[str, Any]] = {}  # by key: its source and the value there
        for entry in chosen.defaults:
            path = files.find(str(entry.config_path))
            if path is not None:  # neither the schema nor one of Hydra's own files
                loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
                for key, value in leaves(loaded, entry.package or "").items():
                    self._places[key] = (_shown(path, files.main), value)
        composed = command.compose()
        for key, value in composed.inherited.items():
            for leaf, item in leaves(value, key).items():
                self._places[leaf] = (f"init_from={composed.config.init_from}", item)
        for override in command.overrides:
            key = override.key_or_group
            if key in KEYS or key.startswith("model.kwargs."):
                for leaf, value in leaves(override.value(), key).items():
                    self._places[leaf] = (COMMAND_LINE, value)

    def differs(self, key: str) -> bool:
        """Whether a file or the command line gives a key another value than its default."""
        return key in self._places and self._places[key][1] != DEFAULTS.get(key)

    def __getitem__(self, key: str) -> str:
        """Returns the source of a key; an interpolated key reports the source of its target."""
        place, value = self._places.get(key, (SCHEMA, DEFAULTS.get(key)))
        if isinstance(value, str) and (found := re.fullmatch(r"\$\{([\w.]+)\}", value)):
            return self[found[1]]
        return place


def _shown(path: Path, main: Path) -> str:
    """Returns the path that is shown: `conf/...` for the project's files, the given path for a user's file."""
    return str(Path("conf", path.relative_to(main))) if path.is_relative_to(main) else str(path)


def describe_origin(command: CommandLine) -> dict[str, Any]:
    """Describes where a run comes from: the command that repeats it, and the source of each value but the defaults."""
    found = Sources(command)
    places = {key: found[key] for key in DEFAULTS if found[key] != SCHEMA}
    others = [o.input_line for o in command.overrides if o.key_or_group not in ("run_dir", "hydra.mode")]
    folder = [f"--config-dir={command.files.extra}"] if command.files.extra else []
    return {"command": ["python", "train.py", *folder, *others], "sources": places}
