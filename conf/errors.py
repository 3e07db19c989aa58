"""The one exception that means: the request was wrong, not the work."""


class RequestError(ValueError):
    """A request that cannot be served as written; ends a command with exit code 2.

    The message is one or two lines that say what is wrong, where, and what to do.
    """
