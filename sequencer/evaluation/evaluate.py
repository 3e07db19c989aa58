"""The one loop that measures a model on a fixed set."""

import math
import sys
from collections.abc import Iterable

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from sequencer import distributed
from sequencer.evaluation.metrics import ClassificationMetrics, Outcome, outcomes

Batches = Iterable[tuple[Tensor, Tensor, Tensor]]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Batches,
    num_classes: int,
    device: torch.device | str,
    found: list[Outcome] | None = None,
) -> ClassificationMetrics:
    """Measures `model`, in eval mode from here on, on every batch of this process's `loader`.

    Draws a progress bar on standard error where that is a terminal.

    Args:
        model: gives logits `B K`; on `device`.
        loader: batches of images `B C H W`, int64 labels `B` and indices `B`.
        num_classes: K.
        found: takes every image's outcome, in the order of the indices.

    Returns:
        The metrics, on `device`, of the images of `loader`; in a distributed job, which every process must take part
        in, of those of all processes' loaders.
    """
    model.eval()
    metrics = ClassificationMetrics(num_classes, sync_on_compute=False).to(device)
    own: list[Outcome] = []
    console = Console(stderr=True)
    quiet = not (sys.stderr.isatty() and distributed.is_first())
    for images, labels, indices in track(loader, "evaluating", console=console, transient=True, disable=quiet):
        if not len(labels):  # none of the batch could be read
            continue
        logits, labels = model(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
        metrics.update(logits, labels)
        if found is not None:
            own += outcomes(logits, labels, indices)
    metrics.merge_processes()
    if found is not None:
        found += sorted(outcome for part in distributed.gather(own) for outcome in part)
    return metrics


class FlipAveraged(nn.Module):
    """A model whose probabilities are the means of those of an image and of its mirror image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logarithms of the probabilities."""
        both = torch.stack([self.model(x), self.model(x.flip(-1))]).log_softmax(dim=-1)
        return both.logsumexp(dim=0) - math.log(2)
