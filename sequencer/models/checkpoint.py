"""Reading of checkpoint files without running code from them, and loading of their weights into models."""

import argparse
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed_nhwc
from torch import Tensor, nn

from sequencer.models.layouts import strip_wrappers, to_timm_layout
from sequencer.printing import quote_odd

RAW_KEYS = ("state_dict", "model")
EMA_KEYS = ("state_dict_ema", "model_ema")
POSITION = "absolute_pos_embed"


class CheckpointError(ValueError):
    """A model that cannot be read or does not fit its architecture; the message has one or two lines."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a `.safetensors`, `.pth` or `.ckpt` file; tensors are placed on the CPU.

    Raises:
        CheckpointError: The file does not exist or cannot be read, is damaged, holds something else than a dictionary,
            or holds objects whose unpickling would run code.
    """
    path = Path(path)
    if not os.path.isfile(path):  # False, not an error, for a name that is too long
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        _check_records(path)
        # timm and the paper's repository store their command-line arguments as a Namespace of plain values
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises errors of many types
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise CheckpointError(f"{path} holds code ({refused[1]}), not only weights; it was not loaded") from error
        raise CheckpointError(f"{path} is damaged or no checkpoint") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a state dict")
    if not all(isinstance(key, str) for key in checkpoint):
        raise CheckpointError(f"{path} holds a dictionary with keys other than names, not a state dict")
    return checkpoint


def _check_records(path: Path) -> None:
    """Verifies the sizes and the checksums of a checkpoint's records, which torch writes but does not verify.

    Raises:
        ValueError: A record does not match its checksum, or the records unpack to more bytes than the file has.
    """
    if not zipfile.is_zipfile(path):  # saved before torch 1.6, or truncated, which `torch.load` detects
        return
    with zipfile.ZipFile(path) as records:
        if sum(record.file_size for record in records.infolist()) > path.stat().st_size:
            raise ValueError("the records are compressed or overlap, which torch.save does not do")
        if (altered := records.testzip()) is not None:
            raise ValueError(f"{altered} does not match its checksum")


def select_weights(checkpoint: dict[str, Any], slot: str | None = None) -> dict[str, Tensor]:
    """Returns the weights of a checkpoint under timm's names.

    Args:
        checkpoint: The contents of a checkpoint file.
        slot: `raw` or `ema`, for checkpoints that hold both. By default the raw weights where there are any, otherwise
            the EMA weights.

    Raises:
        CheckpointError: The checkpoint does not have this slot, or has no tensors.
    """
    keys = {"raw": RAW_KEYS, "ema": EMA_KEYS, None: RAW_KEYS + EMA_KEYS}[slot]
    found = next((checkpoint[key] for key in keys if isinstance(checkpoint.get(key), dict)), None)
    if found is None:
        if slot == "ema":
            raise CheckpointError("the checkpoint holds no EMA weights")
        found = checkpoint
    tensors = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError("the checkpoint holds no tensors where weights are expected")
    return to_timm_layout(strip_wrappers(tensors))


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], *, source: str = "the checkpoint", replace_head: bool = False
) -> list[str]:
    """Loads weights into `model`. A position embedding of another size is resampled.

    Args:
        model: The model.
        weights: Tensors under timm's names.
        source: Name of the weights in error messages.
        replace_head: If True, the model keeps its own head where the weights' head is missing or has another shape.

    Returns:
        The names of the head's parameters that were not loaded.

    Raises:
        CheckpointError: Keys are missing or unexpected, shapes differ, or integers stand for floating-point numbers or
            the reverse. The model is unchanged in this case.
    """
    own, weights = model.state_dict(), dict(weights)
    if POSITION in weights and POSITION in own and _can_resample(weights[POSITION], own[POSITION]):
        weights[POSITION] = resample_abs_pos_embed_nhwc(weights[POSITION], list(own[POSITION].shape[1:3]))
    kept: list[str] = []
    if replace_head:
        kept = [
            name
            for name in own
            if name.startswith(f"{classifier_name(model)}.")
            and (name not in weights or weights[name].shape != own[name].shape)
        ]
        weights |= {name: own[name] for name in kept}
    problems = {
        "missing": [name for name in own if name not in weights],
        "unexpected": [name for name in weights if name not in own],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ],
        "of another kind": [
            f"{name} {weights[name].dtype} for {own[name].dtype}"
            for name in own
            if name in weights and weights[name].is_floating_point() != own[name].is_floating_point()
        ],
        "not dense real numbers": [name for name in own if name in weights and not _is_dense(weights[name])],
    }
    if any(problems.values()):
        parts = [f"{len(names)} {kind}: {_abridge(names)}" for kind, names in problems.items() if names]
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: " + "; ".join(parts))
    model.load_state_dict(weights)
    return kept


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """Returns timm's configuration of a model: source of the weights, preprocessing, name of the classifier."""
    config = model.pretrained_cfg
    assert isinstance(config, dict)
    return config


def _can_resample(position: Tensor, own: Tensor) -> bool:
    """Whether a position embedding `1 H W C` differs from the model's own in height and width alone."""
    return (
        _is_dense(position)
        and position.ndim == 4
        and (position.shape[0], position.shape[3]) == (own.shape[0], own.shape[3])
        and position.shape != own.shape
        and position.numel() * position.itemsize <= position.untyped_storage().nbytes()  # not a repeated value
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor holds a real number for each of its entries, in memory."""
    dense = tensor.layout == torch.strided and not tensor.is_quantized
    return dense and tensor.device.type != "meta" and not tensor.is_complex()


def classifier_name(model: nn.Module) -> str:
    """Returns the module name of the head's last layer."""
    return pretrained_cfg(model).get("classifier") or "head.fc"


def _abridge(names: list[str], most: int = 3) -> str:
    return ", ".join(map(quote_odd, names[:most])) + (f", and {len(names) - most} more" if len(names) > most else "")
