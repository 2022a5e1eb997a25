"""Files and folders that appear complete or not at all, even if the writing process is killed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_json(file: Path) -> dict[str, Any] | None:
    """Reads an object from a JSON file; None if there is no file, `ValueError` if it holds something else."""
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
    """Writes a file so that it is never seen half written. Text is written in UTF-8."""
    beside = file.with_name(f".{file.name}.part")
    beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(beside, file)


def check_output(output: Path, overwrite: bool, source: str = "") -> None:
    """Checks that a folder may be written.

    Args:
        output: The folder.
        overwrite: Allow a folder that is not empty.
        source: Folder of the model that is read. It is never allowed as output.

    Raises:
        ValueError: If the output is `source`, a file, or a folder that is not empty.
    """
    if source and output.exists() and output.resolve() == Path(source).resolve():
        raise ValueError(f"{output} is the model itself; choose another folder for the output")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; the output must be a folder")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"{output} exists and is not empty; choose another folder, or --overwrite to replace it")


@contextmanager
def new_folder(output: Path, overwrite: bool, source: str = "") -> Iterator[Path]:
    """Gives a new, empty folder that becomes `output` at the end of the context. After an error nothing has changed.

    Arguments and errors are those of `check_output`.
    """
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


__all__ = ["check_output", "new_folder", "read_json", "write_whole"]
