"""Folder `features/` of an atlas: written whole or not at all, read from a folder or from the Hub."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from ...utils.files import (
    begin_unfinished,
    check_space,
    is_filled,
    replace_folder,
    trace_of_replacement,
    write_whole,
)
from ...utils.ours import ATLAS, check_ours
from ...utils.readers import checked, parse_json, readable
from .labels import BELONGS_TO, Label, Labels
from .schema import (
    EXAMPLES,
    EXAMPLES_FILE,
    FEATURES,
    FEATURES_FILE,
    FOLDER,
    HARVEST_FILES,
    LABELS_FILE,
    METADATA_FILE,
    SCHEMA_VERSION,
    check_schema,
)

ROWS_PER_GROUP = 2**15
"""Rows of a Parquet file that are read together."""
MIN_BYTES_PER_ROW, MAX_VALUES_PER_BYTE = 2, 32
"""Limits of tables that are read. A harvest without a single firing is 4 times above the first and half the second."""


class _Model(TypedDict):
    """Fields of `atlas.json` about the model."""

    layers: list[int]
    num_features: int


class _Source(TypedDict):
    """Fields of `atlas.json` about a source of text."""

    name: str | None
    tokens: int


class _Data(TypedDict):
    """Fields of `atlas.json` about the text."""

    sources: list[_Source]
    tokens: int
    skip_first: int


class _Figures(TypedDict):
    """Fields of `atlas.json` about a layer."""

    logit_scale: float


class _Metadata(TypedDict):
    """Part of `atlas.json` that is read."""

    model: _Model
    data: _Data
    layers: dict[str, _Figures]


class AtlasNotFoundError(ValueError):
    """Error for a folder or repository that exists but has no atlas."""


def find_folder(folder_or_repo: str | os.PathLike[str], revision: str | None = None, token: Any = None) -> Path:
    """Finds the folder with an atlas' files: the given one, `features/` in it, or that of a repository on the Hub.

    Nothing but `features/` is downloaded from a repository.

    Raises:
        AtlasNotFoundError: If the folder or repository has no atlas.
        ValueError: If the repository cannot be read.
    """
    given = Path(folder_or_repo)
    if given.is_dir():
        for folder in (given / FOLDER, given):
            if (folder / METADATA_FILE).is_file():
                return folder
        if trace := trace_of_replacement(given / FOLDER):
            raise ValueError(trace)
        raise AtlasNotFoundError(f"{given} has no {FOLDER}/{METADATA_FILE}; the command `mfn atlas` writes an atlas")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        downloaded = snapshot_download(
            str(folder_or_repo), revision=revision, token=token, allow_patterns=f"{FOLDER}/*"
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{folder_or_repo} is not a folder, nor a repository that can be read: {error}") from error
    if not (Path(downloaded) / FOLDER / METADATA_FILE).is_file():
        raise AtlasNotFoundError(
            f"repository {folder_or_repo} has no {FOLDER}/{METADATA_FILE}: there is no atlas in it"
        )
    return Path(downloaded) / FOLDER


def write_atlas(folder: Path, metadata: dict[str, Any], features: pa.Table, examples: pa.Table, labels: Labels) -> None:
    """Writes `folder/features/`; an earlier atlas there stays until the new one is complete."""
    check_atlas_folder(folder)
    made = begin_unfinished(folder / FOLDER)
    try:
        pq.write_table(features, made / FEATURES_FILE, compression="zstd", row_group_size=ROWS_PER_GROUP)
        pq.write_table(examples, made / EXAMPLES_FILE, compression="zstd", row_group_size=ROWS_PER_GROUP)
        write_labels(made / LABELS_FILE, labels, features_of(metadata))
        (made / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        replace_folder(made, folder / FOLDER)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def check_atlas_folder(folder: Path) -> None:
    """Checks that an atlas can be written into a folder.

    Raises:
        ValueError: If the folder is a file, its `features/` holds files that are not an atlas', or an earlier
            replacement was interrupted.
        OSError: If the folder is read-only, or the disk is full.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; the output must be a folder")
    if not (folder / FOLDER).exists() and (trace := trace_of_replacement(folder / FOLDER)):
        raise ValueError(trace)
    if is_filled(folder / FOLDER):
        check_ours(folder / FOLDER, ATLAS)
    check_space(folder)


def remove_harvest(folder: Path) -> None:
    """Removes the states of a harvest from their folder, and the folder if nothing else is in it."""
    for file in (*folder.glob(HARVEST_FILES), *folder.glob(f".{HARVEST_FILES}.part")):
        file.unlink(missing_ok=True)
    if folder.is_dir() and not is_filled(folder):
        folder.rmdir()


def write_labels(file: Path, labels: Labels, features: str | None) -> None:
    """Writes labels as a JSON list of flat objects, one per line; the file is replaced as a whole.

    Args:
        file: File `labels.json` of an atlas.
        labels: Labels of the atlas.
        features: Name of its features, if it has one. Each label says it.
    """
    belongs = {BELONGS_TO: features} if features else {}
    lines = ",\n".join(json.dumps(label.to_record() | belongs) for label in labels)
    write_whole(file, f"[\n{lines}\n]\n" if lines else "[]\n")


def read_labels(file: Path, features: str | None = None) -> Labels:
    """Reads a file that `write_labels` wrote; no labels if there is no such file.

    Args:
        file: File `labels.json` of an atlas.
        features: Name of the features that the labels must be of. Labels of earlier versions do not say.

    Raises:
        ValueError: If the file is damaged, or a label is of other features.
    """
    if not file.exists():
        return Labels()
    with readable(file):
        records = parse_json(file.read_bytes(), list[dict[str, Any]])
        for record in records:
            theirs = record.get(BELONGS_TO)
            if theirs and features and theirs != features:
                raise ValueError(
                    f"its labels are of the features {theirs}, the atlas is of the features {features}; move the file "
                    "away, and import its labels (mfn atlas --labels) if they fit"
                )
        return Labels(map(Label.from_record, records))


def features_of(metadata: dict[str, Any]) -> str | None:
    """Returns the name of the features that an atlas is of; `None` for an atlas of an earlier version."""
    name: str | None = metadata["model"].get("features_digest")
    return name


def read_metadata(folder: Path) -> dict[str, Any]:
    """Reads `atlas.json`; raises `ValueError` if it is damaged or its schema is newer than this package."""
    file = folder / METADATA_FILE
    with readable(file):
        metadata = parse_json(file.read_bytes(), dict[str, Any])
        version = metadata.get("schema_version")
        if not isinstance(version, int):
            raise ValueError("it has no schema_version, so it is not of an atlas")
        if version > SCHEMA_VERSION:
            raise ValueError(
                f"it has schema version {version}, newer than {SCHEMA_VERSION}, which this package reads; upgrade "
                "modeling_mfn"
            )
        known = checked(metadata, _Metadata)
        figures, layers = known["layers"], known["model"]["layers"]
        if sorted(figures) != sorted(map(str, layers)):
            raise ValueError(f"it has figures of layers {', '.join(figures)}; the model's are {layers}")
    return metadata


def read_features(folder: Path) -> pa.Table:
    """Reads `features.parquet`."""
    return _read_table(folder / FEATURES_FILE, FEATURES)


def read_examples(folder: Path) -> pa.Table:
    """Reads `examples.parquet`."""
    return _read_table(folder / EXAMPLES_FILE, EXAMPLES)


def example_tables(folder: Path) -> Iterator[pa.Table]:
    """Yields the groups of rows of `examples.parquet`, one after the other."""
    file = folder / EXAMPLES_FILE
    with readable(file):
        check_size(file)
        opened = pq.ParquetFile(file)
    for group in range(opened.num_row_groups):
        with readable(file):
            table = check_schema(opened.read_row_group(group), EXAMPLES)
        yield table


def _read_table(file: Path, schema: pa.Schema) -> pa.Table:
    with readable(file):
        check_size(file)
        return check_schema(pq.read_table(file), schema)


def check_size(file: Path) -> None:
    """Raises `ValueError` if a Parquet file holds far more than a file of its size can say."""
    found, size = pq.ParquetFile(file).metadata, file.stat().st_size
    groups = range(found.num_row_groups)
    values = (sum(found.row_group(g).column(c).num_values for g in groups) for c in range(found.num_columns))
    most, rows = max(values, default=0), found.num_rows
    if rows > size // MIN_BYTES_PER_ROW or most > size * MAX_VALUES_PER_BYTE:
        raise ValueError(
            f"it has {rows} rows and {most} values in {size} bytes; a table of an atlas takes at least "
            f"{MIN_BYTES_PER_ROW} bytes per row, and one per {MAX_VALUES_PER_BYTE} values"
        )


__all__ = [
    "AtlasNotFoundError",
    "check_atlas_folder",
    "check_size",
    "example_tables",
    "features_of",
    "find_folder",
    "read_examples",
    "read_features",
    "read_labels",
    "read_metadata",
    "remove_harvest",
    "write_atlas",
    "write_labels",
]
