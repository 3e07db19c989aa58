"""What the analyses of accuracy share: the options of labelled images, and changes of accuracy as cells."""

from argparse import ArgumentParser
from typing import TYPE_CHECKING, Any

from _cli import integer
from _labelled import add_data_options

if TYPE_CHECKING:
    from sequencer.analysis.changes import Change

# columns of a change in a CSV file
HEADER = (
    *("top1", "top1_low", "top1_high", "change", "change_low", "change_high", "wins", "losses", "p_value"),
    "p_value_holm",
)


def add_labelled_arguments(command: ArgumentParser) -> None:
    """Adds the options of the data set and the number of images."""
    add_data_options(command)
    command.add_argument("--limit", metavar="N", type=integer(1), help="use the first N images; default: all")


def change_cells(change: "Change") -> tuple[Any, ...]:
    """Returns the values of the columns of `HEADER`."""
    result = change.comparison
    counts = (result.only_first, result.only_second)
    return (*change.top1, *result.difference, *counts, result.p_value, change.p_holm)


def shown_change(change: "Change") -> str:
    """Formats a change in percentage points; a significant one has an asterisk."""
    from sequencer.analysis.paired import points

    return points(change.comparison.difference.value) + ("*" if change.is_significant else "")
