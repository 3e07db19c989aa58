"""Loading of a model from a run folder, a model folder, a checkpoint file, an exported file or a timm name."""

import difflib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from timm.models import get_arch_name
from torch import Tensor, nn

from sequencer.models.checkpoint import (
    CheckpointError,
    classifier_name,
    load_weights,
    pretrained_cfg,
    read_checkpoint,
    select_weights,
)
from sequencer.models.exported import SUFFIXES, load_exported
from sequencer.names import LOADING_ARGUMENTS
from sequencer.variants import VARIANTS

PREPROCESSING = ("input_size", "mean", "std", "crop_pct", "interpolation")  # keys of timm's pretrained_cfg
ABOUT = ("config", "metrics", "commit", "versions", "averaged")  # keys of `LoadedModel.about` in a folder's config.json


@dataclass(frozen=True)
class LoadedModel:
    """A trained model with its classes, its preprocessing and its origin."""

    model: nn.Module  # in eval mode, on the CPU
    arch: str  # registered name of the architecture
    slot: str  # which weights the model has: raw or ema
    class_names: tuple[str, ...] | None
    pretrained_cfg: dict[str, Any]  # timm's preprocessing: input_size, mean, std, crop_pct, interpolation
    model_args: dict[str, Any] = field(default_factory=dict)  # besides num_classes, in_chans and img_size
    about: dict[str, Any] = field(default_factory=dict)  # origin: config, metrics, versions, ...

    @property
    def data(self) -> dict[str, Any] | None:
        """The data section of the run's configuration, or None if the model is not from a run."""
        return self.about.get("config", {}).get("data")


def load_model(source: str | Path, arch: str | None = None, slot: str | None = None) -> LoadedModel:
    """Loads a model.

    Args:
        source: A run folder (its `model/`, or its checkpoint while the run has not finished), a model folder, a `.ckpt`
            of a run, a `.safetensors` or `.pth` file, an exported file (`.onnx`, `.pt2`), or a timm name, whose
            published weights are downloaded.
        arch: Registered name of the architecture, for files that do not name it.
        slot: `raw` or `ema`, for files that hold both. By default the run's `trainer.slot`, or raw.

    Raises:
        CheckpointError: `source` is none of these, cannot be read, or does not fit the architecture.
    """
    path = Path(source)
    if path.is_dir():
        return _load_folder(path, slot)
    if path.is_file() and path.suffix in SUFFIXES:
        return _load_exported(path)
    if path.is_file():
        checkpoint = read_checkpoint(path)
        return (
            _load_run_checkpoint(checkpoint, path, slot)
            if {"config", "class_names"} <= checkpoint.keys()
            else _load_file(checkpoint, path, arch, slot)
        )
    return _load_published(str(source))


def _load_folder(folder: Path, slot: str | None) -> LoadedModel:
    model_folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    loaded = _load_model_folder(model_folder) if (model_folder / "config.json").is_file() else None
    if loaded and slot in (None, loaded.slot):
        return loaded
    for name in ("best.ckpt", "last.ckpt"):
        if (path := folder / "checkpoints" / name).is_file():
            return _load_run_checkpoint(read_checkpoint(path), path, slot)
    if loaded:
        raise CheckpointError(f"{model_folder} holds the {loaded.slot} weights alone, not the {slot} ones")
    raise CheckpointError(f"{folder} is neither a run nor a model folder: no model/config.json, no checkpoints/")


def _load_model_folder(folder: Path) -> LoadedModel:
    try:
        config = json.loads((folder / "config.json").read_text())
        arch, cfg = config["architecture"], _with_tuples(config["pretrained_cfg"])
        channels, height, _ = cfg["input_size"]
        sizes = {"num_classes": config["num_classes"], "in_chans": channels, "img_size": height}
        args = sizes | config.get("model_args", {})
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is damaged or not a timm model configuration") from error
    model = create_model(arch, **args)
    load_weights(model, read_checkpoint(folder / "model.safetensors"), source=str(folder))
    about = {key: config[key] for key in ABOUT if key in config}
    return LoadedModel(
        model.eval(), arch, config.get("slot", "raw"), _names(config), cfg, config.get("model_args", {}), about
    )


def _load_run_checkpoint(checkpoint: dict[str, Any], path: Path, slot: str | None) -> LoadedModel:
    config, names = checkpoint["config"], checkpoint["class_names"]
    slot = slot or config["trainer"]["slot"]
    section = config["model"]
    model = create_model(
        section["name"],
        num_classes=len(names),
        in_chans=section["in_chans"],
        img_size=section["img_size"],
        **section["kwargs"],
    )
    load_weights(model, select_weights(checkpoint, slot), source=str(path))
    cfg = timm_preprocessing(config["data"])
    return LoadedModel(model.eval(), section["name"], slot, tuple(names), cfg, section["kwargs"], {"config": config})


def _load_file(checkpoint: dict[str, Any], path: Path, arch: str | None, slot: str | None) -> LoadedModel:
    if arch is None:
        raise CheckpointError(f"{path} does not say its architecture: add --arch NAME")
    weights = select_weights(checkpoint, slot)
    model = create_model(arch)
    classes = _head_size(model, weights)
    if classes is not None and classes != model.num_classes:
        model = create_model(arch, num_classes=classes)
    load_weights(model, weights, source=str(path))
    return LoadedModel(model.eval(), arch, slot or "raw", None, pretrained_cfg(model))


def _load_published(name: str) -> LoadedModel:
    if not timm.is_model(name):
        raise CheckpointError(f"{name} is neither a file or folder nor a timm model name")
    if not timm.is_model_pretrained(name):
        raise CheckpointError(f"{name} has no published weights; give a checkpoint file and --arch {name}")
    model = create_model(name, pretrained=True)
    cfg = pretrained_cfg(model)
    return LoadedModel(model.eval(), name, "raw", _names(cfg), cfg)


def _load_exported(path: Path) -> LoadedModel:
    model = load_exported(path)
    description = model.description
    return LoadedModel(
        model.eval(),
        description["arch"],
        description["slot"],
        _names(description),
        _with_tuples(description["pretrained_cfg"]),
        description["model_args"],
        description["about"],
    )


def _with_tuples(cfg: dict[str, Any]) -> dict[str, Any]:
    """Converts lists to tuples, which timm's configurations have and JSON does not keep."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}


def _names(config: dict[str, Any]) -> tuple[str, ...] | None:
    names = config.get("label_names")
    return tuple(names) if names else None


def timm_preprocessing(data: dict[str, Any]) -> dict[str, Any]:
    """Converts the data section of a configuration to the preprocessing entries of timm's pretrained_cfg."""
    return {
        "input_size": (data["in_chans"], data["img_size"], data["img_size"]),
        "mean": tuple(data["mean"]),
        "std": tuple(data["std"]),
        "crop_pct": data["crop_pct"],
        "interpolation": data["interpolation"],
    }


def _head_size(model: nn.Module, weights: dict[str, Tensor]) -> int | None:
    weight = weights.get(f"{classifier_name(model)}.weight")
    return None if weight is None else weight.shape[0]


def create_model(name: str, img_size: int | Sequence[int] | None = None, **kwargs: Any) -> nn.Module:
    """Builds a model by `timm.create_model`.

    Args:
        name: Registered name.
        img_size: Height and width of the images in pixels. It is passed to models that are built for one size and
            ignored by others.
        **kwargs: Arguments of `timm.create_model`.

    Raises:
        CheckpointError: There is no model of this name, it does not accept the arguments, or its published weights
            cannot be downloaded.
    """
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(nearest)}?" if nearest else ""
        raise CheckpointError(f"unknown model {name}{hint}")
    try:
        config = timm.get_pretrained_cfg(name)
        if img_size is not None and (get_arch_name(name) in VARIANTS or (config and config.fixed_input_size)):
            kwargs["img_size"] = img_size
        return timm.create_model(name, **kwargs)
    except Exception as error:  # timm's models and the hub client raise errors of many types
        reason = _unknown_argument(name, error) or (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{name} cannot be built: {reason}") from error


def _unknown_argument(name: str, error: Exception) -> str | None:
    """Describes an argument that the class of a model does not have, and those that it has; None for other errors."""
    found = re.search(r"(?:(\w+)\.__init__\(\) )?got an unexpected keyword argument '(\w+)'", str(error))
    if not isinstance(error, TypeError) or found is None:
        return None
    arch = get_arch_name(name)
    if arch in VARIANTS:
        model: Any = getattr(importlib.import_module("sequencer.models.sequencer"), VARIANTS[arch].model)
    else:
        model = getattr(sys.modules[timm.model_entrypoint(arch).__module__], found[1] or "", None)
    known = sorted(
        {
            parameter.name
            for base in getattr(model, "__mro__", ())
            for parameter in inspect.signature(base.__init__).parameters.values()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
        - {"self", "token_mixer", "num_classes", "in_chans", "img_size", *LOADING_ARGUMENTS}
    )
    nearest = difflib.get_close_matches(found[2], known, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"it has no argument {found[2]}{hint}" + (f"\nThere are {', '.join(known)}" if known else "")


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """Reads the weights of a model, of any architecture, under timm's names.

    Args:
        source: A checkpoint file, or any `source` of `load_model`.

    Raises:
        CheckpointError: As `load_model`.
    """
    if Path(source).is_file():
        return select_weights(read_checkpoint(source))
    return load_model(source).model.state_dict()
