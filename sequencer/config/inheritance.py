"""What a run takes from the model that `init_from` names: architecture, channels, image size and normalisation."""

import io
import os
import pickle
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from pydantic import AfterValidator, BaseModel, Field

from sequencer.config.errors import RequestError
from sequencer.config.schema import Config
from sequencer.declared import UndeclaredContent, check_type, decode_json
from sequencer.printing import first_line, printable

KEYS = ("model.name", "model.kwargs", "data.in_chans", "data.img_size", "data.mean", "data.std")
LARGEST_PICKLE = 2**26  # bytes of a checkpoint without its tensors


def _check_plain(value: Any, depth: int = 5) -> Any:
    """Checks that a value consists of numbers and text without references to keys, in lists and dictionaries."""
    plain = isinstance(value, str | int | float | None) and "${" not in str(value)
    if not plain and not (depth and isinstance(value, list | dict)):
        raise ValueError("it holds more than numbers and plain text")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_plain(item, depth - 1)
    return value


class _Model(BaseModel):
    name: str = Field(pattern=r"^[\w.-]{1,200}$")
    kwargs: dict[Annotated[str, Field(pattern=r"^\w{1,100}$")], Annotated[Any, AfterValidator(_check_plain)]] = {}


class _Data(BaseModel):
    name: str = Field("", max_length=200)
    in_chans: int
    img_size: int
    mean: list[float]
    std: list[float]


class _Config(BaseModel):
    """The part of a run's configuration that describes its model."""

    model: _Model
    data: _Data

    def values(self) -> dict[str, Any]:
        sections = {"model": self.model.model_dump(), "data": self.data.model_dump()}
        return {key: sections[key.split(".")[0]][key.split(".")[1]] for key in KEYS}


def inherited_values(source: str | None) -> dict[str, Any]:
    """Returns the values that a run takes from `init_from`, by key, unless it is told otherwise.

    A run folder, a model folder of a run and a checkpoint of a run have such values. A timm name and a file of weights
    have none. The tensors of a checkpoint are not read.

    Raises:
        RequestError: The configuration in the source cannot be read.
    """
    found = _checked(source)
    return found.values() if found else {}


def warn_of_data(config: Config, overrides: Sequence[Override]) -> None:
    """Warns on standard error that a run trains on its default data set, and the run in `init_from` on another one.

    Args:
        config: The run.
        overrides: The overrides of the command, of which none names data or a recipe if there is a warning.

    Raises:
        RequestError: The configuration in the source cannot be read.
    """
    if os.environ.get("RANK", "0") != "0" or any(o.key_or_group.startswith(("data", "experiment")) for o in overrides):
        return
    found = _checked(config.init_from)
    if found and found.data.name not in ("", config.data.name):
        there = printable(found.data.name)
        print(
            f"warning: this run trains on data={config.data.name}, and {printable(config.init_from)} on data={there}:\n"
            f"data={there} data.root=... chooses its data",
            file=sys.stderr,
        )


def _checked(source: str | None) -> _Config | None:
    """Returns the part of a configuration that describes a model and its data, or None if the source has none."""
    path = Path(os.path.expanduser(source or ""))  # unlike that of Path, it takes a user that there is not
    try:
        if source and (found := _read(path)) is not None:
            return check_type(_Config, found, str(path))
    except UndeclaredContent as error:
        raise RequestError(f"init_from={error}") from error
    except Exception as error:  # of YAML or JSON, which have no common base class
        raise RequestError(f"init_from={source}: its configuration cannot be read: {first_line(error)}") from error
    return None


def _read(path: Path) -> Any:
    """Returns the configuration of the run in a folder or checkpoint, or None if there is none."""
    for folder in (path, path / "model"):
        if (file := folder / "config.yaml").is_file() and (content := OmegaConf.to_container(OmegaConf.load(file))):
            return content
        if (file := folder / "config.json").is_file():
            return decode_json(file.read_bytes()).get("config")
    return _read_checkpoint(path) if path.suffix == ".ckpt" and path.is_file() else None


def _read_checkpoint(path: Path) -> Any:
    """Returns the configuration in a checkpoint, or None where it cannot be read, as its weights then cannot either."""
    try:
        with zipfile.ZipFile(path) as records:
            record = next(record for record in records.infolist() if record.filename.endswith("/data.pkl"))
            if record.file_size > LARGEST_PICKLE:
                return None
            return _PlainValues(io.BytesIO(records.read(record))).load().get("config")
    except Exception:  # damaged zip files and pickles raise errors of many types
        return None


class _PlainValues(pickle.Unpickler):
    """Reads the plain values of a checkpoint: tensors and other objects become placeholders, and no code is run."""

    def find_class(self, module: str, name: str) -> Any:
        return _Placeholder

    def persistent_load(self, pid: Any) -> None:
        return None


class _Placeholder(dict[Any, Any]):
    """What stands for an object of any class; it takes any arguments, and the entries of a dictionary."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass
