"""Exported files as models: ONNX graphs and torch.export programs, with the description that they carry."""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sequencer.models.checkpoint import CheckpointError

SUFFIXES = (".onnx", ".pt2")
ENTRY = "sequencer.json"  # the description's name among what the file says about itself


class Exported(nn.Module):
    """An exported model that is called like the one it was made from: normalised images in, logits out.

    `description` is that of `sequencer.export`. Where the preprocessing is built in, images are turned back into
    eight bits a channel, and the logarithms of the probabilities stand for the logits.
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
        """
        Raises:
            ValueError: the images have another size than the file was made for.
        """
        if tuple(x.shape[1:]) != self.input_size:
            wanted, given = ("x".join(map(str, size)) for size in (self.input_size, x.shape[1:]))
            raise ValueError(f"the file was exported for images of {wanted}, not {given}")
        if not self.preprocessing:
            return self.run(x)
        return self.run(self.to_bytes(x)).log()

    def to_bytes(self, x: Float[Tensor, "B C H W"]) -> Tensor:
        """The images before normalisation, uint8 `B H W C`."""
        return (x * self.std + self.mean).mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)

    def run(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class OnnxModel(Exported):
    """Runs on the CPU, whatever the device of its input."""

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise CheckpointError(f"{path} needs onnxruntime: python -m pip install onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no class
            raise CheckpointError(f"{path} is damaged or no ONNX file") from error
        super().__init__(_parse(session.get_modelmeta().custom_metadata_map.get(ENTRY), path))
        self.session = session

    def run(self, x: Tensor) -> Tensor:
        (output,) = self.session.run(None, {self.session.get_inputs()[0].name: x.contiguous().cpu().numpy()})
        return torch.from_numpy(output).to(x.device)


class Program(Exported):
    """Runs where it was exported: on the CPU."""

    def __init__(self, path: Path) -> None:
        entries = {ENTRY: ""}
        try:
            program = torch.export.load(path, extra_files=entries)
        except Exception as error:
            raise CheckpointError(f"{path} is damaged or no torch.export program") from error
        super().__init__(_parse(entries[ENTRY], path))
        self.programs = [program.module()]  # in a list, so that it stays on the CPU when this module is moved

    def run(self, x: Tensor) -> Tensor:
        return self.programs[0](x.cpu()).to(x.device)


def load_exported(path: Path) -> Exported:
    """
    Raises:
        CheckpointError: damaged, made elsewhere, or for a package that is not installed.
    """
    return OnnxModel(path) if path.suffix == ".onnx" else Program(path)


def _parse(entry: str | None, path: Path) -> dict[str, Any]:
    if not entry:
        raise CheckpointError(f"{path} does not describe its classes and preprocessing: export it with export.py")
    return json.loads(entry)
