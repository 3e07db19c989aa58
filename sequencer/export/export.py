"""Export with verification: every exported file is read back and compared with the model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from sequencer.evaluation import input_config
from sequencer.export.card import LOCAL
from sequencer.export.description import describe_export
from sequencer.export.folder import confusion_of, write_model_folder
from sequencer.export.formats import DTYPES, to_onnx, to_program
from sequencer.export.provenance import versions
from sequencer.export.verify import compare, real_images, sha256_of_file, sha256_of_weights
from sequencer.files import writing
from sequencer.models import (
    LoadedModel,
    create_model,
    load_exported,
    load_model,
    load_weights,
    read_weights,
    to_paper_layout,
)
from sequencer.names import EXPORTED_GRAPHS, EXPORTED_WEIGHTS


def export_graph(
    loaded: LoadedModel, folder: Path, form: str, img_size: int, dtype: str = "fp32", with_preprocessing: bool = False
) -> dict[str, Any]:
    """Exports a model as a graph and compares the graph with the model.

    Args:
        loaded: The model.
        folder: An existing folder, into which the file named in `EXPORTED_GRAPHS` is written.
        form: A key of `EXPORTED_GRAPHS`: `onnx` or `torch_export`.
        img_size: Height and width of the images that the graph accepts, in pixels. The batch size is free.
        dtype: Data type of weights and computations, `fp32` or `fp16`; inputs and outputs are float32 in both cases.
        with_preprocessing: If True, the graph takes uint8 images `B H W C` and returns probabilities. Otherwise it
            takes normalised images `B C H W` and returns logits.

    Returns:
        The certificate: file, checksums, errors and versions.

    Raises:
        Mismatch: The outputs of the graph differ from those of the model.
        RequestError: ONNX has no operator for the model's cell.
    """
    path = folder / EXPORTED_GRAPHS[form]
    description = describe_export(loaded, img_size, with_preprocessing)
    (to_onnx if form == "onnx" else to_program)(loaded.model, path, description, DTYPES[dtype])
    return certify(load_exported(path, trust=True), loaded, path, img_size, dtype)


def export_weights(loaded: LoadedModel, folder: Path, form: str, name: str = LOCAL) -> dict[str, Any]:
    """Exports the weights of a model, loads them again and compares the outputs.

    Args:
        loaded: The model.
        folder: An existing folder, into which the file named in `EXPORTED_WEIGHTS` is written, for `hub` the
            other files of a model folder too.
        form: A key of `EXPORTED_WEIGHTS`: `hub`, `timm` or `paper`.
        name: The name by which `timm.create_model` loads the folder, for the model card of `hub`.

    Returns:
        The certificate: file, checksums, errors and versions.

    Raises:
        Mismatch: The outputs with the exported weights differ from those of the model.
    """
    path = folder / EXPORTED_WEIGHTS[form]
    channels, img_size, _ = loaded.pretrained_cfg["input_size"]
    with writing(path, SafetensorError):
        _write(loaded, path, form, name)
    if form == "hub":
        again = load_model(folder).model
    else:
        sizes = {"num_classes": loaded.model.num_classes, "in_chans": channels, "img_size": img_size}
        again = create_model(loaded.arch, **(sizes | loaded.model_args)).eval()
        load_weights(again, read_weights(path))
    return certify(again, loaded, path, img_size, "fp32")


def _write(loaded: LoadedModel, path: Path, form: str, name: str) -> None:
    weights = loaded.model.state_dict()
    if form == "hub":
        write_model_folder(loaded, path.parent, name, confusion_of(loaded))
    elif form == "timm":
        save_file(weights, path)
    else:
        with open(path, "wb") as file:  # given a path, torch reports a full disk without saying that it is full
            torch.save({"state_dict": to_paper_layout(weights)}, file)


def certify(exported: nn.Module, loaded: LoadedModel, path: Path, img_size: int, dtype: str) -> dict[str, Any]:
    """Compares an exported model with its original on real images, and returns the certificate.

    Args:
        exported: The model as read back from `path`.
        loaded: The original.
        path: The exported file.
        img_size: Height and width of the images, in pixels.
        dtype: `fp32` or `fp16`; selects the tolerance.

    Raises:
        Mismatch: The outputs differ.
    """
    config = replace(input_config(loaded), img_size=img_size)
    images, source = real_images(config, own_set=loaded.data is not None)
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
