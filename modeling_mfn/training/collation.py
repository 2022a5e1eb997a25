"""Batches of rows that need no padding."""

from __future__ import annotations

from typing import Any

from transformers import default_data_collator


def collate_without_padding(rows: list[Any]) -> dict[str, Any]:
    """Makes a batch of rows of one length, such as packed windows.

    Raises:
        ValueError: If rows differ in length.
    """
    try:
        batch: dict[str, Any] = default_data_collator(rows)
    except ValueError as error:
        raise ValueError(
            "rows differ in length, and the tokenizer has no padding token; set tokenizer.pad_token, or give "
            f"data_collator ({error})"
        ) from error
    return batch


__all__ = ["collate_without_padding"]
