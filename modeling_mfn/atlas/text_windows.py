"""Windows of several texts for a harvest, each with the name of its text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data import load_text, pack, text_parts


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


__all__ = ["TextWindows", "source_name", "text_size"]
