"""Folders of runs, such as `outputs/digits`, which stand for their newest run."""

import os
import sys
from pathlib import Path

from sequencer.printing import printable

OF_A_MODEL = ("config.yaml", "config.json", "model", "checkpoints")  # a folder with one of these is no folder of runs


def named_run(source: str | Path, besides: str | None = None) -> Path:
    """Returns the newest run in a folder of runs, and says on standard error which it is; or else the source.

    Args:
        source: A folder of runs, or any other MODEL or RUN.
        besides: A run folder that is left out.

    Returns:
        The run that was started or resumed last, or `source` if it is no folder of runs.
    """
    found = find_run(source, besides)
    if found != Path(source) and os.environ.get("RANK", "0") == "0":
        print(f"newest run in {printable(Path(source))}: {printable(found)}", file=sys.stderr)
    return found


def find_run(source: str | Path, besides: str | None = None) -> Path:
    """Returns what `named_run` returns, and says nothing."""
    folder = Path(source)
    if not os.path.isdir(folder) or any((folder / name).exists() for name in OF_A_MODEL):
        return folder
    runs = [path for path in folder.glob("*/config.yaml") if besides is None or path.parent != Path(besides)]
    return max(runs, key=lambda path: path.stat().st_mtime).parent if runs else folder
