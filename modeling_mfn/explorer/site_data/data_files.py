"""Data files of the explorer: scripts that hand JSON to the page, since pages on disk cannot fetch files."""

from __future__ import annotations

import base64
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

DATA = "data"
"""Folder of the data files."""
COMPRESSION = 6
"""Level of gzip. Level 9 takes four times as long and saves 5 %."""
DIGITS = 4
"""Significant digits of numbers."""

_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


def file_of(name: str) -> str:
    """Returns the path, within the site, of the data that has a name."""
    return f"{DATA}/{name}.js"


def write_plain(site: Path, name: str, content: Any) -> None:
    """Writes data as JavaScript that a person can read."""
    # "<" ends a script in some contexts; all else that could is ASCII already
    _write(site, name, to_json(content).replace("<", "\\u003c"))


def write_packed(site: Path, name: str, text: str) -> None:
    """Writes JSON as base64 of gzip of the text."""
    packed = base64.b64encode(gzip.compress(text.encode("ascii"), COMPRESSION, mtime=0)).decode("ascii")
    _write(site, name, f'"{packed}"')


def _write(site: Path, name: str, argument: str) -> None:
    file = site / file_of(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'MFN.receive("{name}",{argument});\n', encoding="ascii")


def to_json(content: Any) -> str:
    """Writes JSON in ASCII, so that lone surrogates pass, too. Numbers that JSON does not have become null."""
    try:
        return _ENCODER.encode(content)
    except ValueError:
        return _ENCODER.encode(_finite(content))


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def rounded(values: np.ndarray) -> np.ndarray:
    """Rounds to `DIGITS` significant digits, in float64."""
    values = np.asarray(values, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        places = DIGITS - 1 - np.floor(np.log10(np.abs(values)))
        # multiplying and dividing by whole powers alone, which are exact, gives the nearest number to a short decimal
        up, down = 10.0 ** np.clip(places, 0, 22), 10.0 ** np.clip(-places, 0, 22)
        short = np.round(values * up / down) * down / up
    return np.where(np.isfinite(short) & (places <= 22), short, values)


def numbers(values: np.ndarray) -> list[float | None]:
    """Rounds numbers for JSON; those that are not finite become None."""
    return [value if math.isfinite(value) else None for value in rounded(values).tolist()]


__all__ = ["file_of", "numbers", "rounded", "to_json", "write_packed", "write_plain"]
