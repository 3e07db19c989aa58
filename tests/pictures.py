"""Blank pictures in place of those of a run: drawing them takes longer than a small run trains."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from sequencer.files import write_atomically


def leave_blank(set_attribute: Callable[[object, str, object], None] = setattr) -> None:
    """Replaces the functions that draw the pictures of a run, and the one that saves every other plot.

    Args:
        set_attribute: called as `setattr`.
    """
    from sequencer.analysis import plots
    from sequencer.training import result

    set_attribute(plots, "save", lambda figure, output: _write_blank(output))
    set_attribute(result, "plot_confusion", lambda confusion, class_names, output, title: _write_blank(output))
    set_attribute(result, "plot_curves", lambda metrics_csv, output, best_epoch: _write_blank(output))


def _write_blank(output: Path) -> None:
    write_atomically(output, lambda path: Image.new("L", (8, 8)).save(path, "png"))
