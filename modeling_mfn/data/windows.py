"""Windows of several texts for a harvest, each with the name of its text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from .text import load_text, pack, text_parts

Rows = dict[str, list[Any]]
"""Columns of a batch of windows."""


def sources_of(rows: Rows) -> list[str | None]:
    """The name of each window's source."""
    return rows.get("source", [None] * len(rows["input_ids"]))


def window_batches(dataset: Any, window: int, batch_size: int, limit: int | None) -> Iterator[Rows]:
    """Batches of the first `limit` windows."""
    columns = ("input_ids", "attention_mask", "source")
    if isinstance(dataset, Dataset):
        dataset = dataset.select_columns([name for name in columns if name in dataset.column_names])
        end = min(len(dataset), limit if limit is not None else len(dataset))
        batches: Iterable[Rows] = (dataset[at : min(at + batch_size, end)] for at in range(0, end, batch_size))
    else:
        rows = islice(dataset, limit)
        batches = (
            {name: [row[name] for row in chunk] for name in columns if name in chunk[0]}
            for chunk in iter(lambda: list(islice(rows, batch_size)), [])
        )
    for number, batch in enumerate(batches):
        for place, ids in enumerate(batch["input_ids"]):
            if len(ids) != window:
                raise ValueError(
                    f"row {number * batch_size + place} of the data has {len(ids)} tokens, the first has {window}; "
                    "pack text to windows of one length, or pad rows and give their attention_mask"
                )
        yield batch


def peek(dataset: Any) -> tuple[Any, int]:
    """The data, and how many tokens its first window has; a stream is not begun twice for it."""
    rows = iter(dataset)
    row = next(rows, None)
    if not isinstance(dataset, Dataset):
        dataset = chain([row], rows)
    if row is None or "input_ids" not in row:
        raise ValueError("the data has no rows with input_ids; modeling_mfn.data.pack makes windows of text")
    return dataset, len(row["input_ids"])


class TextWindows:
    """Windows of T tokens of several texts, one text after the other, that start anew with each iteration. Rows have
    `input_ids` (T,) and `source`: the name of the file, the folder or the data set, without the folders above it."""

    def __init__(
        self,
        texts: Sequence[str | Path],
        tokenizer: Any,
        window: int,
        tokens: int | None = None,
        column: str = "text",
        split: str = "train",
    ) -> None:
        """Text is read and tokenised as it is used. With `tokens`, each text gives an equal share of so many tokens, or
        all it has. The other arguments are those of `modeling_mfn.data`, whose errors are raised here, too."""
        self.limit = None if tokens is None else max(1, tokens // (window * len(texts)))
        self.settings = {
            "texts": [[source_name(text), text_size(text)] for text in texts],
            "tokens of all texts": tokens,
            "text column": column,
            "split": split,
        }
        """What the windows depend on beside the tokenizer, as JSON has it: a harvest is resumed with the same alone."""
        self._parts = []
        for text in texts:
            rows = load_text([text], column, split)
            streamed = rows.to_iterable_dataset() if isinstance(rows, Dataset) else rows
            self._parts.append((source_name(text), pack(streamed, tokenizer, window)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for source, rows in self._parts:
            for row in islice(rows, self.limit):
                yield {"input_ids": row["input_ids"], "source": source}


def source_name(text: str | Path) -> str:
    """What a text is called in an atlas, which may be shared: no path of this machine."""
    path = Path(text)
    return path.resolve().name if path.exists() else str(text)


def text_size(text: str | Path) -> int:
    """Bytes of a file, or of all files that are read of a folder; 0 of a data set on the Hub."""
    return sum(part.stat().st_size for part in text_parts(str(text)) if isinstance(part, Path))


Windows = Iterable[Mapping[str, Any]]
"""Rows with `input_ids` (T,), and `attention_mask` (T,) where they are padded: a `datasets.Dataset`, or any iterable of
such mappings. Rows of one batch have equal length."""


def batches(windows: Windows, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The windows as batches of `size`, the inputs of a model."""
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
    """The inputs of a model for windows (B, T) that are padded on either side, for which a token's code and logits are
    those that it has without padding."""
    # GPT-2 counts padding as tokens where it is not told otherwise, and reads other position embeddings then
    position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


__all__ = [
    "TextWindows",
    "Windows",
    "batches",
    "padded_inputs",
    "source_name",
    "text_size",
]
