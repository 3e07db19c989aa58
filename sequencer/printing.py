"""Names and messages that others have written, escaped for terminals, logs, tables and pictures."""

import math
import re

# control characters, line separators, controls of the direction of text, and surrogates, which stand for bytes of file
# names that are not UTF-8
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def printable(text: object) -> str:
    r"""Escapes what would change a terminal or start a new line, as in a Python string literal.

    The result is one line of valid Unicode. A byte of a file name that is not UTF-8 becomes `\xff`, a control character
    `\x1b`, a newline `\n`; letters of all scripts, spaces and backslashes stay as they are.

    Args:
        text: A name, path or message, which `str` turns into text.
    """
    return _UNSAFE.sub(_escape, str(text))


def quote_odd(name: object) -> str:
    """Returns a name as it is, or quoted, escaped and cut to 100 characters if it is longer or would break the line."""
    text = str(name)
    return text if text.isprintable() and len(text) < 100 else ascii(text[:100])


def first_line(error: object) -> str:
    """Returns the first line of an error's message as `printable` shows it, or the name of its class if it has none."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0])


def duration(seconds: float) -> str:
    """Returns a time as people say it: `90 s`, `12.5 min` or `3.2 h`; NaN is `an unknown time`."""
    if math.isnan(seconds):
        return "an unknown time"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _escape(match: re.Match[str]) -> str:
    character = match.group()
    if short := _SHORT.get(character):
        return short
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python decodes a byte that is not UTF-8
        return rf"\x{code - 0xDC00:02x}"
    return rf"\x{code:02x}" if code < 0x80 else rf"\u{code:04x}"
