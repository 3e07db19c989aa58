"""Accuracy on corrupted images and under attacks, piece by piece.

A piece is one corruption at one severity, one attack, or the clean images. Images enter a model in [0, 1]; the
normalisation is inside of `Normalised`, so that attacks are bounded in units of pixels.

Shape letters: `B` batch, `C H W` image, `K` classes, `N` images.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sequencer.analysis.corruptions import SEVERITIES
from sequencer.analysis.gradients import for_image_gradients
from sequencer.config.errors import RequestError
from sequencer.config.schema import DataConfig
from sequencer.data import channel_statistics
from sequencer.evaluation import tracked

Classify = Callable[[Tensor, Tensor], Tensor]  # from images in [0, 1] and labels to logits

# top-1 errors of AlexNet that ImageNet-C is normalised by, mean over the severities
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
EPSILON = 1 / 255  # of both attacks, in the L-infinity norm
PGD_STEPS = 5
PGD_STEP = 0.5 / 255


class Predicted(NamedTuple):
    """Labels and predictions of the readable images, in order."""

    labels: NDArray[np.int64]
    classes: NDArray[np.int64]  # -1 for an image with a NaN logit
    indices: NDArray[np.int64]

    @property
    def hits(self) -> int:
        """Number of images whose predicted class is their label."""
        return int((self.labels == self.classes).sum())


class Normalised(nn.Module):
    """A classifier of images in [0, 1], which normalises them itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, config: DataConfig) -> None:
        """Wraps `model`, a classifier in eval mode whose preprocessing is `config`."""
        super().__init__()
        self.model = model
        for name, values in zip(("mean", "std"), channel_statistics(config), strict=True):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Returns the logits of images in [0, 1]."""
        return self.model((x - self.mean) / self.std)


def classifier(model: Normalised) -> Classify:
    """Returns what classifies images as they are."""

    @torch.inference_mode()
    def classify(images: Tensor, labels: Tensor) -> Tensor:
        return model(images)

    return classify


def attacked(model: Normalised, attack: str, seed: int) -> Classify:
    """Returns what classifies images that an attack has changed, under the settings of the Sequencer paper.

    FGSM (Goodfellow et al. 2015) takes one step of 1/255 along the sign of the gradient; PGD (Madry et al. 2018) takes
    five of 0.5/255 from a random start, and stays within 1/255. The random start depends on the batch size.

    Args:
        model: Takes images in [0, 1], on the device of the images.
        attack: `fgsm` or `pgd`.
        seed: Seed of the random start.
    """
    from captum.robust import FGSM, PGD  # an optional package

    loss = nn.CrossEntropyLoss(reduction="none")
    fgsm, pgd = FGSM(model, loss, 0, 1), PGD(model, loss, 0, 1)
    for method in (fgsm, pgd.fgsm):
        method.zero_thresh = 0  # captum takes gradients below 1e-6 to be zero, which spares what is classified surely
    batches = 0

    def classify(images: Tensor, labels: Tensor) -> Tensor:
        nonlocal batches
        devices = [images.device] if images.device.type == "cuda" else []
        images.requires_grad_()
        with for_image_gradients(model), torch.random.fork_rng(devices), warnings.catch_warnings():
            torch.manual_seed(seed + batches)
            warnings.filterwarnings("ignore", "Input Tensor 0 did not already require gradients")  # of each step
            if attack == "fgsm":
                changed = fgsm.perturb(images, EPSILON, labels)
            else:
                changed = pgd.perturb(images, EPSILON, PGD_STEP, PGD_STEPS, labels, random_start=True)
        batches += 1
        with torch.inference_mode():
            return model(changed.detach())

    return classify


def predict_classes(
    classify: Classify,
    loader: DataLoader[Any],
    device: torch.device,
    description: str = "",
    classes: Sequence[int] | None = None,
) -> Predicted:
    """Classifies the images of a loader; draws a progress bar on standard error if that is a terminal.

    Args:
        classify: The model, attacked or not.
        loader: As `piece_loader` makes it.
        device: Where the model runs.
        description: What the progress bar is called.
        classes: Classes that a prediction may be; by default all.
    """
    allowed = None if classes is None else torch.tensor(classes, device=device)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for images, labels, indices in tracked(loader, description, len(loader)):
        if len(labels):
            logits = classify(images.to(device), labels.to(device))
            found.append((labels, _predict(logits, allowed).cpu(), indices))
    if not found:
        raise RequestError("no image can be read")
    return Predicted(*(torch.cat(parts).numpy() for parts in zip(*found, strict=True)))


def _predict(logits: Float[Tensor, "B K"], allowed: Int[Tensor, " A"] | None) -> Int[Tensor, " B"]:
    chosen = logits if allowed is None else logits[:, allowed]
    best = chosen.argmax(dim=1)
    return (best if allowed is None else allowed[best]).where(~chosen.isnan().any(dim=1), -1)


def corruption_errors(top1: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """Corruption errors of ImageNet-C: mean top-1 error over the five severities, divided by AlexNet's.

    Args:
        top1: Accuracy by corruption and severity; corruptions without five severities are left out.
    """
    errors = {}
    for name, normaliser in ALEXNET_ERRORS.items():
        values = [1 - top1[name, severity] for severity in SEVERITIES if (name, severity) in top1]
        if len(values) == len(SEVERITIES):
            errors[name] = math.fsum(values) / len(values) / normaliser
    return errors


def mean_corruption_error(errors: Mapping[str, float]) -> float | None:
    """Returns mCE in percent, or None unless all 15 corruptions are there."""
    return 100 * math.fsum(errors.values()) / len(errors) if errors.keys() == ALEXNET_ERRORS.keys() else None
