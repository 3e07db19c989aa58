"""Declared types of what files say of a model: model folders, checkpoints of runs, and exported files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, field_validator, model_validator
from timm.data.constants import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from sequencer.declared import UndeclaredContent, check_type, decode_json
from sequencer.models.arguments import ArgumentError, check_model_args
from sequencer.models.checkpoint import CheckpointError
from sequencer.names import LARGEST_IMAGE, MOST_CLASSES

LONGEST_JSON = 2**24  # bytes
LONGEST_NAME = 1000  # characters


def _check_length(name: str) -> str:
    # `max_length` of pydantic refuses names with bytes that are not UTF-8
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a name of more than {LONGEST_NAME} characters")
    return name


Channels = Annotated[int, Field(ge=1, le=1024)]
ImageSize = Annotated[int, Field(ge=1, le=LARGEST_IMAGE)]
Name = Annotated[str, AfterValidator(_check_length)]
Names = Annotated[Sequence[Name], Field(max_length=MOST_CLASSES)]
Architecture = Annotated[str, Field(pattern=r"^[\w.-]{1,200}$")]
Slot = Literal["raw", "ema"]
Declared = TypeVar("Declared", bound=BaseModel)


class _Statistics(BaseModel):
    """The preprocessing of images besides their size. The defaults are those of `timm.data.resolve_data_config`."""

    mean: Sequence[FiniteFloat] = IMAGENET_DEFAULT_MEAN
    std: Sequence[Annotated[FiniteFloat, Field(gt=0)]] = IMAGENET_DEFAULT_STD
    crop_pct: Annotated[FiniteFloat, Field(ge=0.01, le=2)] = DEFAULT_CROP_PCT
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"] = "bicubic"

    def check_channels(self, channels: int) -> None:
        for name in ("mean", "std"):
            if (number := len(getattr(self, name))) not in (1, channels):
                raise ValueError(f"{name}: {number} values for images of {channels} channels")

    def to_timm(self, channels: int, height: int, width: int) -> dict[str, Any]:
        """Returns the preprocessing entries of timm's pretrained_cfg, for images of a size."""
        sizes = {"input_size": (channels, height, width), "mean": tuple(self.mean), "std": tuple(self.std)}
        return sizes | {"crop_pct": self.crop_pct, "interpolation": self.interpolation}


class Preprocessing(_Statistics):
    """The preprocessing entries of timm's pretrained_cfg; entries of other kinds are ignored."""

    input_size: Annotated[Sequence[int], Field(min_length=3, max_length=3)]

    @field_validator("input_size")
    @classmethod
    def check_input_size(cls, value: Sequence[int]) -> Sequence[int]:
        if not (1 <= value[0] <= 1024 and all(1 <= extent <= LARGEST_IMAGE for extent in value[1:])):
            raise ValueError(f"give 1 to 1024 channels, and a height and a width of 1 to {LARGEST_IMAGE} pixels")
        return value

    @model_validator(mode="after")
    def check(self) -> "Preprocessing":
        self.check_channels(self.input_size[0])
        return self

    def as_timm(self) -> dict[str, Any]:
        return self.to_timm(*self.input_size)


class KeyFigures(BaseModel):
    """The result of a model on the images of a split; a figure that is not defined or not finite is None."""

    split: Literal["val", "test"]
    images: Annotated[int, Field(ge=0)]
    top1: float | None
    top1_interval: Annotated[Sequence[float], Field(min_length=2, max_length=2)] | None  # at 95%, by Wilson's score
    loss: float | None  # cross-entropy, in nats
    calibration_error: float | None  # expected, in 15 bins of equal width
    operations: int  # multiplications and additions of a forward pass with one image
    confusion: list[list[int]] | None  # images by true class and predicted class; None for many classes

    @model_validator(mode="after")
    def check_confusion(self) -> "KeyFigures":
        if self.confusion is not None and any(len(row) != len(self.confusion) for row in self.confusion):
            raise ValueError("confusion: not a square matrix")
        return self


class About(BaseModel):
    """The origin of a model; every entry is optional."""

    config: dict[str, Any] = {}
    images: dict[str, int] = {}  # of each split
    metrics: dict[str, Any] = {}
    figures: KeyFigures | None = None
    commit: str | None = None
    versions: dict[str, Any] = {}
    averaged: list[str] = []

    @field_validator("config")
    @classmethod
    def check_config(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("data", {}), dict):
            raise ValueError("its entry data should be a dictionary")
        return value

    def present(self) -> dict[str, Any]:
        """Returns the entries that the file has."""
        return self.model_dump(include=set(About.model_fields), exclude_unset=True)


class _Description(BaseModel):
    """What model folders and exported files have in common."""

    model_config = ConfigDict(protected_namespaces=())  # of names that begin with model_

    slot: Slot = "raw"
    num_classes: Annotated[int, Field(ge=0, le=MOST_CLASSES)]
    label_names: Names | None = None
    pretrained_cfg: Preprocessing
    model_args: dict[str, Any] = {}

    @model_validator(mode="after")
    def check_names(self) -> "_Description":
        if self.label_names and len(self.label_names) != self.num_classes:
            raise ValueError(f"label_names: {len(self.label_names)} names for {self.num_classes} classes")
        return self

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return tuple(self.label_names) if self.label_names else None


class FolderDescription(_Description, About):
    """The `config.json` of a model folder, which timm writes; entries of other kinds are ignored."""

    architecture: Architecture

    @model_validator(mode="after")
    def check_args(self) -> "FolderDescription":
        _check_args("model_args", self.architecture, self.model_args)
        if self.model_args.get("num_classes", self.num_classes) != self.num_classes:
            raise ValueError(f"num_classes: {self.num_classes}, but model_args has another number of classes")
        return self

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `create_model`."""
        channels, height, _ = self.pretrained_cfg.input_size
        return {"num_classes": self.num_classes, "in_chans": channels, "img_size": height} | self.model_args


class ExportDescription(_Description):
    """The description of an exported file, which `sequencer.export.describe_export` builds."""

    arch: Architecture
    about: About = About()
    preprocessing: bool = False


class RunModel(BaseModel):
    """The model section of a run's configuration."""

    name: Architecture
    in_chans: Channels
    img_size: ImageSize
    kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def check_args(self) -> "RunModel":
        _check_args("kwargs", self.name, self.kwargs)
        return self


class RunData(_Statistics):
    """The preprocessing in the data section of a run's configuration."""

    in_chans: Channels
    img_size: ImageSize

    @model_validator(mode="after")
    def check(self) -> "RunData":
        self.check_channels(self.in_chans)
        return self

    def as_timm(self) -> dict[str, Any]:
        return self.to_timm(self.in_chans, self.img_size, self.img_size)


class RunTrainer(BaseModel):
    """The trainer section of a run's configuration."""

    slot: Slot


class RunConfig(BaseModel):
    """The sections of a run's configuration that describe its model."""

    model: RunModel
    data: RunData
    trainer: RunTrainer


class RunDescription(BaseModel):
    """What the checkpoint of a run says of its model; its other entries are ignored."""

    config: RunConfig
    class_names: Annotated[Names, Field(min_length=1)]

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `create_model`, besides the name."""
        section = self.config.model
        sizes = {"num_classes": len(self.class_names), "in_chans": section.in_chans, "img_size": section.img_size}
        return sizes | section.kwargs


def _check_args(entry: str, arch: str, args: Mapping[str, Any]) -> None:
    try:
        check_model_args(arch, args)
    except ArgumentError as error:
        raise ValueError(f"{entry}.{error}") from error


def describe_folder(folder: Path) -> FolderDescription:
    """Reads the `config.json` of a model folder.

    Raises:
        CheckpointError: The file cannot be read, is no JSON, or does not have the declared type.
    """
    path = folder / "config.json"
    try:
        with open(path, "rb") as file:
            text = file.read(LONGEST_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return parse_description(FolderDescription, text, str(path))


def parse_description(model: type[Declared], text: str | bytes, name: str) -> Declared:
    """Parses JSON that describes a model.

    Args:
        model: The declared type.
        text: The JSON.
        name: Name of the file in error messages.

    Raises:
        CheckpointError: The text is too long, is no JSON, or does not have this type.
    """
    if len(text) > LONGEST_JSON:
        raise CheckpointError(f"{name}: the description of a model is never longer than {LONGEST_JSON:,} bytes")
    try:
        value = decode_json(text)
    except ValueError as error:
        raise CheckpointError(f"{name} is damaged: its description is not JSON") from error
    return check_description(model, value, name)


def check_description(model: type[Declared], value: Any, name: str) -> Declared:
    """Returns what a file says of a model as the declared type.

    Raises:
        CheckpointError: The value does not have this type.
    """
    try:
        return check_type(model, value, name)
    except UndeclaredContent as error:
        raise CheckpointError(str(error)) from error
