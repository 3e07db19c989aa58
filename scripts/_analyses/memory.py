"""The memory of recurrences: gradients and forget gates over distance, saturated gates, and maps of states."""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from _cli import created, integer, load_original, pick_device

from _analyses.common import Images, add_image_options, finish, labels, naming, output_folder
from sequencer.config.errors import RequestError
from sequencer.config.preflight import check_model_name
from sequencer.console import table_lines
from sequencer.files import write_arrays, write_csv
from sequencer.model_table import VARIANTS
from sequencer.names import LARGEST_IMAGE
from sequencer.printing import printable

if TYPE_CHECKING:
    from torch import nn

    from sequencer.config.schema import DataConfig

Network = tuple["nn.Module", "DataConfig"]  # in eval mode on the CPU, and its preprocessing


class Source(NamedTuple):
    """A model that is measured; it is built when its turn comes."""

    label: str
    is_trained: bool
    group: int  # a trained model and its untrained counterpart have the same
    build: Callable[[], Network]


def add_arguments(command: ArgumentParser) -> None:
    """Adds MODEL and the options of this analysis."""
    add = command.add_argument
    add("model", metavar="MODEL", nargs="+", help="run folder, model folder, checkpoint or timm name")
    add(
        "--cells",
        metavar="NAME,NAME",
        type=lambda text: list(dict.fromkeys(text.split(","))),
        help="MODEL is the name of an architecture; build it, untrained, with each of these cells",
    )
    add(
        "--untrained", action="store_true", help="beside each MODEL the same architecture with fresh weights, of seed 0"
    )
    add("--img-size", metavar="N", type=integer(1, LARGEST_IMAGE), help="height and width; default: the model's")
    add_image_options(command)


def memory(args: Namespace) -> int:
    """Writes memory.png with the curves, memory_maps.png, and the numbers as CSV and NPZ files."""
    sources = _sources_of_cells(args) if args.cells else _sources(args)
    from sequencer.analysis.memory import SATURATED, measure_memory
    from sequencer.analysis.memory_plots import Measured, plot_curves, plot_maps
    from sequencer.report.content import to_pixels

    device = pick_device(args.device)
    output = output_folder(args)
    measured: list[Measured] = []
    unreadable: set[str] = set()
    with created(output):
        for source in sources:
            model, config = source.build()
            config = replace(config, img_size=args.img_size or config.img_size)
            images = Images(args, config, unreadable)
            with naming(source.label):
                scans = measure_memory(model.to(device), images.tracked(source.label, device))
            pixels = None if args.noise or images.first is None else to_pixels(images.first, config)[0]
            measured.append(Measured(source.label, source.is_trained, source.group, scans, pixels))
        _write_numbers(measured, output)
        about = f"{images.seen:,} image{'s' * (images.seen > 1)}{' of standard-normal noise' * bool(args.noise)}"
        plot_curves(measured, about, output / "memory.png")
        plot_maps(measured, output / "memory_maps.png")
    low, high = SATURATED
    lines = [
        *table_lines(
            ("model", "steps", "half-distance", "from 1", "left", "forget gates", "saturated"), _rows(measured)
        ),
        "half-distance: tokens after which the norm of dh_t/dx_(t-k) is half that at k = 0;",
        "from 1: after which it is half that at k = 1, where the output gate is no longer a",
        "path of its own; left: the norm at the longest distance over that at k = 0; forget",
        "gates: tokens after which their product is 1/2; means over blocks and images;",
        f"saturated: share of gates below {low:g} or above {high:g}",
    ]
    names = ("memory.png", "memory_maps.png", "memory.csv", "memory_scans.csv", "memory.npz")
    return finish(images.unreadable, lines, [output / name for name in names])


def _sources_of_cells(args: Namespace) -> list[Source]:
    """Lists each architecture with each cell.

    Raises:
        RequestError: An architecture or a cell is unknown, or an option does not fit.
    """
    if args.untrained:
        raise RequestError("--untrained: with --cells every model is untrained")
    for name in args.model:
        check_model_name(name)
        if name not in VARIANTS:
            raise RequestError(
                f"{printable(name)} has no cells to choose: --cells needs a Sequencer, such as sequencer2d_s"
            )
    from sequencer.ops import CELLS

    for cell in args.cells:
        if cell not in CELLS:
            raise RequestError(f"--cells: unknown cell {printable(cell)}; there are {', '.join(CELLS)}")

    size = {"img_size": args.img_size} if args.img_size else {}
    pairs = [(name, cell) for name in labels(args.model) for cell in args.cells]
    several = len(args.model) > 1
    return [
        Source(f"{name}, {cell}" if several else cell, False, group, partial(_build, name, cell=cell, **size))
        for group, (name, cell) in enumerate(pairs)
    ]


def _build(name: str, **model_args: Any) -> Network:
    """Builds a model with fresh weights, the same in every call."""
    import torch

    from sequencer.config.schema import DataConfig
    from sequencer.evaluation.inputs import data_settings
    from sequencer.models import create_model, pretrained_cfg

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(name, **model_args).eval()
    return model, DataConfig(**data_settings(pretrained_cfg(model)))


def _sources(args: Namespace) -> list[Source]:
    """Lists each model, followed by its untrained counterpart if that is wanted."""
    sources = []
    for group, (model, label) in enumerate(zip(args.model, labels(args.model), strict=True)):
        sources.append(Source(label, True, group, partial(_load, model, args)))
        if args.untrained:
            sources.append(Source(f"{label}, untrained", False, group, partial(_untrained, model, args)))
    return sources


def _load(model: str, args: Namespace) -> Network:
    from sequencer.evaluation import input_config

    loaded = load_original(model, args)
    return loaded.model, input_config(loaded)


def _untrained(model: str, args: Namespace) -> Network:
    from sequencer.evaluation import input_config

    loaded = load_original(model, args)
    channels, height, _ = loaded.pretrained_cfg["input_size"]
    sizes = {"num_classes": loaded.model.num_classes, "in_chans": channels, "img_size": height}
    return _build(loaded.arch, **sizes | loaded.model_args)[0], input_config(loaded)


def _rows(measured: "list[Any]") -> list[list[str]]:
    """Rows of the printed table: one for each model and length of its scans."""
    from sequencer.analysis.memory import half_distance, mean_curves, mean_saturation, tokens

    rows = []
    for label, _, _, scans, _ in measured:
        for steps, (curve, carried) in mean_curves(scans).items():
            gates = mean_saturation([scan for scan in scans if len(scan.jacobian) == steps])
            total = sum(low + high for low, high in gates.values()) / len(gates) if gates else None
            cells = (half_distance(curve), half_distance(curve[1:]) + 1 if steps > 1 else math.nan)
            row = [label, f"{steps:,}", *(tokens(value, steps) for value in cells), f"{curve[-1]:.1e}"]
            row.append("" if carried is None else tokens(half_distance(carried), steps))
            rows.append([*row, "" if total is None else f"{total:.1%}"])
    return rows


def _write_numbers(measured: "list[Any]", output: Path) -> None:
    """Writes the curves, the figures of each scan, and the maps."""
    from sequencer.analysis.memory import half_distance

    place = ("model", "module", "layer", "direction")
    curves: list[tuple[Any, ...]] = []
    figures: list[tuple[Any, ...]] = []
    maps = {}
    for label, _, _, scans, _ in measured:
        for scan in scans:
            of = (label, scan.module, scan.layer, scan.direction)
            for k, norm in enumerate(scan.jacobian):
                curves.append((*of, k, norm, "" if scan.carried is None else scan.carried[k]))
            common = (*of, scan.cell, len(scan.jacobian), half_distance(scan.jacobian))
            figures += [(*common, gate, *shares) for gate, shares in scan.saturated.items()] or [(*common, "", "", "")]
            for name, values in scan.maps.items():
                maps[f"{label}/{scan.module}/{scan.layer}/{scan.direction}/{name}"] = values.astype("float32")
    write_csv(output / "memory.csv", (*place, "distance", "jacobian_norm", "forget_product"), curves)
    header = (*place, "cell", "steps", "half_distance", "gate", "below", "above")
    write_csv(output / "memory_scans.csv", header, figures)
    write_arrays(output / "memory.npz", maps)
