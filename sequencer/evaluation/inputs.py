"""What a model is fed with: the data section that it was trained with, or the preprocessing that it was made for."""

from dataclasses import fields
from typing import Any

from timm.data import resolve_data_config

from conf.schema import DataConfig
from sequencer.models import LoadedModel


def data_section(loaded: LoadedModel) -> DataConfig | None:
    """The data section of the run that a model is from, without its augmentation."""
    if loaded.data is None:
        return None
    # a run of another version may know other keys; how training images were augmented plays no part here
    known = {field.name for field in fields(DataConfig)} - {"augment"}
    return DataConfig(**{key: value for key, value in loaded.data.items() if key in known})


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
