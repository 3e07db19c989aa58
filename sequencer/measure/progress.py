"""The progress of a plan on a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sequencer import distributed
from sequencer.console import CONSOLE


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """Yields a function that shows on a terminal, in one line, what is being done, with the seconds since the start.

    The line is deleted at the end. Without a terminal, and on ranks other than 0, nothing is shown.
    """
    shown = distributed.is_first() and sys.stdout.isatty()
    columns = (SpinnerColumn(), TextColumn("plan: {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=CONSOLE, transient=True, disable=not shown) as progress:
        task = progress.add_task("")
        yield lambda stage: progress.update(task, description=stage, refresh=True)
