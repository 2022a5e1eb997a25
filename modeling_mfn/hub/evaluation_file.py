"""The file `evaluation.json` next to the weights: perplexities that the model card shows.

{"perplexity": [{"data": "what text", "tokens": 4096, "base": 40.6, "alpha_0": 40.6, "alpha_1": 54.2}]}
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from ..utils.files import read_json, write_whole

EVALUATION_FILE = "evaluation.json"
PERPLEXITY = re.compile(r"base|alpha_\d+(\.\d+)?(e-\d+)?")
"""Name of a perplexity in a row: `base` for the base model, `alpha_0.5` for the MFN model at alpha 0.5."""


def read_perplexities(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the perplexities of a model's folder, one row per text; [] if there is no file.

    Raises:
        ValueError: If the file is damaged, or a row lacks its text or a finite perplexity.
    """
    file = Path(folder) / EVALUATION_FILE
    rows = (read_json(file) or {}).get("perplexity", [])
    for row in rows:
        values = [row[name] for name in perplexity_names([row])] if isinstance(row, dict) else []
        if not values or not isinstance(row.get("data"), str) or not all(map(is_number, values)):
            raise ValueError(
                f"{file} has the perplexity {row!r}; it must have `data`, a text, and finite numbers for some of "
                "base, alpha_0, alpha_1 and other alphas"
            )
    return rows


def add_perplexities(folder: str | os.PathLike[str], rows: list[dict[str, Any]]) -> None:
    """Writes perplexities into a model's folder. A row replaces an earlier row of the same `data`; all else stays.

    Raises:
        ValueError: If the file is damaged.
    """
    file = Path(folder) / EVALUATION_FILE
    new = {row["data"] for row in rows}
    kept = [row for row in read_perplexities(folder) if row["data"] not in new]
    content = (read_json(file) or {}) | {"perplexity": kept + rows}
    write_whole(file, json.dumps(content, indent=2) + "\n")


def perplexity_names(rows: list[dict[str, Any]]) -> list[str]:
    """Names of all perplexities in some rows: the base model's first, then by alpha."""
    names = {name for row in rows for name in row if PERPLEXITY.fullmatch(name)}
    return sorted(names, key=lambda name: -1.0 if name == "base" else float(name.removeprefix("alpha_")))


def is_number(value: Any) -> bool:
    """Returns True for a finite int or float. A bool is not a number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


__all__ = ["EVALUATION_FILE", "add_perplexities", "is_number", "perplexity_names", "read_perplexities"]
