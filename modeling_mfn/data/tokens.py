"""Tokens as text."""

from __future__ import annotations

from typing import Any


def token_text(tokenizer: Any, token: int) -> str:
    """A token as it stands in text. Bytes that are no whole character become U+FFFD."""
    text = tokenizer.decode([token])
    piece = tokenizer.convert_ids_to_tokens(token)
    # SentencePiece drops the space of a token that comes first
    if isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" "):
        text = f" {text}"
    return text.encode("utf-8", "replace").decode("utf-8")


def token_texts(tokenizer: Any) -> list[str]:
    """Of every token of the vocabulary."""
    return [token_text(tokenizer, token) for token in range(len(tokenizer))]


__all__ = [
    "token_text",
    "token_texts",
]
