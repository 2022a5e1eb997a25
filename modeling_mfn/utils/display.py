"""Text from data sets and models, made safe to show. Files keep it raw; whatever shows it goes through here."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.text import Text

HARMLESS_INSIDE = frozenset(" -,;")
"""What means nothing to Markdown except, for some, where text begins."""
COMBINING = 4
"""Combining marks in a row that are shown as such; a pile of them covers the lines around."""


def visible(text: str, width: int = 80) -> str:
    r"""Plain text on one line, cut to `width` characters, with `…` where something is missing. What a reader does not
    see, or what moves other characters about, is shown as an escape of Python (`\n`, `\x1b`, `\u202e`): control and
    format characters, right-to-left marks among them, spaces but for the usual one, and what is unassigned."""
    shown: list[str] = []
    length = 0
    for piece in _visible_characters(text[: width + 1]):  # escapes make it longer, never shorter
        if length + len(piece) > width:
            return "".join(shown) + "…"
        shown.append(piece)
        length += len(piece)
    return "".join(shown)


def visible_lines(text: str) -> str:
    r"""Plain text of any length, in which line breaks (`\n`) stay, and all else that `visible` escapes is escaped."""
    return "\n".join("".join(_visible_characters(line)) for line in text.split("\n"))


def _visible_characters(text: str) -> Iterator[str]:
    """Each character, or its escape."""
    marks = 0
    for character in text:
        marks = marks + 1 if unicodedata.combining(character) else 0
        hidden = not character.isprintable() or marks > COMBINING
        yield character.encode("unicode_escape").decode("ascii") if hidden else character


def for_terminal(text: str, width: int = 80, style: str = "") -> Text:
    """Text for rich to print, in which nothing is markup, an emoji code or a terminal's escape sequence."""
    return Text(visible(text, width), style)


def visible_token(token: str, width: int = 24) -> str:
    """`visible`, and spaces shown as U+2423: `"␣king"`."""
    return visible(token, width).replace(" ", "␣")


def for_table_cell(text: str, width: int = 80) -> str:
    """Text as Markdown or HTML that shows it literally, in a cell of a table too: ASCII punctuation becomes HTML
    character references, which by CommonMark stand for no structure."""
    return "".join(map(_reference, visible(text, width), itertools.count()))


def _reference(character: str, place: int) -> str:
    plain = not character.isascii() or character.isalnum() or (place and character in HARMLESS_INSIDE)
    return character if plain else f"&#{ord(character)};"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in GitHub's Markdown. Cells are taken as they are: `for_table_cell` what others wrote."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


__all__ = ["for_table_cell", "for_terminal", "markdown_table", "visible", "visible_lines", "visible_token"]
