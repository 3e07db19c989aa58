"""What a model is fed with: the data section that it was trained with, or the preprocessing that it was made for."""

from dataclasses import fields
from typing import Any

import torch
from timm.data import resolve_data_config

from sequencer.config.errors import RequestError
from sequencer.config.schema import DataConfig
from sequencer.models import LoadedModel


def data_section(loaded: LoadedModel) -> DataConfig | None:
    """The data section of the run that a model is from, without its augmentation."""
    if loaded.data is None:
        return None
    # a run of another version may know other keys; how training images were augmented plays no part here
    known = {field.name for field in fields(DataConfig)} - {"augment"}
    return DataConfig(**{key: value for key, value in loaded.data.items() if key in known})


def input_config(loaded: LoadedModel) -> DataConfig:
    """A data section that says how the model's images are prepared, and, where it is known, which set they are of."""
    return data_section(loaded) or DataConfig(**preprocessing(loaded))


def preprocessing(loaded: LoadedModel) -> dict[str, Any]:
    """The keys of DataConfig for what timm's configuration of the model says."""
    entries = resolve_data_config(pretrained_cfg=loaded.pretrained_cfg)
    in_chans, img_size, _ = entries["input_size"]
    return {
        "in_chans": in_chans,
        "img_size": img_size,
        "mean": list(entries["mean"]),
        "std": list(entries["std"]),
        "crop_pct": entries["crop_pct"],
        "interpolation": entries["interpolation"],
    }


@torch.inference_mode()
def check_img_size(loaded: LoadedModel, img_size: int) -> None:
    """
    Raises:
        RequestError: the model takes no square images of `img_size` pixels.
    """
    try:
        loaded.model(torch.zeros(1, loaded.pretrained_cfg["input_size"][0], img_size, img_size))
    except (ValueError, AssertionError, RuntimeError) as error:  # timm's models refuse sizes in each of these ways
        raise RequestError(f"{loaded.arch} takes no images of {img_size} px: {error}") from error
