"""The preprocessing of a loaded model as a data section: that of its run, or that of timm's configuration."""

import copy
import warnings
from dataclasses import fields, replace
from typing import Any

import torch
from pydantic import create_model
from timm.data import resolve_data_config

from sequencer.config.errors import RequestError
from sequencer.config.schema import DataConfig
from sequencer.config.validation import check_bounds
from sequencer.declared import UndeclaredContent, check_type
from sequencer.models import LoadedModel

REFUSALS = (
    ValueError,
    AssertionError,
    RuntimeError,
    ZeroDivisionError,
)  # timm's models refuse sizes in each of these ways

# a run of another version may have other keys; the augmentation of training images is not needed here, and a file of
# others must not start a download
UNUSED = ("augment", "download")
KNOWN: dict[str, Any] = {field.name: field.type for field in fields(DataConfig) if field.name not in UNUSED}
DataSection = create_model("DataSection", **{name: (kind | None, None) for name, kind in KNOWN.items()})  # type: ignore[call-overload]


def data_section(loaded: LoadedModel) -> DataConfig | None:
    """The data section of the run that trained the model, without its augmentation; None if no run is known.

    Raises:
        RequestError: The file that the model was loaded from has a value of a wrong type or out of range there.
    """
    if loaded.data is None:
        return None
    given = {name: value for name, value in loaded.data.items() if name in KNOWN}
    try:
        check_type(DataSection, given, f"{loaded.source}: config.data")
    except UndeclaredContent as error:
        raise RequestError(str(error)) from error
    section = DataConfig(**given)
    check_bounds(section, f"{loaded.source}: config.data.")
    return section


def input_config(loaded: LoadedModel) -> DataConfig:
    """A data section with the model's preprocessing; it names the data set of the run, where a run is known."""
    return data_section(loaded) or DataConfig(**data_settings(loaded.pretrained_cfg))


def data_settings(pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    """The keys of `DataConfig` that describe the preprocessing in timm's configuration of a model.

    The inverse of `sequencer.models.timm_preprocessing`. Missing entries get timm's defaults.
    """
    entries = resolve_data_config(pretrained_cfg=pretrained_cfg)
    in_chans, img_size, _ = entries["input_size"]
    return {
        "in_chans": in_chans,
        "img_size": img_size,
        "mean": list(entries["mean"]),
        "std": list(entries["std"]),
        "crop_pct": entries["crop_pct"],
        "interpolation": entries["interpolation"],
    }


def at_img_size(loaded: LoadedModel, img_size: int) -> LoadedModel:
    """Prepares a model for square images of another size, and checks it by a forward pass on the CPU.

    Returns:
        The model itself where it takes images of any size, or has this one. Otherwise a copy whose size is set by timm,
        which resamples position embeddings and scales the windows of attention.

    Raises:
        RequestError: The model does not take this size.
    """
    own_size = loaded.pretrained_cfg["input_size"][-1]
    if img_size != own_size and hasattr(loaded.model, "set_input_size"):
        loaded = replace(loaded, model=copy.deepcopy(loaded.model))
        try:
            with warnings.catch_warnings(action="ignore"):  # of torch about timm's resampling of position biases
                loaded.model.set_input_size(img_size=(img_size, img_size))  # type: ignore[operator]  # a method of timm's
        except REFUSALS as error:
            raise RequestError(f"{loaded.arch} takes no images of {img_size} px: {error}") from error
    check_img_size(loaded, img_size)
    return loaded


@torch.inference_mode()
def check_img_size(loaded: LoadedModel, img_size: int) -> None:
    """Checks by a forward pass on the CPU that the model takes square images of `img_size` pixels.

    Raises:
        RequestError: The model does not take this size.
    """
    try:
        loaded.model(torch.zeros(1, loaded.pretrained_cfg["input_size"][0], img_size, img_size))
    except REFUSALS as error:
        raise RequestError(f"{loaded.arch} takes no images of {img_size} px: {error}") from error
