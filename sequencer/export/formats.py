"""Conversion of models to ONNX graphs and torch.export programs."""

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed_nhwc
from torch import Tensor, nn

from sequencer.export.recurrence import use_lstms, use_nodes
from sequencer.files import to_json, writing
from sequencer.models import VSequencer
from sequencer.models.exported import ENTRY

OPSET = 20  # the first opset with a Gelu operator
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class ExportModule(nn.Module):
    """The module that is exported: a model with float32 inputs and outputs and optional preprocessing.

    It maps normalised images `B C H W` to logits `B K`. If the description says that preprocessing is included, it maps
    uint8 images `B H W C` to probabilities `B K`.

    Args:
        model: The model, which is converted to `dtype` in place.
        description: See `describe_export`.
        dtype: Data type of weights and computations.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, description: dict[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype, self.preprocessing = model.to(dtype), dtype, description["preprocessing"]
        for name in ("mean", "std"):
            values = torch.tensor(description["pretrained_cfg"][name])
            self.register_buffer(name, values.view(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        if self.preprocessing:
            image = (image.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        logits = self.model(image.to(self.dtype)).float()
        return logits.softmax(dim=1) if self.preprocessing else logits


def to_onnx(
    model: nn.Module,
    path: Path,
    description: dict[str, Any],
    dtype: torch.dtype,
    replace: Callable[[nn.Module], None] = use_nodes,
) -> None:
    """Exports a model as an ONNX graph for any batch size and one image size.

    Args:
        model: The model, which is not modified.
        path: The file that is written.
        description: See `describe_export`; it is stored in the graph's metadata.
        dtype: Data type of weights and computations.
        replace: Function that prepares a copy of the model in place. By default, it replaces every recurrence by ONNX's
            LSTM, GRU or RNN operator.
    """
    module, example = _prepare(model, description, dtype, replace)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["probabilities" if description["preprocessing"] else "logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    program.model.metadata_props[ENTRY] = to_json(description)
    with writing(path):
        program.save(path)


def to_program(model: nn.Module, path: Path, description: dict[str, Any], dtype: torch.dtype) -> None:
    """Exports a model as a torch.export program for any batch size and one image size.

    The program needs only torch; recurrences are torch's own operators.

    Args:
        model: The model, which is not modified.
        path: The file that is written.
        description: See `describe_export`; it is stored in the file.
        dtype: Data type of weights and computations.
    """
    module, example = _prepare(model, description, dtype, use_lstms)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (example,), dynamic_shapes=shapes)
    file = io.BytesIO()  # given a path, torch aborts the process where the disk is full
    torch.export.save(program, file, extra_files={ENTRY: to_json(description)})
    with writing(path):
        path.write_bytes(file.getbuffer())


def _prepare(
    model: nn.Module, description: dict[str, Any], dtype: torch.dtype, replace: Callable[[nn.Module], None]
) -> tuple[ExportModule, Tensor]:
    """Returns the module to be exported, made from a copy of the model, and an example input with a batch of 2."""
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    channels, height, width = description["pretrained_cfg"]["input_size"]
    if isinstance(model, VSequencer) and (position := model.absolute_pos_embed) is not None:
        size = [extent // stride for extent, stride in zip((height, width), model.stem.patch_size, strict=True)]
        resampled = resample_abs_pos_embed_nhwc(position, size)  # so that it is not part of the graph
        model.absolute_pos_embed = nn.Parameter(resampled, requires_grad=False)
    replace(model)
    module = ExportModule(model, description, dtype).eval()
    if description["preprocessing"]:
        return module, torch.zeros(2, height, width, channels, dtype=torch.uint8)
    return module, torch.zeros(2, channels, height, width)
