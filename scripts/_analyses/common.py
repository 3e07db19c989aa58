"""What the analyses share: their options, the model with its images in batches, and the end of a command."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from _cli import add_model_options, integer, load_original, pick_device

from sequencer.config.errors import RequestError
from sequencer.console import say
from sequencer.printing import printable

if TYPE_CHECKING:
    import torch
    from torch import nn


def add_options(command: ArgumentParser) -> None:
    """Adds the options that every analysis has."""
    add = command.add_argument
    add_model_options(command)
    add("--batch-size", metavar="N", type=integer(1), default=8, help="images per forward pass; default: 8")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU if there is one")
    add("--output", metavar="DIR", type=Path, help="default: RUN/analysis for a run, otherwise outputs/analysis")
    add("--debug", action="store_true", help="show the traceback of an error")


def add_unlabelled(command: ArgumentParser) -> None:
    """Adds --images and --noise, of which exactly one must be given."""
    group = command.add_mutually_exclusive_group(required=True)
    group.add_argument(
        "--images",
        metavar="PATH",
        nargs="+",
        help="image files, folders (searched recursively) or glob patterns",
    )
    text = "N images of standard-normal noise, the same ones each time"
    group.add_argument("--noise", metavar="N", type=integer(1), help=text)


class Subject:
    """A model that is looked at, in eval mode on the device."""

    def __init__(self, args: Namespace, source: str, check: "Callable[[nn.Module], nn.Module]") -> None:
        """Loads a model.

        Args:
            args: With the options of `add_options`.
            source: MODEL.
            check: Raises ValueError for a model that the analysis is not defined for.

        Raises:
            RequestError: The model cannot be loaded, or `check` refuses it.
        """
        from sequencer.evaluation import input_config

        self.source = source
        self.device = pick_device(args.device)
        self.loaded = load_original(source, args)
        try:
            self.model: nn.Module = check(self.loaded.model).to(self.device)
        except ValueError as error:
            raise RequestError(f"{source}: {error}") from error
        self.config = input_config(self.loaded)


class Images:
    """The unlabelled images of a command, in batches as a model takes them: those of files, or noise."""

    def __init__(self, args: Namespace) -> None:
        """Takes the options of `add_unlabelled`, where `args.noise` is None for images of files."""
        self.args = args
        self.count = 0  # images of the last pass
        self.unreadable: set[str] = set()

    def batches(self, subject: Subject, progress: str) -> "Iterator[tuple[list[str], torch.Tensor]]":
        """Yields names and normalised images `B C H W` on the device; reports unreadable files on standard error.

        Args:
            subject: The model that takes the images.
            progress: Says what the progress bar shows, which is drawn if standard error is a terminal.

        Raises:
            RequestError: No image can be read.
        """
        import torch
        from rich.console import Console
        from rich.progress import track

        self.count = 0
        size = self.args.batch_size
        source = self._noise(subject) if self.args.noise else self._readable(subject)
        groups = iter(lambda: list(islice(source, size)), [])
        total = -(-self.args.noise // size) if self.args.noise else None
        quiet = not sys.stderr.isatty()
        for pairs in track(groups, progress, total, console=Console(stderr=True), transient=True, disable=quiet):
            self.count += len(pairs)
            yield [name for name, _ in pairs], torch.stack([image for _, image in pairs]).to(subject.device)
        if not self.count:
            raise RequestError("no image can be read")

    def _noise(self, subject: Subject) -> "Iterator[tuple[str, torch.Tensor]]":
        import torch

        generator = torch.Generator().manual_seed(0)
        shape = (subject.config.in_chans, subject.config.img_size, subject.config.img_size)
        for number in range(self.args.noise):
            yield f"noise {number}", torch.randn(shape, generator=generator)

    def _readable(self, subject: Subject) -> "Iterator[tuple[str, torch.Tensor]]":
        from sequencer.data import UnreadableImage, eval_transform, read_image, resized_side
        from sequencer.evaluation import find_images

        transform, side = eval_transform(subject.config), resized_side(subject.config)
        for source in find_images(self.args.images):
            try:
                if isinstance(source, UnreadableImage):
                    raise source
                yield source, transform(read_image(source, shorter_side=side))
            except UnreadableImage as error:
                if error.path not in self.unreadable:  # several models read the same files
                    self.unreadable.add(error.path)
                    print(f"{printable(error.path)} is left out: {printable(error.reason)}", file=sys.stderr)

    def described(self) -> str:
        """Says how many images were seen, and of which kind."""
        kind = "image of noise" if self.args.noise else "image"
        return f"{self.count:,} {kind if self.count == 1 else kind.replace('image', 'images')}"


def output_folder(args: Namespace) -> Path:
    """The folder of the results: that of --output, or below the run, the first one of several."""
    model = Path(args.model if isinstance(args.model, str) else args.model[0])
    is_run = (model / "config.yaml").is_file()
    return args.output or (model if is_run else Path("outputs")) / "analysis"


def finish(images: Images, lines: list[str], files: list[Path]) -> int:
    """Prints the result and what was written; returns the exit code, 1 if an image could not be read."""
    for line in [*lines, "written:", *(printable(file) for file in files)]:
        say(line)
    return 1 if images.unreadable else 0
