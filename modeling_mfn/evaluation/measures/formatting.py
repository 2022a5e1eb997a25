"""What can be said of a token's form from the text alone: of the token itself, and of where it stands.

Each function marks what it reads with 1 (it has it), 0 (it has not) or -1 (it says nothing).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

YES, NO, NEITHER = 1, 0, -1


def all_capitals(token: str) -> int:
    """Among tokens of two letters or more."""
    return (YES if token.isupper() else NO) if len(token) > 1 and token.isalpha() else NEITHER


def capitalised(token: str) -> int:
    """Among tokens of two letters or more, the first one a capital and the rest not."""
    return (YES if token.istitle() else NO) if len(token) > 1 and token.isalpha() else NEITHER


def number(token: str) -> int:
    """Digits, against letters."""
    return YES if token.isdecimal() else NO if token.isalpha() else NEITHER


def in_brackets(text: str) -> np.ndarray:
    """Within (), [] or {}, also of several lines. Brackets themselves say nothing, nor does what is before one that
    closes without having been opened, unless other brackets are around it: they may be open from before the text."""
    characters = np.array(list(text))
    opens, closes = np.isin(characters, list("([{")), np.isin(characters, list(")]}"))
    depth = np.cumsum(opens.astype(int) - closes)
    unmatched = -np.minimum.accumulate(np.minimum(depth, 0))  # those that had closed by then
    outside = np.where(unmatched < unmatched.max(initial=0), NEITHER, NO)
    return np.where(opens | closes, NEITHER, np.where(depth + unmatched > 0, YES, outside))


def in_quotes(text: str) -> np.ndarray:
    """Within double quotes of one line; quotes themselves say nothing, nor does what follows one that does not end."""
    marks = np.full(len(text), NO)
    for match in re.finditer(r'(?m)"[^"\n]*("|$)', text):
        marks[match.start() : match.end()] = NEITHER
        if match[1]:
            marks[match.start() + 1 : match.end() - 1] = YES
    return _without_first_line(text, marks)


def starts_line(text: str) -> np.ndarray:
    """The first character of a line that is no space."""
    return _without_first_line(text, _in(text, r"(?m)^[^\S\n]*\S", last_only=True))


def in_indented_line(text: str) -> np.ndarray:
    """In a line that starts with a space or tab."""
    return _without_first_line(text, _in(text, r"(?m)^[ \t]+\S.*$"))


def before_punctuation(text: str) -> np.ndarray:
    """A word that punctuation follows, among words: what comes next, not what is there."""
    marks = np.full(len(text), NEITHER)
    marks[_in(text, r"\w+(?=\W)") == YES] = NO  # the last word may go on
    marks[_in(text, r"\w+(?=[,.;:!?])") == YES] = YES
    return marks


OF_TOKENS: dict[str, Callable[[str], int]] = {
    "all capitals": all_capitals,
    "capitalised": capitalised,
    "number": number,
}
"""Name -> function of a token's text, without spaces around it."""

IN_CONTEXT: dict[str, Callable[[str], np.ndarray]] = {
    "in brackets": in_brackets,
    "in quotes": in_quotes,
    "starts a line": starts_line,
    "in an indented line": in_indented_line,
    "before punctuation": before_punctuation,
}
"""Name -> function of a window's text, which marks each character."""


def marks_of_window(tokens: Sequence[str], mark: Callable[[str], np.ndarray]) -> np.ndarray:
    """(T,) marks of a window's tokens: that of the first character which is no space; -1 for spaces alone."""
    lengths = np.array([len(token) for token in tokens])
    first = np.array([len(token) - len(token.lstrip()) for token in tokens])
    blank = first == lengths
    marks = np.append(mark("".join(tokens)), NEITHER)
    return np.where(blank, NEITHER, marks[np.where(blank, -1, lengths.cumsum() - lengths + first)])


def _in(text: str, pattern: str, last_only: bool = False) -> np.ndarray:
    """Marks of the characters that matches of a pattern cover, or of the last one of each."""
    marks = np.full(len(text), NO)
    for match in re.finditer(pattern, text):
        marks[match.end() - 1 if last_only else match.start() : match.end()] = YES
    return marks


def _without_first_line(text: str, marks: np.ndarray) -> np.ndarray:
    """A window may begin in the middle of a line."""
    end = text.find("\n")
    marks[: len(text) if end < 0 else end] = NEITHER
    return marks


__all__ = ["IN_CONTEXT", "OF_TOKENS", "marks_of_window"]
