"""Tokens as the text they stand for."""

from __future__ import annotations

from typing import Any

WORD_START = "\u2581"
"""Mark at the start of a word in a SentencePiece token."""


def checked_text(name: str, text: Any) -> str:
    """Returns a text that a tokenizer can read; `ValueError` for anything else, such as bytes that are not UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is of type {type(text).__name__}; it must be text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is {ascii(text)[:100]}; it must be text, in UTF-8") from error
    return text


def token_text(tokenizer: Any, token: int) -> str:
    """Text of one token as it stands inside a text. Bytes that are not a whole character become U+FFFD."""
    text = tokenizer.decode([token])
    piece = tokenizer.convert_ids_to_tokens(token)
    # SentencePiece drops the space of a token that comes first
    if isinstance(piece, str) and piece.startswith(WORD_START) and not text.startswith(" "):
        text = f" {text}"
    return text.encode("utf-8", "replace").decode("utf-8")


def token_texts(tokenizer: Any) -> list[str]:
    """Text of every token of the vocabulary, by id."""
    return [token_text(tokenizer, token) for token in range(len(tokenizer))]


__all__ = ["checked_text", "token_text", "token_texts"]
