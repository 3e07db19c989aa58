"""The one exception that means: the request was wrong, not the work; and how errors are said."""


class SharedError(Exception):
    """Raised by every process of a run alike: the first one says it for all."""


class RequestError(SharedError, ValueError):
    """A request that cannot be served as written; ends a command with exit code 2.

    The message is one or two lines that say what is wrong, where, and what to do.
    """


def say(error: BaseException) -> str:
    """An error in one or two lines."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught "):  # a loader process hands on its whole traceback, whose last line is the error
        name, _, reason = lines[-1].partition(": ")
        return reason or name
    return "\n".join(lines[:2])
