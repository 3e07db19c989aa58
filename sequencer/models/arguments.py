"""Arguments of architectures: which of them a file or a configuration may name, and with which values."""

import difflib
import inspect
import math
import re
import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

import timm
from timm.models import build_model_with_cfg, get_arch_name

from sequencer.models.sequencer import Sequencer, Sequencer2d, VSequencer
from sequencer.names import LOADING_ARGUMENTS
from sequencer.printing import quote_odd
from sequencer.variants import VARIANTS

LARGEST = 2**20  # integer; no dimension, depth or image size of an architecture is larger
MOST_VALUES = 10_000  # of all arguments together
LONGEST = 1000  # characters of a string

# timm interprets these instead of passing them on to an architecture: where weights come from, what is made of the
# model, and how or where it runs; versions of timm that are newer than the list of names may have more
RESERVED = {
    *LOADING_ARGUMENTS,
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
}


class ArgumentError(ValueError):
    """An argument that an architecture must not be built with; the message has one line, which begins with its name."""


def check_model_args(arch: str, args: Mapping[str, Any]) -> None:
    """Checks arguments of an architecture, which may come from a file of others, before a model is built with them.

    A model of this package takes the arguments of its constructor. Any other model takes the arguments that timm passes
    on to the architecture, so that no argument can load weights, read a file or start a download.

    Args:
        arch: Name of the architecture.
        args: The arguments.

    Raises:
        ArgumentError: A name is not that of an argument of the architecture, or a value is extreme.
    """
    variant = VARIANTS.get(get_arch_name(arch))
    for name in map(str, args):
        if name not in ACCEPTED[variant.model] if variant else name in RESERVED:
            raise ArgumentError(_unknown(arch, name, ACCEPTED[variant.model] if variant else set()))
    _check_values({quote_odd(name): value for name, value in args.items()})


def describe_unknown(arch: str, error: Exception) -> str | None:
    """Describes an argument that a model of timm does not have, from the error of its constructor.

    Returns:
        One line with the arguments that it has, or None if the error is another one.
    """
    found = re.search(r"(?:(\w+)\.__init__\(\) )?got an unexpected keyword argument '(\w+)'", str(error))
    if not isinstance(error, TypeError) or found is None:
        return None
    model = getattr(sys.modules[timm.model_entrypoint(get_arch_name(arch)).__module__], found[1] or "", None)
    known = {
        parameter.name
        for base in getattr(model, "__mro__", ())
        for parameter in inspect.signature(base.__init__).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    return _unknown(arch, found[2], known - RESERVED - {"self"})


def _unknown(arch: str, name: str, known: set[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(sorted(known))}" if known else ""
    return f"{quote_odd(name)}: not an argument of the architecture {arch}{hint}"


def _accepted(model: type[Sequencer]) -> set[str]:
    """Returns the names of the arguments of a model's constructor, those that it passes on to its base included."""
    constructors = [cls.__init__ for cls in model.__mro__ if issubclass(cls, Sequencer)]
    names = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
    return names - {"self", "token_mixer", "backbone"}


ACCEPTED = {model.__name__: _accepted(model) for model in (Sequencer2d, VSequencer)}


def _check_values(args: Mapping[str, Any]) -> None:
    """Checks that the values are few, short and of the size that an architecture can have."""
    queue, number = deque(args.items()), len(args)
    while queue:
        entry, value = queue.popleft()
        if isinstance(value, list | tuple | dict):
            number += len(value)
            if number > MOST_VALUES:  # before they are queued: a checkpoint may hold a list of itself
                raise ArgumentError(f"{entry}: the arguments have more than {MOST_VALUES:,} values")
            items = value.items() if isinstance(value, dict) else enumerate(value)
            queue.extend((f"{entry}.{quote_odd(key)}", item) for key, item in items)
        elif isinstance(value, int) and abs(value) > LARGEST:
            raise ArgumentError(f"{entry}: an integer beyond {LARGEST:,}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ArgumentError(f"{entry}: not a finite number")
        elif isinstance(value, str) and len(value) > LONGEST:
            raise ArgumentError(f"{entry}: text of more than {LONGEST:,} characters")
