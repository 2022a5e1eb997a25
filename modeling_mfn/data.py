"""From text to windows of tokens of one length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from tqdm.auto import tqdm


def load_text(files: Sequence[str | Path]) -> Dataset:
    """Text files as a data set with one document a row. `ValueError` on a file that is missing or without text."""
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"{file} is no file; text is read from files")
    texts = load_dataset("text", data_files=[str(file) for file in files], split="train", sample_by="document")
    if not any(text.strip() for text in texts["text"]):
        raise ValueError(f"no text in {', '.join(map(str, files))}")
    return texts


def pack(texts: Dataset, tokenizer: Any, window: int) -> Dataset:
    """Tokenises documents, joins them with the end-of-text token between, and cuts windows.

    Args:
        texts: a data set with a column `text`.
        tokenizer: the model's tokenizer.
        window: T, tokens a row.

    Returns:
        A data set with the columns `input_ids` and `labels`, (T,) each. What is left over at the end is dropped.

    Raises:
        ValueError: if there is not enough text for one window.
    """
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for text in tqdm(texts["text"], "tokenising", unit="document", leave=False):
        stream += tokenizer(text, verbose=False)["input_ids"] + separator
    count = len(stream) // window
    if count == 0:
        raise ValueError(f"the text has {len(stream)} tokens, less than one window of {window}")
    rows = [stream[start : start + window] for start in range(0, count * window, window)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})
