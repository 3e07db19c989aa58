"""The configuration: the schema of a run, the checks of a request, and sweeps. Imports neither torch nor timm."""

from sequencer.config.composition import compose
from sequencer.config.conf_files import conf_dir
from sequencer.config.errors import RequestError
from sequencer.config.schema import Config, DataConfig

__all__ = ["Config", "DataConfig", "RequestError", "compose", "conf_dir"]
