"""Windows of tokens in batches, as a model reads them.

A window is a row of tokens, mostly of one length T. `input_batches` makes tensors for a model's forward.
`column_batches` keeps lists with the source of each window, for a harvest that counts windows and their sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

Windows = Iterable[Mapping[str, Any]]
"""Rows with `input_ids` (T,), and `attention_mask` (T,) where they are padded: a `datasets.Dataset`, or any iterable of
such mappings. Rows of one batch have equal length."""
Columns = dict[str, list[Any]]
"""A batch of windows by column: `input_ids`, and `attention_mask` and `source` where the data has them."""


def input_batches(windows: Windows, size: int) -> Iterator[dict[str, Tensor]]:
    """Yields batches of up to `size` windows as the keyword arguments of a model's forward.

    Raises:
        ValueError: If windows of one batch differ in length.
    """
    rows = iter(windows)
    while batch := list(islice(rows, size)):
        lengths = {len(row["input_ids"]) for row in batch}
        if len(lengths) > 1:
            raise ValueError(
                f"windows of one batch have lengths {sorted(lengths)}; pad them to one, or use batch_size=1"
            )
        names = [name for name in ("input_ids", "attention_mask") if name in batch[0]]
        inputs = {name: torch.tensor(np.array([row[name] for row in batch]), dtype=torch.long) for name in names}
        yield padded_inputs(**inputs) if "attention_mask" in inputs else inputs


def padded_inputs(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """Model inputs for windows (B, T) padded on either side; codes and logits are those of unpadded windows."""
    # GPT-2 would otherwise count padding as tokens and read later position embeddings
    position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


def first_length(windows: Any) -> tuple[Any, int]:
    """Looks at the first window without losing it.

    Returns:
        The windows, to be used instead of those given, since a stream cannot be started twice; and T, the length of the
        first.

    Raises:
        ValueError: If there is no window.
    """
    rows = iter(windows)
    row = next(rows, None)
    if not isinstance(windows, Dataset):
        windows = chain([row], rows)
    if row is None or "input_ids" not in row:
        raise ValueError("the data has no rows with input_ids; modeling_mfn.pack makes windows of text")
    return windows, len(row["input_ids"])


def column_batches(windows: Any, length: int, batch_size: int, limit: int | None) -> Iterator[Columns]:
    """Yields batches of the first `limit` windows by column.

    Raises:
        ValueError: If a window does not have `length` tokens.
    """
    columns = ("input_ids", "attention_mask", "source")
    if isinstance(windows, Dataset):
        windows = windows.select_columns([name for name in columns if name in windows.column_names])
        end = min(len(windows), limit if limit is not None else len(windows))
        batches: Iterable[Columns] = (windows[at : min(at + batch_size, end)] for at in range(0, end, batch_size))
    else:
        rows = islice(windows, limit)
        batches = (
            {name: [row[name] for row in chunk] for name in columns if name in chunk[0]}
            for chunk in iter(lambda: list(islice(rows, batch_size)), [])
        )
    for number, batch in enumerate(batches):
        for place, ids in enumerate(batch["input_ids"]):
            if len(ids) != length:
                raise ValueError(
                    f"row {number * batch_size + place} of the data has {len(ids)} tokens, the first has {length}; "
                    "pack text to windows of one length, or pad rows and give their attention_mask"
                )
        yield batch


def sources_of(batch: Columns) -> list[str | None]:
    """Name of each window's source; `None` where the data has none."""
    return batch.get("source", [None] * len(batch["input_ids"]))


__all__ = ["Columns", "Windows", "column_batches", "first_length", "input_batches", "padded_inputs", "sources_of"]
