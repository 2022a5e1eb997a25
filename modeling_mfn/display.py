"""Text from data sets and models, made safe to show. Files keep it raw; whatever shows it goes through here."""

from __future__ import annotations

import unicodedata

from rich.text import Text

COMBINING = 4
"""Combining marks in a row that are shown as such; a pile of them covers the lines around."""


def visible(text: str, width: int = 80) -> str:
    r"""Plain text on one line, cut to `width` characters, with `…` where something is missing. What a reader does not
    see, or what moves other characters about, is shown as an escape of Python (`\n`, `\x1b`, `\u202e`): control and
    format characters, right-to-left marks among them, spaces but for the usual one, and what is unassigned."""
    shown: list[str] = []
    length, marks = 0, 0
    for character in text[: width + 1]:  # escapes make it longer, never shorter
        marks = marks + 1 if unicodedata.combining(character) else 0
        hidden = not character.isprintable() or marks > COMBINING
        piece = character.encode("unicode_escape").decode("ascii") if hidden else character
        if length + len(piece) > width:
            return "".join(shown) + "…"
        shown.append(piece)
        length += len(piece)
    return "".join(shown)


def for_terminal(text: str, width: int = 80, style: str = "") -> Text:
    """Text for rich to print, in which nothing is markup, an emoji code or a terminal's escape sequence."""
    return Text(visible(text, width), style)


def for_table_cell(text: str, width: int = 80) -> str:
    """Text for a cell of a Markdown or HTML table: every ASCII character that is no letter, digit or space is written
    as an HTML entity, which neither Markdown nor HTML takes for syntax."""
    return "".join(
        f"&#{ord(character)};" if character.isascii() and not (character.isalnum() or character == " ") else character
        for character in visible(text, width)
    )


__all__ = ["for_table_cell", "for_terminal", "visible"]
