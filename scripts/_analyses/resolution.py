"""Accuracy, speed and states of recurrences across input sizes, without retraining."""

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _cli import created, integer, pick_device
from _labelled import LabelledImages

from _analyses.common import finish, labels, output_folder
from _analyses.labelled import HEADER, add_labelled_arguments, change_cells, open_models, shown_change
from sequencer.config.errors import RequestError
from sequencer.console import table_lines
from sequencer.files import write_csv
from sequencer.names import LARGEST_IMAGE
from sequencer.printing import first_line

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sequencer.analysis.resolution import Resolution
    from sequencer.models import LoadedModel

MOST_SIZES = 50


def add_arguments(command: ArgumentParser) -> None:
    """Adds MODEL..., the sizes and the options of the data."""
    models = "run folders, model folders, checkpoints or timm names"
    command.add_argument("model", metavar="MODEL", nargs="+", help=models)
    command.add_argument(
        "--sizes",
        metavar="N,N",
        type=_sizes,
        help="heights and widths besides the model's own; default: 0.5 to 2 times that, in multiples of its stride",
    )
    add_labelled_arguments(command)


def _sizes(text: str) -> list[int]:
    """The argument type of sizes separated by commas."""
    sizes = sorted({integer(1, LARGEST_IMAGE)(part) for part in text.split(",")})
    if len(sizes) > MOST_SIZES:
        raise ArgumentTypeError(f"{len(sizes)} sizes are more than {MOST_SIZES}")
    return sizes


def resolution(args: Namespace) -> int:
    """Writes resolution.png, resolution.csv with a row for each model and size, and resolution_states.csv."""
    names = labels(args.model)
    import torch

    from sequencer.analysis.resolution import compare_sizes, default_sizes, measure_size
    from sequencer.analysis.resolution_plots import plot_resolution
    from sequencer.evaluation import check_img_size

    output = output_folder(args)
    device = pick_device(args.device)
    models = open_models(names, args, device)
    for loaded, images in models:
        check_img_size(loaded, images.data.img_size)
    found: dict[str, Resolution] = {}
    wanted: dict[str, list[int]] = {}
    unreadable = 0
    with created(output):
        for name, (loaded, images) in zip(names, models, strict=True):
            own = images.data.img_size
            wanted[name] = sorted({own, *args.sizes}) if args.sizes else default_sizes(loaded.model, own)
            results = {}
            for size, network, batches in _at_sizes(loaded, wanted[name], args, device):
                results[size] = measure_size(network, batches)
                unreadable = max(unreadable, batches.unreadable)
            found[name] = compare_sizes(own, results)
        _write_numbers(found, wanted, output)
        title = images.describe(min(each.images for each in found.values()))
        threads = "" if device.type == "cuda" else f", threads: {torch.get_num_threads()}"
        plot_resolution(
            found, title, f"batches of at most {args.batch_size} on {device.type}{threads}", output / "resolution.png"
        )
    shown = [
        title,
        *table_lines(("model", "size", "steps", "top-1", "change", "images/s"), _rows(found, wanted)),
        "change: from the model's own size, in percentage points; *: p < 0.05 by",
        "McNemar's exact test with Holm's correction. images/s: forward passes alone,",
        "median over full batches. steps: tokens of a scan in each stage.",
    ]
    files = ("resolution.png", "resolution.csv", "resolution_states.csv")
    return finish(unreadable, shown, [output / file for file in files])


def _at_sizes(
    loaded: "LoadedModel", sizes: list[int], args: Namespace, device: "torch.device"
) -> "Iterator[tuple[int, nn.Module, LabelledImages]]":
    """Yields each size that a model takes, with the model and the images; names the others on standard error."""
    from sequencer.evaluation import at_img_size

    for size in sizes:
        try:
            network = at_img_size(loaded, size).model
        except RequestError as error:
            print(f"left out: {first_line(error)}", file=sys.stderr)
            continue
        yield size, network.to(device), LabelledImages(loaded, args, device, img_size=size)
        network.cpu()


def _steps(result: "Resolution", size: int) -> str:
    """The steps of a scan in each stage, such as `32, 16, 16, 16`; empty without recurrences."""
    return ", ".join(f"{entry.steps:,}" for entry in result.states.get(size, []))


def _rows(found: "dict[str, Resolution]", wanted: dict[str, list[int]]) -> list[list[str]]:
    rows = []
    for name, result in found.items():
        for size in wanted[name]:
            if size not in result.top1:
                rows.append([name, f"{size:,}", "-", "-", "-", "-"])
                continue
            change = "own size" if size == result.own_size else shown_change(result.changes[size])
            cells = (_steps(result, size), f"{result.top1[size].value:.2%}", change)
            rows.append([name, f"{size:,}", *cells, f"{result.images_per_s[size]:,.1f}"])
    return rows


def _write_numbers(found: "dict[str, Resolution]", wanted: dict[str, list[int]], output: Path) -> None:
    """Writes the results of each size, blank where the model does not take it, and the states of each stage."""
    rows: list[tuple[Any, ...]] = []
    states: list[tuple[Any, ...]] = []
    for name, result in found.items():
        for size in wanted[name]:
            change: tuple[Any, ...] = ("",) * len(HEADER)
            if size in result.changes:
                change = change_cells(result.changes[size])
            elif size in result.top1:
                change = (*result.top1[size], *change[3:])
            rows.append((name, size, _steps(result, size), *change, result.images_per_s.get(size, "")))
            states += [(name, size, *entry) for entry in result.states.get(size, [])]
    write_csv(output / "resolution.csv", ("model", "size", "steps", *HEADER, "images_per_s"), rows)
    header = ("model", "size", "stage", "steps", "state_rms", "saturated")
    write_csv(output / "resolution_states.csv", header, states)
