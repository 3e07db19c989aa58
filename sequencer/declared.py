"""Contents of files that others may have written, validated against a declared type."""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


class UndeclaredContent(ValueError):
    """A file whose contents do not have the declared type; the message has one line, which names file and entry."""


def parse_json(model: type[Model], text: str | bytes, name: str) -> Model:
    """Parses JSON of a declared type.

    Args:
        model: The declared type. Values are not converted, except arrays to tuples and integers to floats.
        text: The JSON.
        name: Name of the file in error messages.

    Raises:
        UndeclaredContent: The text is not JSON, or its contents do not have this type.
    """
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise UndeclaredContent(_describe(error, name)) from error


def check_type(model: type[Model], value: Any, name: str) -> Model:
    """Returns `value` as the declared type, as `parse_json` does for JSON.

    Raises:
        UndeclaredContent: The value does not have this type.
    """
    try:
        return model.model_validate(value, strict=True)
    except ValidationError as error:
        raise UndeclaredContent(_describe(error, name)) from error


def _describe(error: ValidationError, name: str) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    entry = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    return f"{name}: {entry + ': ' if entry else ''}{reason[:1].lower()}{reason[1:]}"
