"""The loop that evaluates a network on batches of labelled images."""

import math
import sys
from collections.abc import Iterable
from typing import TypeVar

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from sequencer import distributed
from sequencer.evaluation.metrics import ClassificationMetrics, Outcome, outcomes
from sequencer.evaluation.predictions import Collector

T = TypeVar("T")
Batches = Iterable[tuple[Tensor, Tensor, Tensor]]


def tracked(steps: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Draws a progress bar on standard error while `steps` are taken, if that is a terminal and this is rank 0.

    Args:
        steps: What is yielded.
        description: Shown before the bar.
        total: Number of steps; by default `len(steps)`.
    """
    quiet = not (sys.stderr.isatty() and distributed.is_first())
    return track(steps, description, total, console=Console(stderr=True), transient=True, disable=quiet)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Batches,
    num_classes: int,
    device: torch.device | str,
    found: list[Outcome] | None = None,
    collector: Collector | None = None,
) -> ClassificationMetrics:
    """Evaluates `model` on every batch of `loader`; in a distributed job every rank must call it.

    Leaves the model in eval mode. Draws a progress bar on standard error if that is a terminal.

    Args:
        model: Returns logits `B K`; on `device`.
        loader: Batches of images `B C H W`, int64 labels `B` and indices `B`: this rank's share of the split.
        num_classes: K.
        found: If given, the outcome of every image of all ranks is appended to it, ordered by index.
        collector: If given, it gets the probabilities of this rank's images.

    Returns:
        The metrics over the images of all ranks, on `device`.
    """
    model.eval()
    metrics = ClassificationMetrics(num_classes, device)
    own: list[Outcome] = []
    for images, labels, indices in tracked(loader, "evaluating"):
        if not len(labels):  # no image of the batch could be read
            continue
        logits, labels = model(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
        metrics.update(logits, labels)
        if collector is not None:
            collector.add(logits, labels, indices)
        if found is not None:
            own += outcomes(logits, labels, indices)
    metrics.merge_processes()
    if found is not None:
        found += sorted(outcome for of_rank in distributed.gather(own) for outcome in of_rank)
    return metrics


class FlipAveraged(nn.Module):
    """A classifier that averages the probabilities of each image and its mirror image."""

    def __init__(self, model: nn.Module) -> None:
        """Wraps `model`, which returns logits `B K`."""
        super().__init__()
        self.model = model

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Returns the logarithms of the averaged probabilities."""
        both = torch.stack([self.model(x), self.model(x.flip(-1))]).log_softmax(dim=-1)
        return both.logsumexp(dim=0) - math.log(2)
