"""Files that are either as they were or complete, whenever the process that writes them is killed."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes beside the file, text in UTF-8, then in its place."""
    beside = file.with_name(f".{file.name}.part")
    beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(beside, file)


__all__ = ["write_whole"]
