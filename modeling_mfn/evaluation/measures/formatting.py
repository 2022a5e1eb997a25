"""Formatting of a token as its text tells it: properties of the token itself, and of its place in a window.

Each function returns marks: `YES` where the property is there, `NO` where it is missing, `NEITHER` where the token says
nothing about it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

YES, NO, NEITHER = 1, 0, -1


def all_capitals(token: str) -> int:
    """Marks tokens in capitals, among tokens of two letters or more."""
    return (YES if token.isupper() else NO) if len(token) > 1 and token.isalpha() else NEITHER


def capitalised(token: str) -> int:
    """Marks tokens of which only the first letter is a capital, among tokens of two letters or more."""
    return (YES if token.istitle() else NO) if len(token) > 1 and token.isalpha() else NEITHER


def number(token: str) -> int:
    """Marks tokens of digits, among tokens of digits and tokens of letters."""
    return YES if token.isdecimal() else NO if token.isalpha() else NEITHER


def in_brackets(text: str) -> np.ndarray:
    """Marks characters within (), [] or {}, over line ends, too.

    Brackets themselves say nothing. Neither does text before a bracket that closes without having been opened: it may
    be in brackets that opened before the window. Text within further brackets is marked in any case.
    """
    characters = np.array(list(text))
    opens, closes = np.isin(characters, list("([{")), np.isin(characters, list(")]}"))
    depth = np.cumsum(opens.astype(int) - closes)
    unmatched = -np.minimum.accumulate(np.minimum(depth, 0))  # closing brackets so far that had not been opened
    outside = np.where(unmatched < unmatched.max(initial=0), NEITHER, NO)
    return np.where(opens | closes, NEITHER, np.where(depth + unmatched > 0, YES, outside))


def in_quotes(text: str) -> np.ndarray:
    """Marks characters within double quotes of one line.

    Quotes themselves say nothing. Neither does the rest of a line after a quote that does not end.
    """
    marks = np.full(len(text), NO)
    for match in re.finditer(r'(?m)"[^"\n]*("|$)', text):
        marks[match.start() : match.end()] = NEITHER
        if match[1]:
            marks[match.start() + 1 : match.end() - 1] = YES
    return _without_first_line(text, marks)


def starts_line(text: str) -> np.ndarray:
    """Marks the first character of each line that is not a space."""
    return _without_first_line(text, _in(text, r"(?m)^[^\S\n]*\S", last_only=True))


def in_indented_line(text: str) -> np.ndarray:
    """Marks characters of lines that start with a space or tab."""
    return _without_first_line(text, _in(text, r"(?m)^[ \t]+\S.*$"))


def before_punctuation(text: str) -> np.ndarray:
    """Marks words before punctuation, among words. The property is about the next token, not about the word."""
    marks = np.full(len(text), NEITHER)
    marks[_in(text, r"\w+(?=\W)") == YES] = NO  # the last word of a window may go on
    marks[_in(text, r"\w+(?=[,.;:!?])") == YES] = YES
    return marks


OF_TOKENS: dict[str, Callable[[str], int]] = {
    "all capitals": all_capitals,
    "capitalised": capitalised,
    "number": number,
}
"""Name -> function of the text of a token without the spaces around it."""

IN_CONTEXT: dict[str, Callable[[str], np.ndarray]] = {
    "in brackets": in_brackets,
    "in quotes": in_quotes,
    "starts a line": starts_line,
    "in an indented line": in_indented_line,
    "before punctuation": before_punctuation,
}
"""Name -> function of the text of a window, which marks each character."""


def marks_of_window(tokens: Sequence[str], mark: Callable[[str], np.ndarray]) -> np.ndarray:
    """(T,) mark of each token: the mark of its first character that is not a space, `NEITHER` if it has only spaces."""
    lengths = np.array([len(token) for token in tokens])
    first = np.array([len(token) - len(token.lstrip()) for token in tokens])
    blank = first == lengths
    marks = np.append(mark("".join(tokens)), NEITHER)
    return np.where(blank, NEITHER, marks[np.where(blank, -1, lengths.cumsum() - lengths + first)])


def _in(text: str, pattern: str, last_only: bool = False) -> np.ndarray:
    """Marks the characters that matches of a pattern cover, or only the last character of each match."""
    marks = np.full(len(text), NO)
    for match in re.finditer(pattern, text):
        marks[match.end() - 1 if last_only else match.start() : match.end()] = YES
    return marks


def _without_first_line(text: str, marks: np.ndarray) -> np.ndarray:
    """Takes the marks of the first line away, since a window may begin in the middle of a line."""
    end = text.find("\n")
    marks[: len(text) if end < 0 else end] = NEITHER
    return marks


__all__ = ["IN_CONTEXT", "NEITHER", "NO", "OF_TOKENS", "YES", "marks_of_window"]
