"""Comparison of an exported model with its original on real images."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from sequencer.config.errors import RequestError
from sequencer.config.schema import DataConfig
from sequencer.data import eval_transform, open_split
from sequencer.models.exported import Exported

BATCHES = (1, 3, 8)
TOLERANCES = {"fp32": 2e-5, "fp16": 2e-2}  # absolute error over the largest output, or over 1 if that is smaller


class Mismatch(RuntimeError):
    """An exported model whose outputs differ from those of its original."""


@torch.inference_mode()
def compare(exported: nn.Module, model: nn.Module, images: Float[Tensor, "N C H W"], dtype: str) -> dict[str, Any]:
    """Compares the outputs of an exported model and its original on batches of 1, 3 and 8 images.

    Args:
        exported: The exported model.
        model: The original.
        images: 12 normalised images.
        dtype: `fp32` or `fp16`; selects the tolerance.

    Returns:
        Errors of the logits, or of the probabilities where the exported model returns these, and the fraction of images
        with the same top-1 class.

    Raises:
        Mismatch: An error exceeds the tolerance, or an output is not finite.
    """
    probabilities = False
    if isinstance(exported, Exported) and exported.preprocessing:
        probabilities = True
        # images are rounded to 8 bits, so that both models get the same input
        rounded = exported.to_bytes(images).permute(0, 3, 1, 2) / 255
        images = (rounded - exported.mean) / exported.std
    batches = images[: sum(BATCHES)].split(BATCHES)
    expected, found = (torch.cat([m(batch) for batch in batches]) for m in (model, exported))
    if probabilities:
        expected, found = expected.softmax(dim=1), found.exp()
    error = (found - expected).abs()
    largest, worst = expected.abs().max().item(), error.max().item()
    tolerance = TOLERANCES[dtype] * max(1.0, largest)
    if not worst <= tolerance:  # also true for NaN
        raise Mismatch(
            f"the export differs from the model by {worst:.2g} where {tolerance:.2g} is allowed; it was not kept"
        )
    return {
        "batches": BATCHES,
        "outputs": "probabilities" if probabilities else "logits",
        "largest_output": largest,
        "max_error": worst,
        "mean_error": error.mean().item(),
        "tolerance": tolerance,
        "top1_agreement": (found.argmax(dim=1) == expected.argmax(dim=1)).double().mean().item(),
    }


def real_images(config: DataConfig, own_set: bool) -> tuple[Float[Tensor, "N C H W"], str]:
    """Returns 12 images for `compare`, and a description of their source.

    Args:
        config: Data section that describes the preprocessing and, with `own_set`, the data set.
        own_set: If True, images of the test or validation split of the data set are used, where it is available without
            a download. Otherwise crops of the two photographs of scikit-learn are used.
    """
    number, transform = sum(BATCHES), eval_transform(config)
    for split in ("test", "val") if own_set else ():
        try:
            examples = open_split(replace(config, download=False), split, transform).examples(number)
        except RequestError:
            continue
        if len(examples) == number:
            return torch.stack([image for image, _ in examples]), f"the {split} split of {config.name}"
    return torch.stack([transform(crop) for crop in _crops(number)]), "scikit-learn's photographs"


def _crops(number: int) -> Iterator[Image.Image]:
    """Yields random square crops of scikit-learn's photographs; the same ones at every call."""
    package = find_spec("sklearn").origin  # type: ignore[union-attr]  # not imported, which takes a second
    folder = Path(package).parent / "datasets" / "images"  # type: ignore[arg-type]
    photographs = [np.asarray(Image.open(folder / name)) for name in ("china.jpg", "flower.jpg")]
    random = np.random.RandomState(0)
    for index in range(number):
        photograph = photographs[index % len(photographs)]
        size = random.randint(100, photograph.shape[0])
        top, left = (random.randint(extent - size) for extent in photograph.shape[:2])
        yield Image.fromarray(photograph[top : top + size, left : left + size])


def sha256_of_file(path: Path) -> str:
    """Returns the SHA-256 hash of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_weights(model: nn.Module) -> str:
    """Returns the SHA-256 hash, in hexadecimal, of a model's state dict: names and values, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
