"""The overrides of a command line: parsed, and their keys and choices looked up."""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import OverrideParseException

from sequencer.config.errors import RequestError, did_you_mean
from sequencer.config.preflight import may_be_model
from sequencer.config.schema import Config

PLUGINS = {
    "hydra/sweeper": "hydra_plugins.hydra_optuna_sweeper",
    "hydra/launcher": "hydra_plugins.hydra_submitit_launcher",
}


def parse_overrides(lines: Sequence[str]) -> list[Override]:
    """Parses overrides by Hydra's grammar.

    Raises:
        RequestError: An override does not follow the grammar.
    """
    try:
        return OverridesParser.create().parse_overrides(list(lines))
    except OverrideParseException as error:
        raise RequestError(f"cannot read {error.override!r}: overrides are written key=value") from error


def complete(overrides: Sequence[Override], groups: dict[str, list[str]], first: bool = False) -> list[str]:
    """Checks the key and the choice of each override and returns the overrides that Hydra composes, as text.

    `data=NAME` without an experiment selects the recipe of that name, or none, so that no values of another recipe
    are inherited. `model.kwargs` may be given new keys.

    Args:
        groups: the choices of each group.
        first: take the first value of each key that is swept over.

    Raises:
        RequestError: An unknown key or choice.
    """
    for override in overrides:
        check_key(override, groups)
    lines = [
        to_line(override, next(swept_values(override)) if first and override.is_sweep_override() else None)
        for override in overrides
    ]
    data = [override for override in overrides if override.key_or_group == "data"]
    if data and not any(override.key_or_group == "experiment" for override in overrides):
        choice = data[-1].value()
        lines.append(f"experiment={choice}" if choice in groups["experiment"] else "~experiment")
    return lines


def check_key(override: Override, groups: dict[str, list[str]]) -> None:
    """Checks that an override names a key of the schema, or a group and one of its choices.

    Raises:
        RequestError: There is no such key or choice, and the message names the nearest one; or the override needs a
            plugin of Hydra that is not installed.
    """
    key = override.key_or_group
    if key in groups:
        if not override.is_delete():
            _check_choice(override, groups[key])
    elif key not in KEYS and not key.startswith(("hydra.", "hydra/", "model.kwargs.")):
        raise RequestError(describe_unknown(key))
    if (package := PLUGINS.get(key)) and override.value() not in ("basic", None) and find_spec(package) is None:
        raise RequestError(
            f"{key}={override.value()} needs {package.rpartition('.')[2]}: install the extra 'sweep', e.g. "
            "python -m pip install -e '.[sweep]'"
        )


def describe_unknown(key: str) -> str:
    """Describes a key that the schema does not have, with the nearest one that it has."""
    nearest = _nearest(key)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else "docs/configuration.md lists every key"
    return f"unknown key {key!r}: {hint}"


def swept_values(override: Override) -> Iterator[Any]:
    """Yields the values that a sweep gives to a key; of an interval its two ends."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return iter((value.start, value.end))
    return iter(override.sweep_string_iterator())


def to_line(override: Override, value: Any = None) -> str:
    """Returns an override as text, with `value` in place of its own; `model.kwargs` may then be given new keys."""
    text = override.input_line if value is None else f"{override.get_key_element()}={value}"
    prefixed = override.is_add() or override.is_force_add() or override.is_delete()
    return f"++{text}" if override.key_or_group.startswith("model.kwargs") and not prefixed else f"{text}"


def quoted(text: str) -> str:
    """Quotes a text in Hydra's grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _check_choice(override: Override, choices: list[str]) -> None:
    values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    for value in values:
        for choice in value if isinstance(value, list) else [value]:
            if str(choice) not in choices:
                group = override.key_or_group
                if group == "model" and may_be_model(str(choice)):
                    raise RequestError(f"model={choice} does not exist: did you mean model.name={choice}?")
                raise RequestError(f"{group}={choice} does not exist: {did_you_mean(choice, choices)}")


def _keys(node: type, prefix: str = "") -> dict[str, Any]:
    """Returns every dotted key of a dataclass with its type, those of its sections included."""
    keys = {}
    for field in dataclasses.fields(node):
        keys[prefix + field.name] = field.type
        if dataclasses.is_dataclass(field.type):
            keys |= _keys(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]
    return keys


def takes_list(key: str) -> bool:
    """Whether a key or group may be given a list."""
    return key == "logger" or key.startswith("model.kwargs.") or str(KEYS.get(key)).startswith("list[")


KEYS = _keys(Config)


def _nearest(key: str) -> list[str]:
    """Returns the key with the same last part in a similar section, or at most two in others, or a similar key."""
    section, _, leaf = key.rpartition(".")
    same = {known.rpartition(".")[0]: known for known in KEYS if known.rpartition(".")[2] == leaf}
    if match := difflib.get_close_matches(section, same, n=1):
        return [same[match[0]]]
    if same:
        return list(same.values())[:2]
    similar = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.7)
    if similar:
        return similar
    by_leaf = {known.rsplit(".", 1)[-1]: known for known in KEYS}
    return [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, n=1)]
