"""What the analyses of accuracy share: options of labelled images, models with their images, changes as cells."""

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from _cli import integer, load_original
from _labelled import LabelledImages, add_data_options

from sequencer.config.errors import RequestError

if TYPE_CHECKING:
    import torch

    from sequencer.analysis.changes import Change
    from sequencer.models import LoadedModel

# columns of a change in a CSV file
HEADER = (
    *("top1", "top1_low", "top1_high", "change", "change_low", "change_high", "wins", "losses", "p_value"),
    "p_value_holm",
)


def add_labelled_arguments(command: ArgumentParser) -> None:
    """Adds the options of the data set and the number of images."""
    add_data_options(command)
    command.add_argument("--limit", metavar="N", type=integer(1), help="use the first N images; default: all")


def open_models(
    names: list[str], args: Namespace, device: "torch.device"
) -> "list[tuple[LoadedModel, LabelledImages]]":
    """Loads each MODEL with the images that it is evaluated on.

    Args:
        names: What each model is called in an error.
        args: The options.
        device: Where the images are moved.

    Raises:
        RequestError: A model cannot be loaded, or its data set cannot be opened or has other images than that of the
            first model.
    """
    models = [load_original(model, args) for model in args.model]
    splits = [LabelledImages(model, args, device) for model in models]
    for name, split in zip(names, splits, strict=True):
        if split.fingerprint != splits[0].fingerprint:
            raise RequestError(f"{names[0]} and {name} would be evaluated on different images")
    return list(zip(models, splits, strict=True))


def change_cells(change: "Change") -> tuple[Any, ...]:
    """Returns the values of the columns of `HEADER`."""
    result = change.comparison
    counts = (result.only_first, result.only_second)
    return (*change.top1, *result.difference, *counts, result.p_value, change.p_holm)


def shown_change(change: "Change") -> str:
    """Formats a change in percentage points; a significant one has an asterisk."""
    from sequencer.analysis.paired import points

    return points(change.comparison.difference.value) + ("*" if change.is_significant else "")
