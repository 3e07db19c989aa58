"""Loading of exported files, ONNX graphs and torch.export programs, as models."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sequencer.models.checkpoint import CheckpointError

SUFFIXES = (".onnx", ".pt2")
ENTRY = "sequencer.json"  # key of the description in the metadata of an exported file


class Exported(nn.Module):
    """An exported model with the interface of its original: normalised images in, logits out.

    If normalisation is part of the exported file, the input is converted back to 8-bit images, and the logarithms of
    the probabilities are returned as logits.

    Args:
        description: The file's description; see `sequencer.export.describe_export`.
    """

    description: dict[str, Any]
    mean: Tensor
    std: Tensor

    def __init__(self, description: dict[str, Any]) -> None:
        super().__init__()
        self.description = description
        self.num_classes: int = description["num_classes"]
        self.input_size = tuple(description["pretrained_cfg"]["input_size"])
        self.preprocessing: bool = description["preprocessing"]
        for name in ("mean", "std"):
            values = torch.tensor(description["pretrained_cfg"][name])
            self.register_buffer(name, values.view(-1, 1, 1), persistent=False)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Computes the logits.

        Raises:
            ValueError: The images do not have the size that the file was exported for.
        """
        if tuple(x.shape[1:]) != self.input_size:
            wanted, given = ("x".join(map(str, size)) for size in (self.input_size, x.shape[1:]))
            raise ValueError(f"the file was exported for images of {wanted}, not {given}")
        if not self.preprocessing:
            return self.run(x)
        return self.run(self.to_bytes(x)).log()

    def to_bytes(self, x: Float[Tensor, "B C H W"]) -> Tensor:
        """Returns the images before normalisation, uint8 `B H W C`."""
        return (x * self.std + self.mean).mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)

    def run(self, x: Tensor) -> Tensor:
        """Runs the exported file on the inputs that it was exported for."""
        raise NotImplementedError


class OnnxModel(Exported):
    """An ONNX graph, run by onnxruntime on the CPU; inputs may be on any device."""

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise CheckpointError(f"{path} needs onnxruntime: python -m pip install onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common base class
            raise CheckpointError(f"{path} is damaged or no ONNX file") from error
        super().__init__(_parse(session.get_modelmeta().custom_metadata_map.get(ENTRY), path))
        self.session = session

    def run(self, x: Tensor) -> Tensor:
        (output,) = self.session.run(None, {self.session.get_inputs()[0].name: x.contiguous().cpu().numpy()})
        return torch.from_numpy(output).to(x.device)


class Program(Exported):
    """A torch.export program, run on the CPU; inputs may be on any device."""

    def __init__(self, path: Path) -> None:
        entries = {ENTRY: ""}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.11, of its own buffers
                program = torch.export.load(path, extra_files=entries)
        except Exception as error:
            raise CheckpointError(f"{path} is damaged or no torch.export program") from error
        super().__init__(_parse(entries[ENTRY], path))
        self.programs = [program.module()]  # in a list, so that `to` does not move it to another device

    def run(self, x: Tensor) -> Tensor:
        return self.programs[0](x.cpu()).to(x.device)


def load_exported(path: Path) -> Exported:
    """Loads an `.onnx` or `.pt2` file that was written by this package.

    Raises:
        CheckpointError: The file is damaged, was written by another program, or needs onnxruntime, which is not
            installed.
    """
    return OnnxModel(path) if path.suffix == ".onnx" else Program(path)


def _parse(entry: str | None, path: Path) -> dict[str, Any]:
    if not entry:
        raise CheckpointError(f"{path} has no description of its classes and preprocessing: export it with export.py")
    return json.loads(entry)
