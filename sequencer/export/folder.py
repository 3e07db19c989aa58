"""The model folder: timm's hub layout, `config.json` and `model.safetensors`."""

import shutil
from pathlib import Path
from typing import Any

from timm.models import save_for_hf
from torch import nn


def save_model_folder(
    model: nn.Module,
    folder: Path,
    *,
    preprocessing: dict[str, Any],
    model_args: dict[str, Any],
    class_names: list[str],
    extra: dict[str, Any],
) -> None:
    """Writes `folder`, replacing an older one only when the new one is complete.

    Args:
        model: a timm model on the CPU.
        preprocessing: timm's entries: input_size, mean, std, crop_pct, interpolation.
        model_args: arguments that the model was built with, beyond its name, classes and channels.
        class_names: one a class, in the order of the logits.
        extra: our entries, plain values; they stand on the top level of `config.json`, because timm refuses a key
            inside `pretrained_cfg` that it does not know.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    config = {"pretrained_cfg": preprocessing, "label_names": class_names} | extra
    save_for_hf(model, str(partial), model_config=config, model_args=model_args, safe_serialization=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
