"""Errors that a command reports in one or two lines."""

import difflib
from collections.abc import Iterable

from sequencer.printing import printable


class SharedError(Exception):
    """An error that is raised identically on every rank; rank 0 prints it."""


class RequestError(SharedError, ValueError):
    """A request that cannot be served as written; ends a command with exit code 2.

    The message is one or two lines that say what is wrong, where, and what to do.
    """


def summarise_error(error: BaseException) -> str:
    """Summarises an error in at most two lines, as `printable` shows them.

    A loader worker passes on its whole traceback as the message, of which the last line is the original error.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught "):
        name, _, reason = lines[-1].partition(": ")
        return printable(reason or name)
    return "\n".join(printable(line) for line in lines[:2])


def show(value: object, longest: int = 200) -> str:
    """Returns a value of a request as it is shown in messages: printable, on one line, and not too long."""
    text = printable(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """Returns the hint "did you mean X? There are X, Y, Z" for a value that is none of the choices."""
    choices = list(choices)
    nearest = difflib.get_close_matches(str(value), choices, n=1)
    return f"{f'did you mean {nearest[0]}? ' if nearest else ''}There are {', '.join(choices)}"
