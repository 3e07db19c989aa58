"""Loading of exported files, ONNX graphs and torch.export programs, as models."""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sequencer.models.checkpoint import CheckpointError
from sequencer.models.declarations import ExportDescription, parse_description
from sequencer.printing import first_line

SUFFIXES = (".onnx", ".pt2")
ENTRY = "sequencer.json"  # key of the description in the metadata of an exported file
# the key of a tensor whose values are in another file, with the last byte of its length before it
EXTERNAL_DATA = re.compile(rb"[\x00\x08]location")


class Exported(nn.Module):
    """An exported model with the interface of its original: normalised images in, logits out.

    If normalisation is part of the exported file, the input is converted back to 8-bit images, and the logarithms of
    the probabilities are returned as logits.

    Args:
        description: The file's description of itself.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, description: ExportDescription) -> None:
        super().__init__()
        self.description = description
        self.num_classes = description.num_classes
        self.input_size = tuple(description.pretrained_cfg.input_size)
        self.preprocessing = description.preprocessing
        for name in ("mean", "std"):
            values = torch.tensor(getattr(description.pretrained_cfg, name), dtype=torch.float32)
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
    """An ONNX graph, run by onnxruntime on the CPU; inputs may be on any device.

    The graph has its weights in the file itself and uses the operators of onnxruntime alone; no other file is read.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise CheckpointError(f"{path} needs onnxruntime: python -m pip install onnxruntime") from None
        graph = _read(path)
        if EXTERNAL_DATA.search(graph):
            raise CheckpointError(f"{path} refers to weights in other files, which are not read: export it as one file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # errors are raised
        options.add_session_config_entry("session.load_model_format", "ONNX")
        try:
            # from memory, so that the graph has no folder in which other files could be looked for
            session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common base class
            raise CheckpointError(f"{path} is damaged or no ONNX file: {first_line(error)}") from error
        super().__init__(_parse(session.get_modelmeta().custom_metadata_map.get(ENTRY), path))
        self.session = session
        channels, height, width = self.input_size
        declared = [height, width, channels] if self.preprocessing else [channels, height, width]
        found = [one.shape[1:] for one in session.get_inputs()]
        if found != [declared]:
            raise CheckpointError(f"{path}: the inputs of its graph have the sizes {found}, its description {declared}")

    def run(self, x: Tensor) -> Tensor:
        (output,) = self.session.run(None, {self.session.get_inputs()[0].name: x.contiguous().cpu().numpy()})
        return torch.from_numpy(output).to(x.device)


class Program(Exported):
    """A torch.export program, run on the CPU; inputs may be on any device."""

    def __init__(self, path: Path) -> None:
        entries = {ENTRY: ""}
        try:
            with _quiet():
                program = torch.export.load(path, extra_files=entries)
        except Exception as error:
            raise CheckpointError(f"{path} is damaged or no torch.export program") from error
        super().__init__(_parse(entries[ENTRY], path))
        self.programs = [program.module()]  # in a list, so that `to` does not move it to another device

    def run(self, x: Tensor) -> Tensor:
        return self.programs[0](x.cpu()).to(x.device)


def is_export(source: str | Path) -> bool:
    """Whether `source` is an exported file, by its suffix."""
    return Path(source).suffix in SUFFIXES and os.path.isfile(source)


def check_original(source: str | Path) -> None:
    """Checks that `source` is no exported file, of whose weights no other model can be made.

    Raises:
        CheckpointError: It is one.
    """
    if is_export(source):
        raise CheckpointError(f"{source} is an export: name the model that it was made from")


def load_exported(path: Path, trust: bool = False) -> Exported:
    """Loads an `.onnx` or `.pt2` file that was written by this package.

    Args:
        path: The file.
        trust: Whether a `.pt2` file may be loaded. `torch.export.load` unpickles some of its records and evaluates its
            symbolic expressions, so the file can run any code.

    Raises:
        CheckpointError: The file is damaged, was written by another program, is not what its description says, is a
            `.pt2` file that is not trusted, or needs onnxruntime, which is not installed.
    """
    if path.suffix != ".onnx" and not trust:
        raise CheckpointError(
            f"{path} is a torch.export program, which can run any code when it is loaded\n"
            "name the run or model folder that it was made from; scripts load it with --trust, if you trust its author"
        )
    model = OnnxModel(path) if path.suffix == ".onnx" else Program(path)
    _check_outputs(model, path)
    return model


@torch.inference_mode()
def _check_outputs(model: Exported, path: Path) -> None:
    """Checks by a forward pass of two images that an exported file returns what its description says.

    Raises:
        CheckpointError: It does not run, or returns something else.
    """
    try:
        output = model(torch.zeros(2, *model.input_size))
    except Exception as error:  # the two runtimes raise errors of many types
        raise CheckpointError(f"{path} cannot be run as its description says: {first_line(error)}") from error
    shape = tuple(output.shape)
    if len(shape) != 2 or shape[0] != 2 or (model.num_classes and shape[1] != model.num_classes):
        raise CheckpointError(
            f"{path} returns values of the shape {shape} for 2 images; num_classes of its description is"
            f" {model.num_classes}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the warnings of `torch.export.load`, which logs the traceback of an error before it raises another."""
    log = logging.getLogger("torch.export")
    disabled, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.11, of its own buffers
            yield
    finally:
        log.disabled = disabled


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _parse(entry: str | bytes | None, path: Path) -> ExportDescription:
    if not entry:
        raise CheckpointError(f"{path} has no description of its classes and preprocessing: export it with export.py")
    return parse_description(ExportDescription, entry, str(path))
