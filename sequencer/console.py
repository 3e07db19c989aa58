"""What a command shows on the console: whole lines, neither wrapped, cut nor padded.

The terminal itself continues a line that is wider than it is, so that a path or a command in it is copied as one. The
log of a run and its progress bar share `CONSOLE`, which keeps the bar below the lines that are printed.
"""

import io
import logging
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

CONSOLE = Console(highlight=False, markup=False, emoji=False)
UNLIMITED = 10**5  # characters of a line


def say(line: str, style: str | None = None) -> None:
    """Prints one line or more on standard output."""
    CONSOLE.print(line, style=style, soft_wrap=True)


class ConsoleHandler(logging.Handler):
    """Shows the messages of a log on the console, without their details; warnings are yellow."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            say(record.getMessage(), "yellow" if record.levelno >= logging.WARNING else None)
        except Exception:
            self.handleError(record)


def table_lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lays a table out in columns, the first one aligned left and the others right.

    Args:
        header: Names of the columns.
        rows: Cells of each row, printable.

    Returns:
        The lines, the header first, without trailing blanks.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for index, name in enumerate(header):
        table.add_column(Text(name), justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    buffer = io.StringIO()
    Console(file=buffer, width=UNLIMITED, color_system=None).print(table)
    return [line.rstrip() for line in buffer.getvalue().splitlines()]
