"""From text to windows of tokens: reads files, folders and data sets, tokenises them, and cuts rows of one length."""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from datasets import Dataset, IterableDataset, load_dataset, load_dataset_builder
from tqdm.auto import tqdm

STREAM_ABOVE = 2**27
"""Characters of text beyond which it is streamed and no longer held in memory. Also bytes of a download from the Hub
beyond which a data set is not downloaded as a whole."""
ROW_LENGTH = 2**6
"""Characters that a row counts for on top of its text, as millions of tiny rows take memory, too."""
PIECE_LENGTH = 2**18
"""Approximate number of characters in one row of a long document."""
TOKENISED_AT_ONCE = 8 * PIECE_LENGTH
"""Characters per call of the tokenizer: enough to use all cores, and few enough for its output of some 100 bytes per
character."""
TABLE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""Suffix of a table -> the loader in `datasets` that reads it. Every other file is plain text."""
DATA_SET_NAME = re.compile(r"(?![^:]*\.[A-Za-z]\w*(:|$))\w[\w.-]*(/\w[\w.-]*)?(:[^:]+)?")
"""`name` or `owner/name`, with or without `:config`. A name with a suffix is taken for a missing file."""


def load_text(sources: Sequence[str | Path], column: str = "text", split: str = "train") -> Dataset | IterableDataset:
    """Reads text from files, folders and data sets, one document after the other.

    Args:
        sources: Files, folders or data sets. A file is one document of plain text in UTF-8, or a table (.json, .jsonl,
            .parquet, .csv) with one document per row. A folder stands for all files below it that are not hidden, in
            the order of their names. A data set on the Hub is given as `name` or `name:config`.
        column: Column of tables and data sets that holds the documents. Rows without text are skipped.
        split: Split of data sets on the Hub.

    Returns:
        A data set with the columns `text` and `continues`. It is in memory up to `STREAM_ABOVE` characters, and
        streamed beyond. A long document takes several rows of about `PIECE_LENGTH` characters, cut at line ends where
        there are any. `continues` is true on all of its rows but the last.

    Raises:
        ValueError: If a source is missing, cannot be reached or read, is not text, or lacks the column. Also if there
            is no text in any source. A streamed source may raise it later, when the stream gets to the damage.
    """
    if isinstance(sources, str | Path) or not isinstance(sources, Iterable):
        raise ValueError(f"sources is of type {type(sources).__name__}; give a list of files, folders and data sets")
    # a tuple, because `datasets` takes a list for shards that may come in any order
    parts = tuple(part for source in sources for part in source_parts(str(source)))
    stream = IterableDataset.from_generator(_rows, gen_kwargs={"parts": parts, "column": column, "split": split})
    rows, length = [], 0
    for row in stream:
        rows.append(row)
        length += len(row["text"]) + ROW_LENGTH
        if length > STREAM_ABOVE:
            return stream
    if not any(row["text"].strip() for row in rows):
        raise ValueError(f"no text in {', '.join(map(str, sources))}")
    return Dataset.from_list(rows)


def pack(texts: Dataset | IterableDataset, tokenizer: Any, window: int) -> Dataset | IterableDataset:
    """Tokenises documents, joins them with the end-of-text token between, and cuts the tokens into windows.

    Args:
        texts: Data set with a column `text`, and `continues` where the next row belongs to the same document.
        tokenizer: The model's tokenizer.
        window: T, tokens per row.

    Returns:
        A data set with the columns `input_ids` and `labels`, (T,) each, streamed if `texts` is. Tokens left over at the
        end are dropped.

    Raises:
        ValueError: If there is not enough text for one window.
    """
    if not isinstance(window, int) or window < 2:
        raise ValueError(f"window is {window}; it must be a whole number of at least 2, so that it holds a next token")
    if not isinstance(texts, Dataset | IterableDataset):
        raise ValueError(f"texts is of type {type(texts).__name__}; it must be a data set, as load_text makes it")
    if texts.column_names is not None and "text" not in texts.column_names:
        raise ValueError(f"texts have no column text, only {', '.join(texts.column_names)}; load_text makes it")
    if isinstance(texts, IterableDataset):
        kwargs = {"texts": texts, "tokenizer": tokenizer, "window": window}
        windows = IterableDataset.from_generator(_window_rows, gen_kwargs=kwargs)
        next(iter(windows))  # reports too little text now, not in the middle of a training
        return windows
    bar = tqdm(texts, "tokenising", unit="document", leave=False)
    ids = np.concatenate(list(_window_blocks(bar, tokenizer, window)))
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def check_window(window: int, config: Any) -> None:
    """Checks that windows are no longer than a model's context; raises `ValueError` if they are.

    Args:
        window: T, tokens per row.
        config: The model's config; `max_position_embeddings` is the limit, where it has one.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and window > positions:
        raise ValueError(f"window is {window}; the model reads at most {positions} tokens (max_position_embeddings)")


class TextWindows:
    """Windows of several texts, one text after the other, each row with the name of its text.

    Rows have `input_ids` (T,) and `source`: the name of the file, folder or data set, without the folders above it.
    Every iteration starts anew. Text is read and tokenised as it is used, so that memory does not grow with it.
    """

    def __init__(
        self,
        texts: Sequence[str | Path],
        tokenizer: Any,
        window: int,
        tokens: int | None = None,
        column: str = "text",
        split: str = "train",
    ) -> None:
        """Opens the texts.

        Args:
            texts: Files, folders and data sets, as for `load_text`.
            tokenizer: The model's tokenizer.
            window: T, tokens per row.
            tokens: Tokens to take in all, in equal shares. A text that has fewer gives all it has. By default every
                text is read to its end.
            column: Column of tables and data sets that holds the documents.
            split: Split of data sets on the Hub.

        Raises:
            ValueError: As `load_text` and `pack` raise it.
        """
        self.limit = None if tokens is None else max(1, tokens // (window * len(texts)))
        self.settings = {
            "texts": [[source_name(text), source_size(text)] for text in texts],
            "tokens of all texts": tokens,
            "text column": column,
            "split": split,
        }
        """All that the windows depend on besides the tokenizer, as JSON. A harvest resumes only with equal settings."""
        self._parts = []
        for text in texts:
            rows = load_text([text], column, split)
            streamed = rows.to_iterable_dataset() if isinstance(rows, Dataset) else rows
            self._parts.append((source_name(text), pack(streamed, tokenizer, window)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for source, rows in self._parts:
            for row in islice(rows, self.limit):
                yield {"input_ids": row["input_ids"], "source": source}


def source_parts(source: str) -> list[Path | str]:
    """Lists the files that a source stands for, or the name of a data set; raises `ValueError` if it is neither."""
    if os.path.isfile(source):
        return [Path(source)]
    if os.path.isdir(source):
        below = ((file, file.relative_to(source).parts) for file in sorted(Path(source).rglob("*")) if file.is_file())
        return [file for file, parts in below if not any(part.startswith(".") for part in parts)]
    if not DATA_SET_NAME.fullmatch(source):
        raise ValueError(f"{source} is not a file, a folder or the name of a data set (NAME or NAME:CONFIG)")
    return [source]


def source_name(source: str | Path) -> str:
    """Name of a source in an atlas. An atlas may be shared, so the name contains no local path."""
    path = Path(source)
    return path.resolve().name if path.exists() else str(source)


def source_size(source: str | Path) -> int:
    """Bytes of a file, or of all files of a folder that are read; 0 for a data set on the Hub."""
    return sum(part.stat().st_size for part in source_parts(str(source)) if isinstance(part, Path))


def _rows(parts: Sequence[Path | str], column: str, split: str) -> Iterator[dict[str, Any]]:
    for part in parts:
        try:
            for document in _documents(part, column, split):
                yield from _pieces(document)
        except Exception as error:  # loaders and the Hub raise many kinds, and none of them names the source
            named = part if isinstance(part, Path) else f"data set {part} (there is no such file or folder)"
            raise ValueError(f"{named} cannot be read as text: {str(error) or type(error).__name__}") from error


def _documents(part: Path | str, column: str, split: str) -> Iterator[TextIO]:
    if isinstance(part, Path) and part.suffix.lower() not in TABLE_FORMATS:
        with open(part, encoding="utf-8-sig") as document:  # a byte order mark is not text
            yield document
    elif not isinstance(part, Path) or part.stat().st_size:  # the loaders fail on an empty file
        table = _open_table(part, split)
        columns = table.column_names or list(next(iter(table), {column: None}))
        if column not in columns:
            raise ValueError(f"it has no column {column!r}, only {', '.join(columns)}; choose with --text-column")
        for row in table.select_columns([column]):
            text = row[column]
            if not isinstance(text, str | None):
                raise ValueError(f"its column {column!r} holds {type(text).__name__}, not text")
            yield io.StringIO(text)


def _open_table(part: Path | str, split: str) -> Dataset | IterableDataset:
    if isinstance(part, Path):
        files = glob.escape(str(part))
        return load_dataset(TABLE_FORMATS[part.suffix.lower()], data_files=files, split="train", streaming=True)
    name, _, config = part.partition(":")
    builder = load_dataset_builder(name, config or None)
    if builder.repo_id is None:  # a loader's own name: "json" would read all such files below the current folder
        raise ValueError("there is no such data set on the Hub")
    size = builder.info.download_size
    if size is None or size > STREAM_ABOVE:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _pieces(document: TextIO) -> Iterator[dict[str, Any]]:
    """Cuts a document into rows; none if it is empty. A line longer than a piece is cut, too."""
    text = document.read(PIECE_LENGTH) + document.readline(PIECE_LENGTH)
    while text:
        following = document.read(PIECE_LENGTH) + document.readline(PIECE_LENGTH)
        yield {"text": text, "continues": bool(following)}
        text = following


def _window_rows(texts: IterableDataset, tokenizer: Any, window: int) -> Iterator[dict[str, list[int]]]:
    for block in _window_blocks(texts, tokenizer, window):
        for ids in block.tolist():
            yield {"input_ids": ids, "labels": ids}


def _window_blocks(texts: Iterable[dict[str, Any]], tokenizer: Any, window: int) -> Iterator[np.ndarray]:
    """Yields windows in the order of the text, (N, T) int32 for varying N."""
    before, after = _special_tokens(tokenizer)
    any_window, inside_document = False, False
    rest = np.empty(0, np.int32)
    for rows in _tokenizer_batches(texts):
        encoded = tokenizer([row["text"] for row in rows], add_special_tokens=False, verbose=False)
        runs = [rest]
        for row, ids in zip(rows, encoded["input_ids"], strict=True):
            continues = row.get("continues", False)
            runs.append(np.array(([] if inside_document else before) + ids + ([] if continues else after), np.int32))
            inside_document = continues
        tokens = np.concatenate(runs)
        full = len(tokens) // window * window
        if full:
            any_window = True
            yield tokens[:full].reshape(-1, window)
        rest = tokens[full:]
    if not any_window:
        raise ValueError(f"the text has {len(rest)} tokens, less than one window of {window}")


def _tokenizer_batches(texts: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Groups rows until they have `TOKENISED_AT_ONCE` characters."""
    rows: list[dict[str, Any]] = []
    length = 0
    for row in texts:
        rows.append(row)
        length += len(row["text"])
        if length >= TOKENISED_AT_ONCE:
            yield rows
            rows, length = [], 0
    if rows:
        yield rows


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens before and after a document: those that the tokenizer adds on its own, and one end-of-text token.

    A tokenizer that begins a text with the end-of-text token puts it between documents, too.
    """
    whole, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    start = next((start for start in range(len(whole) + 1) if whole[start : start + len(bare)] == bare), None)
    if start is None:
        raise ValueError(
            f"{type(tokenizer).__name__} tokenises text in another way between special tokens; use another"
        )
    before, after = whole[:start], whole[start + len(bare) :]
    end = tokenizer.eos_token_id
    return before, after if end is None or end in before + after else [*after, end]


__all__ = ["TextWindows", "check_window", "load_text", "pack"]
