"""The proof that an export does what its model does, on real images, before it is kept."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
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
TOLERANCES = {"fp32": 2e-5, "fp16": 2e-2}  # of the largest output, or of 1 where all are smaller


class Mismatch(RuntimeError):
    """An export gives other outputs than the model that it was made from."""


@torch.inference_mode()
def compare(exported: nn.Module, model: nn.Module, images: Float[Tensor, "N C H W"], dtype: str) -> dict[str, Any]:
    """Runs both on batches of 1, 3 and 8 images; returns the errors of the outputs, those of probabilities where the
    export gives these.

    Raises:
        Mismatch: an error above the tolerance, or an output that is not finite.
    """
    probabilities = False
    if isinstance(exported, Exported) and exported.preprocessing:
        probabilities = True  # of what eight bits can hold, so that both see the same
        eight_bits = exported.to_bytes(images).permute(0, 3, 1, 2) / 255
        images = (eight_bits - exported.mean) / exported.std
    batches = images[: sum(BATCHES)].split(BATCHES)
    expected, found = (torch.cat([m(batch) for batch in batches]) for m in (model, exported))
    if probabilities:
        expected, found = expected.softmax(dim=1), found.exp()
    error = (found - expected).abs()
    largest, worst = expected.abs().max().item(), error.max().item()
    tolerance = TOLERANCES[dtype] * max(1.0, largest)
    if not worst <= tolerance:  # a NaN is never within
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
    """Images for `compare`, preprocessed as `config` says, and where they are from: with `own_set` the test or
    validation part of its set, where that is at hand, otherwise pieces of the two photographs that scikit-learn ships.
    """
    number, transform = sum(BATCHES), eval_transform(config)
    for split in ("test", "val") if own_set else ():
        try:
            examples = open_split(replace(config, download=False), split, transform).examples(number)
        except RequestError:
            continue
        if len(examples) == number:
            return torch.stack([image for image, _ in examples]), f"the {split} part of {config.name}"
    return torch.stack([transform(piece) for piece in _pieces(number)]), "scikit-learn's photographs"


def _pieces(number: int) -> Iterator[Image.Image]:
    from sklearn.datasets import load_sample_images

    random = np.random.RandomState(0)
    photographs = load_sample_images().images
    for index in range(number):
        photograph = photographs[index % len(photographs)]
        size = random.randint(100, photograph.shape[0])
        top, left = (random.randint(extent - size) for extent in photograph.shape[:2])
        yield Image.fromarray(photograph[top : top + size, left : left + size])


def sha256_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_weights(model: nn.Module) -> str:
    """Of names and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
