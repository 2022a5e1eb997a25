"""Readers of files from outside. A damaged file becomes one `ValueError` that names the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

ShapeT = TypeVar("ShapeT")


def parse_json(text: str | bytes, shape: type[ShapeT]) -> ShapeT:
    """Reads JSON of a known shape.

    Args:
        text: JSON; bytes are UTF-8.
        shape: Type of the content, such as `dict[str, list[int]]` or a dataclass. Types are strict: "1" is no number.

    Raises:
        ValueError: If the text is not JSON, is nested too deeply, or has another shape. The message names the place.
    """
    from pydantic import TypeAdapter

    with _one_line():
        return TypeAdapter(shape).validate_json(text, strict=True)


def checked(content: Any, shape: type[ShapeT]) -> ShapeT:
    """Returns content of JSON with the keys that a shape names, a `TypedDict`; types and errors as in `parse_json`."""
    from pydantic import TypeAdapter

    with _one_line():
        return TypeAdapter(shape).validate_python(content, strict=True)


@contextmanager
def _one_line() -> Iterator[None]:
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None


@contextmanager
def readable(file: str | os.PathLike[str]) -> Iterator[None]:
    """Makes every error in the block a `ValueError` that names the file which the block reads."""
    try:
        yield
    except Exception as error:  # every format raises kinds of its own, and few of them name the file
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise ValueError(f"{file} cannot be read: {kind}{error}") from error


__all__ = ["checked", "parse_json", "readable"]
