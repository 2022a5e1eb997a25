"""From text to windows of tokens of one length."""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from datasets import Dataset, IterableDataset, load_dataset, load_dataset_builder
from tqdm.auto import tqdm

LARGE = 2**27
"""Characters of text beyond which it is streamed rather than held in memory. For a data set on the Hub, also the bytes
of its download beyond which it is not downloaded as a whole."""
PIECE = 2**18
"""Characters, about, of a long document that make a row."""
TABLES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""Suffixes of files that are tables, and what reads them. All other files are plain text."""
NAME = re.compile(r"(?![^:]*\.[A-Za-z]\w*(:|$))\w[\w.-]*(/\w[\w.-]*)?(:[^:]+)?")
"""What can be the name of a data set, `name` or `owner/name`, with `:config` or without. A suffix says file."""


def load_text(sources: Sequence[str | Path], column: str = "text", split: str = "train") -> Dataset | IterableDataset:
    """Reads text from files, folders and data sets, one document after the other.

    Args:
        sources: each a file (plain text in UTF-8, which is one document, or a table: .json, .jsonl, .parquet, .csv), a
            folder, for all files below it that are not hidden, in the order of their names, or the name of a data set
            on the Hub, as `name` or `name:config`.
        column: the column of tables and data sets with a document a row. Rows without text are skipped.
        split: the split of data sets on the Hub.

    Returns:
        A data set with the columns `text` and `continues`; in memory, or streamed where there is more text than `LARGE`
        characters. A long document takes several rows of about `PIECE` characters, cut at line ends where it has any;
        `continues` is true on all of them but the last.

    Raises:
        ValueError: on a source that is missing, cannot be reached or read, is no text or lacks the column, and if there
            is no text in all of them. In the part of a stream beyond `LARGE`, once it gets there.
    """
    # a tuple, since `datasets` takes lists for shards whose order is free
    found = tuple(part for source in sources for part in text_parts(str(source)))
    stream = IterableDataset.from_generator(_rows, gen_kwargs={"sources": found, "column": column, "split": split})
    rows, length = [], 0
    for row in stream:
        rows.append(row)
        length += len(row["text"])
        if length > LARGE:
            return stream
    if not any(row["text"].strip() for row in rows):
        raise ValueError(f"no text in {', '.join(map(str, sources))}")
    return Dataset.from_list(rows)


def pack(texts: Dataset | IterableDataset, tokenizer: Any, window: int) -> Dataset | IterableDataset:
    """Tokenises documents, joins them with the end-of-text token between, and cuts windows.

    Args:
        texts: a data set with a column `text`, and `continues` where the next row belongs to the same document.
        tokenizer: the model's tokenizer.
        window: T, tokens a row.

    Returns:
        A data set with the columns `input_ids` and `labels`, (T,) each, streamed if `texts` is. What is left at the
        end is dropped.

    Raises:
        ValueError: if there is not enough text for one window.
    """
    if window < 2:
        raise ValueError(f"window is {window}; it must be at least 2, for a next token to be in it")
    if isinstance(texts, IterableDataset):
        kwargs = {"texts": texts, "tokenizer": tokenizer, "window": window}
        windows = IterableDataset.from_generator(_windows, gen_kwargs=kwargs)
        next(iter(windows))  # too little text is better known now than in the training
        return windows
    bar = tqdm(texts, "tokenising", unit="document", leave=False)
    ids = np.concatenate(list(_blocks(bar, tokenizer, window)))
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def check_window(window: int, config: Any) -> None:
    """`ValueError` for windows that are longer than what a model of this config has positions for."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and window > positions:
        raise ValueError(f"window is {window}; the model reads at most {positions} tokens (max_position_embeddings)")


def text_parts(source: str) -> list[Path | str]:
    """The files that a source stands for, or the name of a data set."""
    if os.path.isfile(source):
        return [Path(source)]
    if os.path.isdir(source):
        below = ((file, file.relative_to(source).parts) for file in sorted(Path(source).rglob("*")) if file.is_file())
        return [file for file, parts in below if not any(part.startswith(".") for part in parts)]
    if not NAME.fullmatch(source):
        raise ValueError(f"{source} is no file, no folder and no name of a data set (NAME or NAME:CONFIG)")
    return [source]


def _rows(sources: Sequence[Path | str], column: str, split: str) -> Iterator[dict[str, Any]]:
    for source in sources:
        try:
            for document in _documents(source, column, split):
                yield from _pieces(document)
        except Exception as error:  # of whatever kind the loaders and the Hub have; none of them names the source
            named = source if isinstance(source, Path) else f"data set {source} (there is no such file or folder)"
            raise ValueError(f"{named} cannot be read as text: {str(error) or type(error).__name__}") from error


def _documents(source: Path | str, column: str, split: str) -> Iterator[TextIO]:
    if isinstance(source, Path) and source.suffix.lower() not in TABLES:
        with open(source, encoding="utf-8") as document:
            yield document
    elif not isinstance(source, Path) or source.stat().st_size:  # the loaders fail on an empty file
        table = _table(source, split)
        columns = table.column_names or list(next(iter(table), {column: None}))
        if column not in columns:
            raise ValueError(f"it has no column {column!r}, only {', '.join(columns)}; choose with --text-column")
        for row in table.select_columns([column]):
            text = row[column]
            if not isinstance(text, str | None):
                raise ValueError(f"its column {column!r} holds {type(text).__name__}, not text")
            yield io.StringIO(text)


def _table(source: Path | str, split: str) -> Dataset | IterableDataset:
    if isinstance(source, Path):
        files = glob.escape(str(source))
        return load_dataset(TABLES[source.suffix.lower()], data_files=files, split="train", streaming=True)
    name, _, config = source.partition(":")
    builder = load_dataset_builder(name, config or None)
    if builder.repo_id is None:  # "json", say, would read all such files below the current folder
        raise ValueError("there is no such data set on the Hub")
    size = builder.info.download_size
    if size is None or size > LARGE:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _pieces(document: TextIO) -> Iterator[dict[str, Any]]:
    """A document in rows, none if it is empty. A line that is longer than a piece is cut as well."""
    text = document.read(PIECE) + document.readline(PIECE)
    while text:
        following = document.read(PIECE) + document.readline(PIECE)
        yield {"text": text, "continues": bool(following)}
        text = following


def _windows(texts: IterableDataset, tokenizer: Any, window: int) -> Iterator[dict[str, list[int]]]:
    for block in _blocks(texts, tokenizer, window):
        for ids in block.tolist():
            yield {"input_ids": ids, "labels": ids}


def _blocks(texts: Iterable[dict[str, Any]], tokenizer: Any, window: int) -> Iterator[np.ndarray]:
    """Windows in the order of the text, (N, T) int32 for varying N."""
    before, after = _special_tokens(tokenizer)
    none, inside = True, False
    rest = np.empty(0, np.int32)
    for rows in _batches(texts):
        encoded = tokenizer([row["text"] for row in rows], add_special_tokens=False, verbose=False)
        runs = [rest]
        for row, ids in zip(rows, encoded["input_ids"], strict=True):
            continues = row.get("continues", False)
            runs.append(np.array(([] if inside else before) + ids + ([] if continues else after), np.int32))
            inside = continues
        tokens = np.concatenate(runs)
        full = len(tokens) // window * window
        if full:
            none = False
            yield tokens[:full].reshape(-1, window)
        rest = tokens[full:]
    if none:
        raise ValueError(f"the text has {len(rest)} tokens, less than one window of {window}")


def _batches(texts: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Enough rows for a tokenizer to use all cores, and few enough for what it returns, 100 bytes a character."""
    rows: list[dict[str, Any]] = []
    length = 0
    for row in texts:
        rows.append(row)
        length += len(row["text"])
        if length >= 8 * PIECE:
            yield rows
            rows, length = [], 0
    if rows:
        yield rows


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What goes before and after a document: what the tokenizer puts there by itself, and the end-of-text token."""
    whole, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    start = next(start for start in range(len(whole) + 1) if whole[start : start + len(bare)] == bare)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return whole[:start], whole[start + len(bare) :] + end
