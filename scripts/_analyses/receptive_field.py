"""The effective receptive fields of the stages of one model or several."""

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

import numpy as np
from _cli import created, load_original, pick_device

from _analyses.common import Images, add_image_options, finish, labels, naming, output_folder
from sequencer.console import table_lines
from sequencer.files import write_arrays, write_csv

if TYPE_CHECKING:
    from sequencer.models import LoadedModel


def add_arguments(command: ArgumentParser) -> None:
    """Adds MODEL, the preset and the images."""
    add = command.add_argument
    add("model", metavar="MODEL", nargs="+", help="run folders, model folders, checkpoints or timm names")
    add(
        "--preset",
        choices=("sequencer", "replknet"),
        default="sequencer",
        help="procedure of the Sequencer paper's code, or that of RepLKNet's; default: sequencer",
    )
    add_image_options(command)


def receptive_field(args: Namespace) -> int:
    """Writes receptive-field.png, .csv with the extents and areas, and .npz with the contributions of the pixels."""
    from sequencer.analysis.receptive_field import SHARES, measure, receptive_fields
    from sequencer.analysis.receptive_field_plots import plot_receptive_fields
    from sequencer.evaluation import input_config

    output = output_folder(args)
    with created(output):
        names, device = labels(args.model), pick_device(args.device)
        loaded = [load_checked(source, args) for source in args.model]
        unreadable: set[str] = set()
        models: dict[str, Any] = {}
        for name, each in zip(names, loaded, strict=True):
            images = Images(args, input_config(each), unreadable)
            batches = images.tracked(f"gradients of {name}", device)
            with naming(name):
                models[name] = receptive_fields(each.model.to(device), batches, args.preset)
        described = f"{images.seen:,} image{'s' * (images.seen > 1)}{' of noise' * bool(args.noise)}"
        percent = [f"{share * 100:.0f}" for share in SHARES]
        measured = [(name, field, measure(field)) for name, fields in models.items() for field in fields]
        header = ["model", "stage", "token_rows", "token_columns", "token_row", "token_column", "height", "width"]
        header += [f"{kind}_{share}" for kind in ("width", "height", "area") for share in percent]
        rows = []
        for name, field, found in measured:
            sizes = [len(span) for span in (*found.columns, *found.rows)]
            place = (*field.tokens, *field.token, *field.contribution.shape)
            rows.append((name, field.stage, *place, *sizes, *found.area))
        write_csv(output / "receptive-field.csv", header, rows)
        arrays = {f"{name}/{field.stage}": field.contribution for name, field, _ in measured}
        write_arrays(output / "receptive-field.npz", arrays)
        plot_receptive_fields(models, args.preset, described, output / "receptive-field.png")
    lines = []
    for name, field, found in measured:
        extents = [f"{len(x)} x {len(y)}" for x, y in zip(found.columns, found.rows, strict=True)]
        areas = ["" if np.isnan(ratio) else f"{ratio:.1%}" for ratio in found.area]
        lines.append([name, field.stage, *extents[2:], *areas])
    columns = ("model", "stage", "px of 50%", "px of 99%", *(f"area {share}%" for share in percent))
    shown = [f"preset {args.preset}, {described}", *table_lines(columns, lines)]
    shown += [
        "px: width x height, the shortest intervals along rows and along columns that",
        "hold this share of the contribution.",
        "area: smallest square around the centre of the image that holds this share",
        "of log10(1 + contribution), over the area of the image, as RepLKNet's.",
    ]
    return finish(images.unreadable, shown, [output / f"receptive-field.{suffix}" for suffix in ("png", "csv", "npz")])


def load_checked(source: str, args: Namespace) -> "LoadedModel":
    """Loads a model whose stages can be looked at.

    Raises:
        RequestError: It cannot be loaded, or has no stages.
    """
    from sequencer.analysis.receptive_field import check_stages

    loaded = load_original(source, args)
    with naming(source):
        check_stages(loaded.model)
    return loaded
