"""The configuration: the schema of a run, the checks of a request, and sweeps. Imports neither torch nor timm."""

from typing import TYPE_CHECKING, Any

from sequencer.config.errors import RequestError
from sequencer.config.schema import Config, DataConfig

if TYPE_CHECKING:
    from sequencer.config.composition import compose
    from sequencer.config.conf_files import conf_dir

__all__ = ["Config", "DataConfig", "RequestError", "compose", "conf_dir"]


def __getattr__(name: str) -> Any:
    """Imports what needs Hydra where it is used: prediction and export do without it."""
    if name == "compose":
        from sequencer.config.composition import compose

        return compose
    if name == "conf_dir":
        from sequencer.config.conf_files import conf_dir

        return conf_dir
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
