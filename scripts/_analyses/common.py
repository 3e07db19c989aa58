"""What the analyses share: their options, the model with its images in batches, and the end of a command."""

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
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
    from torch import nn

    from sequencer.config.schema import DataConfig


def add_options(command: ArgumentParser) -> None:
    """Adds the options that every analysis has, which may have set a batch size of its own."""
    add = command.add_argument
    add_model_options(command)
    if command.get_default("batch_size") is None:
        command.set_defaults(batch_size=8)
    add("--batch-size", metavar="N", type=integer(1), help="images per forward pass; default: %(default)s")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU if there is one")
    add("--output", metavar="DIR", type=Path, help="default: RUN/analysis for a run, otherwise outputs/analysis")
    add("--debug", action="store_true", help="show the traceback of an error")


def add_image_options(command: ArgumentParser) -> None:
    """Adds --images and --noise, of which one must be given, for an analysis that needs no labels."""
    group = command.add_mutually_exclusive_group(required=True)
    group.add_argument(
        "--images", metavar="PATH", nargs="+", help="files, folders (searched recursively) or glob patterns"
    )
    group.add_argument("--noise", metavar="N", type=integer(1), help="N images of standard-normal noise, of seed 0")


class Images:
    """Images without labels: those of --images, or noise of the same size.

    Attributes:
        unreadable: Paths that have been reported as unreadable.
        seen: Number of images that `tracked` has yielded.
        first: The first of them, `1 C H W`; None before there is one.
    """

    def __init__(self, args: Namespace, config: "DataConfig", unreadable: set[str] | None = None) -> None:
        """Keeps the request.

        Args:
            args: With `images` and, for noise, `noise`.
            config: The preprocessing.
            unreadable: Paths that have been reported as unreadable; new ones are added.
        """
        self.args, self.config = args, config
        self.unreadable = set() if unreadable is None else unreadable
        self.seen = 0
        self.first: torch.Tensor | None = None

    def batches(self) -> "Iterator[tuple[list[str], torch.Tensor]]":
        """Yields paths and normalised images `B C H W`; reports unreadable files on standard error.

        Raises:
            RequestError: No image can be read.
        """
        import torch

        found = self._noise() if self.args.images is None else self._readable()
        pairs = list(islice(found, self.args.batch_size))
        if not pairs:
            raise RequestError("no image can be read")
        while pairs:
            yield [path for path, _ in pairs], torch.stack([image for _, image in pairs])
            pairs = list(islice(found, self.args.batch_size))

    def tracked(self, description: str, device: "torch.device") -> "Iterator[torch.Tensor]":
        """Yields normalised images `B C H W` on the device, with a progress bar as `sequencer.evaluation.tracked`."""
        from sequencer.evaluation import tracked

        total = -(-self.args.noise // self.args.batch_size) if self.args.noise else None
        for _, batch in tracked(self.batches(), description, total):
            if self.first is None:
                self.first = batch[:1]
            self.seen += len(batch)
            yield batch.to(device)

    def _noise(self) -> "Iterator[tuple[str, torch.Tensor]]":
        import torch

        generator = torch.Generator().manual_seed(0)
        size = (self.config.in_chans, self.config.img_size, self.config.img_size)
        for number in range(self.args.noise):
            yield f"noise {number}", torch.randn(size, generator=generator)

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
                if error.path not in self.unreadable:
                    print(f"{printable(error.path)} is left out: {printable(error.reason)}", file=sys.stderr)
                self.unreadable.add(error.path)


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
        with naming(args.model):
            self.model: nn.Module = check_decomposable(loaded.model).to(self.device)
        num_classes: int = loaded.model.num_classes  # type: ignore[assignment]  # torch types attributes as modules
        if num_classes < 2:
            raise RequestError(f"{args.model} has one class: there is no runner-up")
        self.config = input_config(loaded)
        self.names = readable_names(loaded.class_names, num_classes)
        self.images = Images(args, self.config)

    @property
    def unreadable(self) -> set[str]:
        return self.images.unreadable

    def batches(self) -> Iterator[Batch]:
        """Yields the readable images; reports the others on standard error.

        Raises:
            RequestError: No image can be read.
        """
        import torch

        from sequencer.report.content import to_pixels

        for paths, images in self.images.batches():
            images = images.to(self.device)
            with torch.inference_mode():
                logits = self.model(images)
            order = logits.sort(dim=1, descending=True, stable=True).indices[:, :2]
            yield Batch(paths, images, to_pixels(images, self.config), logits, order)

    def named(self, order: "torch.Tensor") -> list[str]:
        """Names of the predicted class and of the runner-up."""
        return [printable(self.names[k]) for k in order.tolist()]


def labels(sources: list[str]) -> list[str]:
    """Names models by the last part of their paths; those that share it, by the whole path.

    Raises:
        RequestError: A model is given twice.
    """
    paths = [os.path.normpath(source) for source in sources]
    if len(set(paths)) < len(paths):
        raise RequestError("the same MODEL is given twice")
    names = [os.path.basename(path) for path in paths]
    return [printable(name if names.count(name) == 1 else path) for name, path in zip(names, paths, strict=True)]


def models_of(args: Namespace) -> list[str]:
    """Each MODEL of an analysis, of which one takes one and another several."""
    return [args.model] if isinstance(args.model, str) else args.model


@contextmanager
def naming(model: str) -> Iterator[None]:
    """Names the model before a ValueError that is raised inside, as a RequestError; a RequestError stays as it is."""
    try:
        yield
    except RequestError:  # a ValueError as well
        raise
    except ValueError as error:
        raise RequestError(f"{model}: {error}") from error


def output_folder(args: Namespace) -> Path:
    """The folder of the results: that of --output, or below the run if the one model is that of a run."""
    models = models_of(args)
    is_run = len(models) == 1 and (Path(models[0]) / "config.yaml").is_file()
    return args.output or (Path(models[0]) if is_run else Path("outputs")) / "analysis"


def finish(unreadable: set[str] | int, lines: list[str], files: list[Path]) -> int:
    """Prints the result and what was written; returns the exit code, 1 if an image could not be read."""
    for line in [*lines, "written:", *(printable(file) for file in files)]:
        say(line)
    return 1 if unreadable else 0
