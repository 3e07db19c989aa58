"""The one loop that measures a model on a fixed set."""

import sys
from collections.abc import Iterable

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from sequencer.evaluation.metrics import ClassificationMetrics


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], num_classes: int, device: torch.device | str
) -> ClassificationMetrics:
    """Measures `model`, in eval mode from here on, on every batch of this process's `loader`.

    Draws a progress bar on standard error where that is a terminal.

    Args:
        model: gives logits `B K`; on `device`.
        loader: batches of images `B C H W` and int64 labels `B`.
        num_classes: K.

    Returns:
        The metrics, on `device`, of the images of `loader`; in a distributed job, which every process must take part
        in, of those of all processes' loaders.
    """
    model.eval()
    metrics = ClassificationMetrics(num_classes, sync_on_compute=False).to(device)
    console = Console(stderr=True)
    for images, labels in track(loader, "evaluating", console=console, transient=True, disable=not sys.stderr.isatty()):
        if len(labels):  # none of the batch may have been readable
            metrics.update(model(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True))
    metrics.sync()
    return metrics
