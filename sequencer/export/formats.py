"""Models in the formats of other runtimes: an ONNX graph or a torch.export program."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed_nhwc
from torch import Tensor, nn

from sequencer.export.recurrence import use_lstms, use_nodes
from sequencer.models import VSequencer
from sequencer.models.exported import ENTRY

OPSET = 20  # the first with Gelu
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Deliverable(nn.Module):
    """What is exported: float32 in and out, whatever is between.

    Takes normalised images `B C H W` and gives logits `B K`; with `preprocessing`, eight-bit images `B H W C` and
    probabilities.
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
    """Writes `model` as an ONNX graph whose recurrences are the standard's nodes; any batch, one size. Another
    `replace` leaves more or less to the exporter."""
    deliverable, example = _prepare(model, description, dtype, replace)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            deliverable,
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["probabilities" if description["preprocessing"] else "logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    program.model.metadata_props[ENTRY] = json.dumps(description)
    program.save(path)


def to_program(model: nn.Module, path: Path, description: dict[str, Any], dtype: torch.dtype) -> None:
    """Writes `model` as a torch.export program that runs without this package; any batch, one size."""
    deliverable, example = _prepare(model, description, dtype, use_lstms)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(deliverable, (example,), dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={ENTRY: json.dumps(description)})


def _prepare(
    model: nn.Module, description: dict[str, Any], dtype: torch.dtype, replace: Callable[[nn.Module], None]
) -> tuple[Deliverable, Tensor]:
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    channels, height, width = description["pretrained_cfg"]["input_size"]
    if isinstance(model, VSequencer) and (position := model.absolute_pos_embed) is not None:
        size = [extent // stride for extent, stride in zip((height, width), model.stem.patch_size, strict=True)]
        resampled = resample_abs_pos_embed_nhwc(position, size)  # once and for all
        model.absolute_pos_embed = nn.Parameter(resampled, requires_grad=False)
    replace(model)
    deliverable = Deliverable(model, description, dtype).eval()
    if description["preprocessing"]:
        return deliverable, torch.zeros(2, height, width, channels, dtype=torch.uint8)
    return deliverable, torch.zeros(2, channels, height, width)
