"""Contents of files that others may have written, validated against a declared type."""

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)
# what pydantic calls by the names of Python's types, in the words of JSON; by the type of the error
JSON_WORDS = {
    "model_type": "input should be an object",
    "dict_type": "input should be an object",
    "list_type": "input should be a valid array",
}


class UndeclaredContent(ValueError):
    """A file whose contents do not have the declared type; the message has one line, which names file and entry."""


def parse_json(model: type[Model], text: str | bytes, name: str) -> Model:
    """Parses JSON of a declared type.

    Args:
        model: The declared type. Values are not converted, except integers to floats.
        text: The JSON.
        name: Name of the file in error messages.

    Raises:
        UndeclaredContent: The text is not JSON, or its contents do not have this type.
    """
    try:
        value = decode_json(text)
    except ValueError as error:
        raise UndeclaredContent(f"{name}: invalid JSON: {error}") from error
    return _validate(model, value, name, JSON_WORDS)


def decode_json(text: str | bytes) -> Any:
    """Decodes JSON; names with bytes that are not UTF-8 are lone surrogates in it, which pydantic's parser refuses.

    Raises:
        ValueError: The text is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_type(model: type[Model], value: Any, name: str) -> Model:
    """Returns `value` as the declared type, with the conversions of `parse_json`.

    Raises:
        UndeclaredContent: The value does not have this type.
    """
    return _validate(model, value, name, {})


def _validate(model: type[Model], value: Any, name: str, words: dict[str, str]) -> Model:
    try:
        return model.model_validate(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        entry = ".".join(str(part) for part in first["loc"])
        reason = words.get(first["type"]) or first["msg"].removeprefix("Value error, ")
        raise UndeclaredContent(f"{name}: {entry + ': ' if entry else ''}{reason[:1].lower()}{reason[1:]}") from error
