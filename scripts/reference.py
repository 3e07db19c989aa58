"""Writes docs/configuration.md, which lists every configuration key, from the schema: `python scripts/reference.py`."""

import dataclasses
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from omegaconf import MISSING

from sequencer.config import conf_dir
from sequencer.config.conf_files import ConfigFiles
from sequencer.config.schema import Config

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
INTRODUCTION = """# Configuration

Every key of `python train.py key=value`. `python scripts/reference.py` writes this page from
[`sequencer/config/schema.py`](../sequencer/config/schema.py).

The defaults are those of the schema. The choices of the groups and the recipe override them, and the command line
overrides all. `python train.py ... --cfg job` prints the resulting configuration. Keys marked (R) may change when a
run is resumed; trainer keys marked (A) are additions to those of Lightning's Trainer.
"""


def main() -> None:
    PAGE.write_text(page())


def page() -> str:
    """The page in Markdown."""
    sections = [INTRODUCTION, _groups()]
    sections += [_section(name, node) for name, node in _nodes(Config, "")]
    return "\n".join(sections)


def _groups() -> str:
    rows = [f"| `{group}=` | {', '.join(choices)} |" for group, choices in ConfigFiles(conf_dir()).groups.items()]
    return "\n".join(["## Groups", "", "| group | choices |", "| --- | --- |", *rows, ""])


def _nodes(node: type, prefix: str) -> Iterator[tuple[str, type]]:
    """Yields every dataclass of the schema with its path, a parent before its children."""
    yield prefix, node
    for field in dataclasses.fields(node):
        if dataclasses.is_dataclass(field.type):
            yield from _nodes(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]


def _section(prefix: str, node: type) -> str:
    """The table of one dataclass."""
    rows = [
        f"| `{prefix}{field.name}` | {_kind(field)} | {_default(field)} | {_cell(_help(field))} |"
        for field in dataclasses.fields(node)
        if not dataclasses.is_dataclass(field.type)
    ]
    title = f"## {prefix[:-1]}" if prefix else "## The run"
    return "\n".join([title, "", _cell(node.__doc__ or ""), "", "| key | values | default | what |",
                      "| --- | --- | --- | --- |", *rows, ""])  # fmt: skip


def _kind(field: "dataclasses.Field[Any]") -> str:
    """The choices of a key, or its type and bounds."""
    if field.metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in field.metadata["choices"])
    low, high = (_number(field.metadata[bound]) for bound in ("low", "high"))
    bounds = (
        f", {low} to {high}" if low and high else f", at least {low}" if low else f", at most {high}" if high else ""
    )
    return _type(field.type) + bounds


def _help(field: "dataclasses.Field[Any]") -> str:
    """Returns the meaning of a key and its marks."""
    marks = [mark for name, mark in (("on_resume", "R"), ("ours", "A")) if field.metadata[name]]
    return " ".join([field.metadata["help"], *(f"({mark})" for mark in marks)])


def _number(value: float | None) -> str | None:
    return f"{value:g}" if isinstance(value, float) else None if value is None else str(value)


def _type(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        names = [_type(member) for member in get_args(kind) if member is not types.NoneType]
        return " or ".join(names + ["null"] * (types.NoneType in get_args(kind)))
    if args := get_args(kind):
        return f"{kind.__origin__.__name__} of {_type(args[-1])}"
    return "anything" if kind is Any else kind.__name__


def _default(field: "dataclasses.Field[Any]") -> str:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if value == MISSING:
        return "set by `data=`"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
