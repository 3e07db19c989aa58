"""Loading of a model from a run folder, a model folder, a checkpoint file, an exported file or a timm name."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from sequencer.models.build import build_within, create_model
from sequencer.models.checkpoint import (
    CheckpointError,
    classifier_name,
    load_weights,
    pretrained_cfg,
    read_checkpoint,
    select_weights,
)
from sequencer.models.declarations import RunDescription, check_description, describe_folder
from sequencer.models.exported import check_original, is_export, load_exported

PREPROCESSING = ("input_size", "mean", "std", "crop_pct", "interpolation")  # keys of timm's pretrained_cfg


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
    source: str = ""  # the file that describes the model, if it was loaded from one

    @property
    def data(self) -> dict[str, Any] | None:
        """The data section of the run's configuration, or None if the model is not from a run."""
        return self.about.get("config", {}).get("data")


def load_model(
    source: str | Path, arch: str | None = None, slot: str | None = None, trust: bool = False
) -> LoadedModel:
    """Loads a model.

    Args:
        source: A run folder (its `model/`, or its checkpoint while the run has not finished), a model folder, a `.ckpt`
            of a run, a `.safetensors` or `.pth` file, an exported file (`.onnx`, `.pt2`), or a timm name, whose
            published weights are downloaded.
        arch: Registered name of the architecture, for files that do not name it.
        slot: `raw` or `ema`, for files that hold both. By default the run's `trainer.slot`, or raw.
        trust: Whether a `.pt2` file, which can run any code when it is loaded, may be loaded.

    Raises:
        CheckpointError: `source` is none of these, cannot be read, is not trusted, or does not fit the architecture.
    """
    path = Path(source)
    if not os.path.exists(path):  # False, not an error, for a name that is too long
        return _load_published(str(source))
    if path.is_dir():
        return _load_folder(path, slot)
    if not path.is_file():
        raise CheckpointError(f"{path} is neither a regular file nor a folder")
    if is_export(path):
        return _load_exported(path, trust)
    checkpoint = read_checkpoint(path)
    if {"config", "class_names"} <= checkpoint.keys():
        return _load_run_checkpoint(checkpoint, path, slot)
    return _load_file(checkpoint, path, arch, slot)


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
    said = describe_folder(folder)
    path = folder / "model.safetensors"
    weights = read_checkpoint(path)
    model = build_within(path, len(weights), said.architecture, **said.arguments())
    load_weights(model, weights, source=str(folder))
    cfg, source = said.pretrained_cfg.as_timm(), str(folder / "config.json")
    return LoadedModel(
        model.eval(), said.architecture, said.slot, said.class_names, cfg, said.model_args, said.present(), source
    )


def _load_run_checkpoint(checkpoint: dict[str, Any], path: Path, slot: str | None) -> LoadedModel:
    said = check_description(RunDescription, checkpoint, str(path))
    section, slot = said.config.model, slot or said.config.trainer.slot
    weights = select_weights(checkpoint, slot)
    model = build_within(path, len(weights), section.name, **said.arguments())
    load_weights(model, weights, source=str(path))
    cfg, about = said.config.data.as_timm(), {"config": checkpoint["config"]}
    return LoadedModel(model.eval(), section.name, slot, tuple(said.class_names), cfg, section.kwargs, about, str(path))


def _load_file(checkpoint: dict[str, Any], path: Path, arch: str | None, slot: str | None) -> LoadedModel:
    if arch is None:
        raise CheckpointError(f"{path} does not say its architecture: add --arch NAME")
    weights = select_weights(checkpoint, slot)
    model = create_model(arch)
    classes = _head_size(model, weights)
    if classes is not None and classes != model.num_classes:
        model = build_within(path, len(weights), arch, num_classes=classes)
    load_weights(model, weights, source=str(path))
    return LoadedModel(model.eval(), arch, slot or "raw", None, pretrained_cfg(model), source=str(path))


def _load_published(name: str) -> LoadedModel:
    if not timm.is_model(name):
        raise CheckpointError(f"{name} is neither a file or folder nor a timm model name")
    if not timm.is_model_pretrained(name):
        raise CheckpointError(f"{name} has no published weights; give a checkpoint file and --arch {name}")
    model = create_model(name, pretrained=True)
    cfg = pretrained_cfg(model)
    names = cfg.get("label_names")
    return LoadedModel(model.eval(), name, "raw", tuple(names) if names else None, cfg)


def _load_exported(path: Path, trust: bool) -> LoadedModel:
    model = load_exported(path, trust)
    said = model.description
    return LoadedModel(
        model.eval(),
        said.arch,
        said.slot,
        said.class_names,
        said.pretrained_cfg.as_timm(),
        said.model_args,
        said.about.present(),
        str(path),
    )


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
    return None if weight is None or weight.ndim == 0 else weight.shape[0]


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """Reads the weights of a model, of any architecture, under timm's names.

    Args:
        source: A checkpoint file, or any `source` of `load_model` but an exported file.

    Raises:
        CheckpointError: As `load_model`, or `source` is an exported file.
    """
    path = Path(source)
    check_original(path)
    if os.path.isfile(path):
        return select_weights(read_checkpoint(path))
    return load_model(source).model.state_dict()
