"""Columns of an atlas as Python lists, without a Python object per cell of Arrow."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from .data_files import numbers


def offsets_of(lists: pa.ListArray) -> np.ndarray:
    """Returns the place, among all values, of the first value of each list, and the end of the last list."""
    return lists.offsets.to_numpy() - lists.offsets[0].as_py()


def one_array(column: pa.ChunkedArray) -> Any:
    """Returns a column as one array."""
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def short_numbers(column: pa.ChunkedArray) -> list[float | None]:
    """Returns the rounded numbers of a column; None for null."""
    return numbers(column.cast(pa.float64()).to_numpy())


def tuples(column: pa.ChunkedArray, *names: str) -> list[list[list[Any]]]:
    """Returns a column of lists of structs as lists of the values of some fields."""
    lists = one_array(column)
    structs = lists.flatten()
    values = list(map(list, zip(*(_values(structs.field(name)) for name in names), strict=True)))
    offsets = offsets_of(lists).tolist()
    return [values[start:end] for start, end in pairwise(offsets)]


def _values(array: pa.Array) -> list[Any]:
    return numbers(array.to_numpy()) if pa.types.is_floating(array.type) else list(array.to_pylist())


def filled(column: pa.ChunkedArray) -> list[list[list[int]]]:
    """Returns a column of lists of counts as lists of [place, count] of those that are not 0."""
    lists = one_array(column)
    offsets, counts = offsets_of(lists), lists.flatten().to_numpy()
    at = np.flatnonzero(counts)
    row = np.searchsorted(offsets, at, side="right") - 1
    pairs = np.stack([at - offsets[row], counts[at]], 1).tolist()
    ends = np.searchsorted(row, np.arange(len(lists) + 1)).tolist()
    return [pairs[start:end] for start, end in pairwise(ends)]


__all__ = ["filled", "offsets_of", "one_array", "short_numbers", "tuples"]
