"""What the analyses share: their options, the model with its images in batches, and the end of a command."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from _cli import add_model_options, integer, load_original, pick_device

from sequencer.config.errors import RequestError
from sequencer.console import say
from sequencer.printing import printable

if TYPE_CHECKING:
    import torch
    from _labelled import LabelledImages
    from torch import nn


def add_options(command: ArgumentParser) -> None:
    """Adds the options that every analysis has."""
    add = command.add_argument
    add_model_options(command)
    add("--batch-size", metavar="N", type=integer(1), default=8, help="images per forward pass; default: 8")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU if there is one")
    add("--output", metavar="DIR", type=Path, help="default: RUN/analysis for a run, otherwise outputs/analysis")
    add("--debug", action="store_true", help="show the traceback of an error")


class Batch(NamedTuple):
    """Images that have been classified."""

    paths: list[str]
    images: "torch.Tensor"  # normalised, `B C H W`, on the device
    pixels: np.ndarray[Any, Any]  # the same as a person sees them, uint8 `B H W 3`
    logits: "torch.Tensor"  # `B K`
    order: "torch.Tensor"  # `B 2`, the predicted class and the runner-up


class Subject:
    """The model that is looked at, and its images in batches."""

    def __init__(self, args: Namespace) -> None:
        from sequencer.analysis.attribution import check_decomposable
        from sequencer.evaluation import input_config, readable_names

        self.args = args
        self.device = pick_device(args.device)
        loaded = load_original(args.model, args)
        try:
            self.model: nn.Module = check_decomposable(loaded.model).to(self.device)
        except ValueError as error:
            raise RequestError(f"{args.model}: {error}") from error
        num_classes: int = loaded.model.num_classes  # type: ignore[assignment]  # torch types attributes as modules
        if num_classes < 2:
            raise RequestError(f"{args.model} has one class: there is no runner-up")
        self.config = input_config(loaded)
        self.names = readable_names(loaded.class_names, num_classes)
        self.unreadable = 0

    def batches(self) -> Iterator[Batch]:
        """Yields the readable images; reports the others on standard error.

        Raises:
            RequestError: No image can be read.
        """
        import torch

        from sequencer.report.content import to_pixels

        readable = self._readable()
        pairs = list(islice(readable, self.args.batch_size))
        if not pairs:
            raise RequestError("no image can be read")
        while pairs:
            images = torch.stack([image for _, image in pairs]).to(self.device)
            with torch.inference_mode():
                logits = self.model(images)
            order = logits.sort(dim=1, descending=True, stable=True).indices[:, :2]
            yield Batch([path for path, _ in pairs], images, to_pixels(images, self.config), logits, order)
            pairs = list(islice(readable, self.args.batch_size))

    def _readable(self) -> "Iterator[tuple[str, torch.Tensor]]":
        from sequencer.data import UnreadableImage, eval_transform, read_image, resized_side
        from sequencer.evaluation import find_images

        transform, side = eval_transform(self.config), resized_side(self.config)
        for source in find_images(self.args.images):
            try:
                if isinstance(source, UnreadableImage):
                    raise source
                yield source, transform(read_image(source, shorter_side=side))
            except UnreadableImage as error:
                self.unreadable += 1
                print(f"{printable(error.path)} is left out: {printable(error.reason)}", file=sys.stderr)

    def named(self, order: "torch.Tensor") -> list[str]:
        """Names of the predicted class and of the runner-up."""
        return [printable(self.names[k]) for k in order.tolist()]


def output_folder(args: Namespace) -> Path:
    """The folder of the results: that of --output, or below the run if the one model is that of a run."""
    models = [args.model] if isinstance(args.model, str) else args.model
    is_run = len(models) == 1 and (Path(models[0]) / "config.yaml").is_file()
    return args.output or (Path(models[0]) if is_run else Path("outputs")) / "analysis"


def finish(subject: "Subject | LabelledImages", lines: list[str], files: list[Path]) -> int:
    """Prints the result and what was written; returns the exit code, 1 if an image could not be read."""
    for line in [*lines, "written:", *(printable(file) for file in files)]:
        say(line)
    return 1 if subject.unreadable else 0
