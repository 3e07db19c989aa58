"""Looks inside a model: where the evidence for a class lies, and which scan directions it comes from.

    python scripts/analyze.py evidence outputs/digits/2026-01-31_12-00-00 photograph.jpg folder/
    python scripts/analyze.py directions MODEL 'scans/**/*.png' --output figures

`analyze.py WHAT --help` lists the options of each. MODEL is a run folder, a model folder, a checkpoint or a timm name.
Each command prints a table and writes a picture and the numbers behind it. Both analyses are exact: the shares of all
tokens, or the contributions of all parts of the model, sum to the logit.
"""

import os
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from _cli import Parser, add_model_options, created, integer, load_original, named_model, pick_device, run

from sequencer.config.errors import RequestError
from sequencer.console import say, table_lines
from sequencer.files import write_arrays, write_csv
from sequencer.printing import printable

if TYPE_CHECKING:
    import torch
    from torch import nn

MOST_DRAWN = 12  # images in a picture
CURVE_STEPS = 16
RANDOM_MAPS = 4  # per image, for the deletion and insertion curves


def main(argv: list[str] | None = None) -> int:
    return run(work, parse(argv))


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for analyze, text in (
        (evidence, "where in the image the evidence for a class lies"),
        (directions, "what each scan direction contributes to a logit"),
    ):
        command = commands.add_parser(analyze.__name__, help=text, description=f"Shows {text}.")
        command.set_defaults(analyze=analyze)
        add = command.add_argument
        add("model", metavar="MODEL", help="run folder, model folder, checkpoint or timm name")
        add("images", metavar="IMAGES", nargs="+", help="files, folders (searched recursively) or glob patterns")
        add_model_options(command)
        add("--batch-size", metavar="N", type=integer(1), default=8, help="images per forward pass; default: 8")
        add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU if there is one")
        add("--output", metavar="DIR", type=Path, help="default: RUN/analysis for a run, otherwise outputs/analysis")
        add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def work(args: Namespace) -> int:
    args.model = named_model(args.model, args)
    return args.analyze(args)


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
    is_run = (Path(args.model) / "config.yaml").is_file()
    return args.output or (Path(args.model) if is_run else Path("outputs")) / "analysis"


def evidence(args: Namespace) -> int:
    """Writes evidence.png, the maps over the images, evidence.csv and evidence.npz."""
    import torch

    from sequencer.analysis.attribution import evidence_maps, removal_curves
    from sequencer.analysis.attribution_plots import EvidenceRow, plot_evidence

    output = output_folder(args)
    with created(output):
        subject = Subject(args)
        generator = torch.Generator().manual_seed(0)
        table: list[tuple[Any, ...]] = []
        arrays: list[tuple[Any, Any]] = []  # evidence for the predicted class, and against the runner-up
        drawn: list[EvidenceRow] = []
        for batch in subject.batches():
            maps = evidence_maps(subject.model, batch.images)
            first, second = (maps[torch.arange(len(maps)), batch.order[:, i]] for i in (0, 1))
            probabilities = batch.logits.double().softmax(dim=1)
            areas = [_areas(subject, batch, first, removal_curves)]
            noise = [torch.rand(first.shape, generator=generator).to(first.device) for _ in range(RANDOM_MAPS)]
            areas.append(np.mean([_areas(subject, batch, random, removal_curves) for random in noise], axis=0))
            for i, path in enumerate(batch.paths):
                names = subject.named(batch.order[i])
                of_map, of_random = (area[:, i] for area in areas)
                table.append((printable(path), *names, float(probabilities[i, batch.order[i, 0]]), *of_map, *of_random))
                own, margin = first[i].double().cpu().numpy(), (first - second)[i].double().cpu().numpy()
                arrays.append((own, margin))
                if len(drawn) < MOST_DRAWN:
                    title = (os.path.basename(table[-1][0]), f"{names[0]} {table[-1][3]:.1%}")
                    captions = (f"for {names[0]}", f"for {names[0]} against {names[1]}")
                    drawn.append(EvidenceRow(batch.pixels[i], *title, list(zip(captions, arrays[-1], strict=True))))
        header = ("image", "predicted", "runner_up", "probability", "deletion", "insertion")
        write_csv(output / "evidence.csv", (*header, "random_deletion", "random_insertion"), table)
        predicted, margin = (np.stack(values) for values in zip(*arrays, strict=True))
        images = np.array([row[0] for row in table])
        write_arrays(output / "evidence.npz", {"image": images, "predicted": predicted, "margin": margin})
        plot_evidence(drawn, output / "evidence.png")
    lines = []
    for path, predicted, runner_up, p, deletion, insertion, random_deletion, random_insertion in table[:MOST_DRAWN]:
        curves = (f"{a:.0%} ({b:.0%})" for a, b in ((deletion, random_deletion), (insertion, random_insertion)))
        lines.append([os.path.basename(path), f"{predicted} {p:.1%}", runner_up, *curves])
    shown = table_lines(("image", "predicted", "runner-up", "deletion", "insertion"), lines)
    if len(table) > MOST_DRAWN:
        shown.append(f"the first {MOST_DRAWN} of {len(table):,} images are shown")
    means = np.mean([row[4:] for row in table], axis=0)
    shown += [
        "deletion, insertion: mean probability of the predicted class while the",
        "tokens with the largest evidence are deleted or inserted first; in brackets,",
        "in random order. Means: {0:.1%} ({2:.1%}), {1:.1%} ({3:.1%})".format(*means),
    ]
    return _finish(subject, shown, [output / f"evidence.{suffix}" for suffix in ("png", "csv", "npz")])


def _areas(subject: Subject, batch: Batch, maps: "torch.Tensor", curves: Any) -> np.ndarray[Any, Any]:
    """Means of the deletion and insertion curves of the predicted classes, `2 B`."""
    found = curves(subject.model, batch.images, maps, batch.order[:, 0], CURVE_STEPS)
    return np.stack([curve.mean(dim=1).double().cpu().numpy() for curve in found])


def directions(args: Namespace) -> int:
    """Writes directions.png, the mean over the images, and directions.csv, a row for each image and part."""
    import torch

    from sequencer.analysis.attribution import contributions, sum_by_source
    from sequencer.analysis.attribution_plots import plot_directions

    output = output_folder(args)
    with created(output):
        subject = Subject(args)
        rows: list[tuple[Any, ...]] = []
        margins = []
        for batch in subject.batches():
            found = contributions(subject.model, batch.images)
            each = torch.arange(len(batch.paths))
            own, other = (found.values[each, :, batch.order[:, i]].double().cpu().numpy() for i in (0, 1))
            for i, path in enumerate(batch.paths):
                margins.append(own[i] - other[i])
                about = (printable(path), *subject.named(batch.order[i]))
                for part, values in zip(found.parts, zip(own[i], margins[-1], strict=True), strict=True):
                    place = ("" if index is None else index for index in part[:2])
                    rows.append((*about, *place, part.source, *values))
        header = ("image", "predicted", "runner_up", "stage", "block", "source", "logit", "margin")
        write_csv(output / "directions.csv", header, rows)
        mean = np.mean(margins, axis=0)
        title = f"Logit of the predicted class above the runner-up, mean over images (number: {len(margins):,})"
        plot_directions(found.parts, mean, title, output / "directions.png")
    sums = sum_by_source(found.parts, mean)
    lines = [[source, f"{value:+.3f}"] for source, value in (sums | {"together": sum(sums.values())}).items()]
    shown = table_lines(("sum over blocks, mean over images", "logit above the runner-up"), lines)
    return _finish(subject, shown, [output / f"directions.{suffix}" for suffix in ("png", "csv")])


def _finish(subject: Subject, lines: list[str], files: list[Path]) -> int:
    """Prints the result and what was written; returns the exit code, 1 if an image could not be read."""
    for line in [*lines, "written:", *(printable(file) for file in files)]:
        say(line)
    return 1 if subject.unreadable else 0


if __name__ == "__main__":
    raise SystemExit(main())
