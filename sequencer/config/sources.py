"""Where each value of a configuration comes from."""

import re
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from sequencer.config.request import KEYS, ROOT, check_overrides, parse_overrides
from sequencer.config.schema import Config, leaves

SCHEMA = "conf/schema.py"
COMMAND_LINE = "command line"
DEFAULTS = leaves(OmegaConf.to_container(OmegaConf.structured(Config), resolve=False))


class Sources:
    """The last place that gives a key its value: the schema, a file of conf/ or the command line.

    Args:
        overrides: those of a valid request.
    """

    def __init__(self, overrides: list[str]) -> None:
        overrides = check_overrides(overrides)
        with initialize_config_dir(str(ROOT), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            files = loader.compute_defaults_list("config", overrides, RunMode.RUN).defaults
        self._places: dict[str, tuple[str, Any]] = {}  # by key: the place and what stands there
        for file in files:
            path = ROOT / f"{file.config_path}.yaml"
            if path.is_file():  # not Hydra's own, nor the schema
                loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
                for key, value in leaves(loaded, file.package or "").items():
                    self._places[key] = (f"conf/{file.config_path}.yaml", value)
        for override in parse_overrides(overrides):
            key = override.key_or_group
            if key in KEYS or key.startswith("model.kwargs."):
                given = override.value()
                for leaf, value in leaves(given, key).items():
                    self._places[leaf] = (COMMAND_LINE, value)

    def __getitem__(self, key: str) -> str:
        """A key that stands for another one has that one's place."""
        place, value = self._places.get(key, (SCHEMA, DEFAULTS.get(key)))
        if isinstance(value, str) and (found := re.fullmatch(r"\$\{([\w.]+)\}", value)):
            return self[found[1]]
        return place
