"""Files and folders that are either as they were or complete, whenever the process that writes them is killed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_json(file: Path) -> dict[str, Any] | None:
    """What a JSON file holds, `None` where there is none."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}; it must be an object")
    return found


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes beside the file, text in UTF-8, then in its place."""
    beside = file.with_name(f".{file.name}.part")
    beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(beside, file)


def check_output(output: Path, overwrite: bool, source: str = "") -> None:
    """`ValueError` where the output would take the place of something that is not to be replaced: `source`, a file, or,
    without `overwrite`, a folder with something in it."""
    if source and output.exists() and output.resolve() == Path(source).resolve():
        raise ValueError(f"{output} is the model itself; choose another folder for the output")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; the output must be a folder")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"{output} exists and is not empty; choose another folder, or --overwrite to replace it")


@contextmanager
def new_folder(output: Path, overwrite: bool, source: str = "") -> Iterator[Path]:
    """A folder beside `output` that takes its place once it is complete; an error leaves everything as it was."""
    check_output(output, overwrite, source)
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        made = Path(scratch) / output.name
        made.mkdir()
        yield made
        if output.exists():
            os.replace(output, Path(scratch) / "replaced")
        os.replace(made, output)


__all__ = [
    "check_output",
    "new_folder",
    "write_whole",
]
