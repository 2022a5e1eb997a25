"""Labels read from files of other tools: tables, JSON, and exports of Neuronpedia."""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...model.checks import shown
from ...model.feature_names import format_feature
from ...utils.display import visible
from ...utils.readers import parse_json, readable
from .labels import BELONGS_TO, Label

FORMATS = (".csv", ".json", ".jsonl")
LABEL_COLUMNS, FEATURE_COLUMNS = ("label", "description"), ("feature", "name")
"""Columns in which a label, and the name of its feature, may stand."""
MAX_BYTES = 2**26
"""Bytes of text in a file, unpacked if it is compressed: a small compressed file can hold any amount."""
MAX_NAME = 60
"""Characters kept of a feature's name in a file; a valid name is shorter."""


def read_label_file(file: str | os.PathLike[str]) -> list[Label]:
    """Reads the labels of a file, as source `imported`.

    A row names its feature by `feature` ("L6/1234"), or by `layer` and `index`. A layer may be written in the way of
    Neuronpedia, "6-res-jb". A row has a `label` or `description`, and it may have a `score`. Any other text or number
    of a row is kept in the label's details; a `source` is kept as `source_of_label`. If a feature has several rows, the
    one with the largest score becomes the label, or else the first. The texts of the others are its detail `others`.

    Args:
        file: .csv with a header, .json (a list of objects), or .jsonl (one object per line); also with .gz.

    Raises:
        ValueError: If a row cannot be read; the message names its place in the file.
    """
    path = Path(file)
    suffix = Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{file} is not a file of labels; it must end in {', '.join(FORMATS)}, or these and .gz")
    with readable(file), gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as opened:
        data = opened.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes of text, the most that is read; split it")
        text = data.decode("utf-8-sig")
    rows = {".csv": _csv_rows, ".json": _json_rows, ".jsonl": _json_lines}[suffix]
    by_feature: dict[str, list[Label]] = {}
    try:
        for place, row in rows(text):
            label = _label_at(place, row)
            by_feature.setdefault(label.feature, []).append(label)
    except ValueError as error:
        raise ValueError(f"{file}, {error}") from error
    if not by_feature:
        raise ValueError(f"{file} has no labels")
    return [_best_of(labels) for labels in by_feature.values()]


def _csv_rows(text: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = iter(reader)
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num + 1}: {error}") from error
        if row is None:
            return
        place = f"line {reader.line_num}"
        if None in row or None in row.values():
            raise ValueError(f"{place}: it does not have as many columns as the header, {len(reader.fieldnames or ())}")
        yield place, {name: value for name, value in row.items() if value != ""}


def _json_rows(text: str) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(parse_json(text, list[Any]), 1):
        yield f"entry {number}", row


def _json_lines(text: str) -> Iterator[tuple[str, Any]]:
    # not splitlines(), which breaks lines at characters that JSON allows inside a text
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = parse_json(line, Any)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            yield f"line {number}", row


def _label_at(place: str, row: Any) -> Label:
    try:
        return _label_of(row)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _label_of(row: Any) -> Label:
    if not isinstance(row, dict):
        raise ValueError(f"{str(row)[:60]!r} is not an object with names and values")
    text = next((row[name] for name in LABEL_COLUMNS if row.get(name) is not None), None)
    if text is None:
        raise ValueError(f"it has neither a label nor a description, only {', '.join(map(repr, row))[:200]}")
    taken = {*LABEL_COLUMNS, *FEATURE_COLUMNS, "layer", "index", "score", "source", BELONGS_TO}
    details = {name: value for name, value in row.items() if name not in taken and isinstance(value, str | int | float)}
    if row.get("source"):
        details["source_of_label"] = row["source"]
    return Label(_feature_of(row), text, "imported", _score_of(row), details)


def _feature_of(row: dict[str, Any]) -> str:
    name = next((row[key] for key in FEATURE_COLUMNS if isinstance(row.get(key), str)), None)
    if name is not None:
        return visible(name, MAX_NAME)
    if row.get("layer") is None or row.get("index") is None:
        raise ValueError('it names no feature; give feature ("L6/1234"), or layer and index')
    layer = re.fullmatch(r"([0-9]{1,18})(-.*)?", shown(row["layer"]).strip("'"))
    index = re.fullmatch(r"([0-9]{1,18})", shown(row["index"]).strip("'"))
    if layer is None or index is None:
        raise ValueError(
            f"layer {shown(row['layer'])} and index {shown(row['index'])} name no feature; they must be numbers"
        )
    return format_feature(int(layer[1]), int(index[1]))


def _score_of(row: dict[str, Any]) -> float | None:
    score = row.get("score")
    if score is None:
        return None
    try:
        return float(score)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"score is {shown(score)}; it must be a number") from None


def _best_of(labels: list[Label]) -> Label:
    """Joins the labels of one feature to the single one that an atlas holds per source."""
    best = max(labels, key=lambda label: -math.inf if label.score is None else label.score)
    others = [label.label for label in labels if label is not best]
    return replace(best, details={**best.details, "others": others}) if others else best


__all__ = ["read_label_file"]
