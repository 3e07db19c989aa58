"""Exports with their proof: what is written is read back and compared with the model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models._hub import generate_readme
from torch import nn

from sequencer.evaluation import input_config
from sequencer.export.describe import describe, model_card
from sequencer.export.folder import write_model_folder
from sequencer.export.formats import DTYPES, to_onnx, to_program
from sequencer.export.provenance import versions
from sequencer.export.verify import compare, real_images, sha256_of_file, sha256_of_weights
from sequencer.models import (
    LoadedModel,
    create_model,
    load_exported,
    load_model,
    load_weights,
    read_weights,
    to_paper_layout,
)

GRAPHS = {"onnx": "model.onnx", "torch_export": "model.pt2"}
WEIGHTS = {"hub": "model.safetensors", "timm": "model.safetensors", "paper": "model.pth"}


def export_graph(
    loaded: LoadedModel, folder: Path, form: str, img_size: int, dtype: str = "fp32", with_preprocessing: bool = False
) -> dict[str, Any]:
    """Writes `onnx` or `torch_export` for square images of `img_size` into `folder`; returns the certificate.

    Raises:
        Mismatch: the export gives other outputs than the model.
    """
    path = folder / GRAPHS[form]
    description = describe(loaded, img_size, with_preprocessing)
    (to_onnx if form == "onnx" else to_program)(loaded.model, path, description, DTYPES[dtype])
    return certify(load_exported(path), loaded, path, img_size, dtype)


def export_weights(loaded: LoadedModel, folder: Path, form: str, name: str) -> dict[str, Any]:
    """Writes the weights as `hub`, `timm` or `paper` into `folder`; returns the certificate. `name` is what the card of
    a `hub` folder says that `timm.create_model` loads it by.

    Raises:
        Mismatch: what was written gives other outputs than the model.
    """
    path = folder / WEIGHTS[form]
    channels, img_size, _ = loaded.pretrained_cfg["input_size"]
    if form == "hub":
        write_model_folder(loaded, folder)
        (folder / "README.md").write_text(generate_readme(model_card(loaded, name), loaded.arch))
        again = load_model(folder).model
    else:
        weights = loaded.model.state_dict()
        save_file(weights, path) if form == "timm" else torch.save({"state_dict": to_paper_layout(weights)}, path)
        sizes = {"num_classes": loaded.model.num_classes, "in_chans": channels, "img_size": img_size}
        again = create_model(loaded.arch, **(sizes | loaded.model_args)).eval()
        load_weights(again, read_weights(path))
    return certify(again, loaded, path, img_size, "fp32")


def certify(exported: nn.Module, loaded: LoadedModel, path: Path, img_size: int, dtype: str) -> dict[str, Any]:
    fed = replace(input_config(loaded), img_size=img_size)
    images, source = real_images(fed, own_set=loaded.data is not None)
    return {
        "file": path.name,
        "sha256": sha256_of_file(path),
        "bytes": path.stat().st_size,
        "arch": loaded.arch,
        "slot": loaded.slot,
        "weights_sha256": sha256_of_weights(loaded.model),
        "dtype": dtype,
        "input_size": list(images.shape[1:]),
        "images": source,
        **compare(exported, loaded.model, images, dtype),
        "versions": versions(),
    }
