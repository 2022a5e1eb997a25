"""Text from data sets and models, made safe to show.

Files keep such text as it is. Everything that shows it calls a function of this module.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.text import Text

HARMLESS_INSIDE = frozenset(" -,;")
"""Characters that mean nothing in Markdown, except at the start of a text."""
MAX_COMBINING_MARKS = 4
"""Combining marks in a row that are shown as such. More of them would cover the lines above and below."""


def visible(text: str, width: int = 80) -> str:
    r"""Makes plain text of one line, cut to `width` characters; `…` marks a cut.

    Invisible characters are shown as Python escapes (`\n`, `\x1b`, `\u202e`): control and format characters, unusual
    spaces, right-to-left marks, and unassigned characters.
    """
    shown: list[str] = []
    length = 0
    for piece in _visible_characters(text[: width + 1]):  # escapes make it longer, never shorter
        if length + len(piece) > width:
            return "".join(shown) + "…"
        shown.append(piece)
        length += len(piece)
    return "".join(shown)


def visible_lines(text: str) -> str:
    r"""Makes plain text of any length. Line breaks (`\n`) stay; all else is escaped as `visible` does."""
    return "\n".join("".join(_visible_characters(line)) for line in text.split("\n"))


def _visible_characters(text: str) -> Iterator[str]:
    """Yields each character, or its escape."""
    marks = 0
    for character in text:
        marks = marks + 1 if unicodedata.combining(character) else 0
        hidden = not character.isprintable() or marks > MAX_COMBINING_MARKS
        yield character.encode("unicode_escape").decode("ascii") if hidden else character


def for_terminal(text: str, width: int = 80, style: str = "") -> Text:
    """Makes text for rich without markup, emoji codes or escape sequences of the terminal."""
    return Text(visible(text, width), style)


def visible_token(token: str, width: int = 24) -> str:
    """Makes a token `visible`, with spaces shown as U+2423: `"␣king"`."""
    return visible(token, width).replace(" ", "␣")


def for_table_cell(text: str, width: int = 80) -> str:
    """Makes Markdown, which is also HTML, that shows a text literally, even in a table.

    ASCII punctuation becomes HTML character references. By CommonMark these never form structure.
    """
    return "".join(map(_reference, visible(text, width), itertools.count()))


def _reference(character: str, place: int) -> str:
    plain = not character.isascii() or character.isalnum() or (place and character in HARMLESS_INSIDE)
    return character if plain else f"&#{ord(character)};"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Makes a table in GitHub's Markdown. Cells are not escaped: use `for_table_cell` for text of others."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


__all__ = ["for_table_cell", "for_terminal", "markdown_table", "visible", "visible_lines", "visible_token"]
