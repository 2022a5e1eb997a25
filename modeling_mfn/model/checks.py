"""Checks of settings from outside, by their types and ranges. Each error is a `ValueError` that names the setting."""

import contextlib
import functools
import math
import operator
import reprlib
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from huggingface_hub.dataclasses import type_validator

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple = 4, 8, 16, 16

WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", dict: "a mapping", None: "None"}
"""Types in the words of messages."""


def shown(value: Any) -> str:
    """Writes any value for a message, shortened, however deep or long it is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python does not write whole numbers of more than some thousand digits
        return f"a long {type(value).__name__}"


def is_whole(number: Any) -> bool:
    """True for an `int`; False for a `bool`, which Python counts among them."""
    return isinstance(number, int) and not isinstance(number, bool)


def check_type(name: str, value: Any, kind: Any) -> None:
    """Raises `ValueError` unless a value has the type of an annotation. An `int` is a `float`, a `bool` is neither."""
    try:
        type_validator(name, value, _with_whole_numbers(kind))
    except (TypeError, ValueError, RecursionError):  # the last two if its message cannot write the value
        raise ValueError(f"{name} is {shown(value)}; it must be {_in_words(kind)}") from None


@contextlib.contextmanager
def naming(source: Any) -> Iterator[None]:
    """Context in which an error of a value names the folder or id that the value is from."""
    try:
        yield
    except ValueError as error:
        if str(source) in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error


def as_number(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, allowed: str = "a finite number"
) -> float:
    """Returns a number, also one of NumPy or torch, as a float.

    Raises:
        ValueError: unless it is finite and from `least` to `most`; `allowed` says so in words.
    """
    number = math.nan
    if hasattr(value, "__float__") and not isinstance(value, bool | type):
        # tensors of several numbers, huge integers
        with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):
            number = float(value)
    if not math.isfinite(number) or not least <= number <= most:
        raise ValueError(f"{name} is {shown(value)}; it must be {allowed}")
    return number


def as_whole(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """Returns a whole number; `ValueError` unless it is from `least` to `most`."""
    if not is_whole(value) or not least <= value <= most:
        allowed = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name} is {shown(value)}; it must be a whole number {allowed}")
    return int(value)


def _with_whole_numbers(kind: Any) -> Any:
    if kind is float:
        return float | int
    if get_origin(kind) in (Union, UnionType):
        return functools.reduce(operator.or_, map(_with_whole_numbers, get_args(kind)))
    return kind


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_in_words, get_args(kind))))
    return WORDS.get(None if kind is NoneType else kind, str(kind))


__all__ = ["as_number", "as_whole", "check_type", "is_whole", "naming", "shown"]
