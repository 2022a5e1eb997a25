"""Text of tokens that come one by one, when a character may need several of them."""

from __future__ import annotations

from typing import Any

UNFINISHED = "\ufffd"
"""Character that stands for bytes which are not a whole character yet."""


class TokenPieces:
    """Splits the text of a generation into one piece per token.

    The pieces join to what the tokenizer's `decode` adds to the prompt. Tokens that begin a character wait until a
    later token ends it. The last of them has the character, the others have empty pieces.
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._told = len(self._text())
        self._waiting: list[int] = []

    def add(self, token: int) -> list[tuple[int, str]]:
        """Takes the next token; returns the tokens whose text is known now, with their texts."""
        self._ids.append(token)
        self._waiting.append(token)
        text = self._text()
        return [] if text.endswith(UNFINISHED) and len(text) > self._told else self._told_now(text)

    def rest(self) -> list[tuple[int, str]]:
        """Returns the tokens that still wait."""
        return self._told_now(self._text()) if self._waiting else []

    def _told_now(self, text: str) -> list[tuple[int, str]]:
        *before, last = self._waiting
        piece = text[self._told :]
        self._told, self._waiting = len(text), []
        return [*((token, "") for token in before), (last, piece)]

    def _text(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


__all__ = ["TokenPieces"]
