"""Text from data sets in Markdown: shown as it is, never active."""

from __future__ import annotations

import itertools
import string
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

ALPHANUMERIC = frozenset(string.ascii_letters + string.digits)
HARMLESS_INSIDE = frozenset(" -,;'")
"""What means nothing to Markdown except, for some, where text begins."""
INVISIBLE = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
"""Unicode categories of what is not seen but acts: control characters, marks of writing direction, line separators."""


def visible(text: str, limit: int = 80) -> str:
    """One line of at most `limit` characters of the text, with characters that are not seen written as ⟨U+202E⟩."""
    shown = text[: limit - 1] + "…" if len(text) > limit else text
    return "".join(
        f"⟨U+{ord(character):04X}⟩" if unicodedata.category(character) in INVISIBLE else character
        for character in shown
    )


def escape(text: str, limit: int = 80) -> str:
    """`visible` text as Markdown that shows it literally, in a cell of a table too: ASCII punctuation becomes HTML
    character references, which by CommonMark stand for no structure."""
    return "".join(map(_reference, visible(text, limit), itertools.count()))


def _reference(character: str, place: int) -> str:
    plain = not character.isascii() or character in ALPHANUMERIC or (place and character in HARMLESS_INSIDE)
    return character if plain else f"&#{ord(character)};"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in GitHub's Markdown. Cells are taken as they are: `escape` what others wrote."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
