"""Accuracy on images that are turned, shifted, covered or shuffled."""

from argparse import ArgumentParser, Namespace
from typing import Any

from _cli import created, pick_device

from _analyses.common import finish, labels, output_folder
from _analyses.labelled import HEADER, add_labelled_arguments, change_cells, open_models, shown_change
from sequencer.console import table_lines
from sequencer.files import write_csv


def add_arguments(command: ArgumentParser) -> None:
    """Adds MODEL... and the options of the data."""
    models = "run folders, model folders, checkpoints or timm names"
    command.add_argument("model", metavar="MODEL", nargs="+", help=models)
    add_labelled_arguments(command)
    command.set_defaults(batch_size=16)  # 11% faster than 8 on a CPU


def symmetry(args: Namespace) -> int:
    """Writes symmetry.png, accuracies under each change, and symmetry.csv, a row for each model and change."""
    names = labels(args.model)
    from sequencer.analysis.change_plots import describe_level, plot_symmetry
    from sequencer.analysis.symmetry import CONDITIONS
    from sequencer.analysis.symmetry import symmetry as measure

    output = output_folder(args)
    device = pick_device(args.device)
    models = open_models(names, args, device)
    with created(output):
        found = {}
        for name, (loaded, split) in zip(names, models, strict=True):
            found[name] = measure(loaded.model.to(device).eval(), split)
            loaded.model.cpu()
        rows: list[tuple[Any, ...]] = []
        for name, result in found.items():
            rows.append((name, "unchanged", "", *result.clean, *[""] * (len(HEADER) - 3)))
            rows += [(name, *condition, *change_cells(change)) for condition, change in result.changes.items()]
        write_csv(output / "symmetry.csv", ("model", "condition", "level", *HEADER), rows)
        number = next(iter(found.values())).images
        plot_symmetry(found, split.describe(number), output / "symmetry.png")
    lines = [["unchanged", *(cell for result in found.values() for cell in (f"{result.clean.value:.2%}", ""))]]
    for condition in CONDITIONS:
        changes = [result.changes[condition] for result in found.values()]
        cells = (cell for change in changes for cell in (f"{change.top1.value:.2%}", shown_change(change)))
        lines.append([describe_level(condition), *cells])
    header = [cell for name in found for cell in (name, "change")]
    shown = [
        split.describe(number),
        *table_lines(("top-1 of images", *header), lines),
        "changes in percentage points; *: p < 0.05 by McNemar's exact test with Holm's correction",
    ]
    return finish(split.unreadable, shown, [output / f"symmetry.{suffix}" for suffix in ("png", "csv")])
