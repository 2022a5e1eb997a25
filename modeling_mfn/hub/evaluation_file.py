"""The file `evaluation.json` next to the weights: perplexities that the model card shows."""

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
"""Names of the figures in a row of `evaluation.json`: `alpha_0.5` is at alpha 0.5."""


def _read_evaluation(file: Path) -> list[dict[str, Any]]:
    rows = (read_json(file) or {}).get("perplexity", [])
    for row in rows:
        values = [row[name] for name in _perplexity_names([row])]
        if not isinstance(row.get("data"), str) or not values or not all(map(_is_number, values)):
            raise ValueError(
                f"{file} has the perplexity {row!r}; it must have `data`, a text, and finite numbers for some of "
                "base, alpha_0, alpha_1 and other alphas"
            )
    return rows


def add_perplexities(folder: str | os.PathLike[str], rows: list[dict[str, Any]]) -> None:
    """Writes perplexities into the `evaluation.json` of a model's folder, in place of those of the same `data`. What
    else it holds stays. `ValueError` if the file is damaged."""
    file = Path(folder) / EVALUATION_FILE
    new = {row["data"] for row in rows}
    kept = [row for row in _read_evaluation(file) if row["data"] not in new]
    content = (read_json(file) or {}) | {"perplexity": kept + rows}
    write_whole(file, json.dumps(content, indent=2) + "\n")


def _perplexity_names(rows: list[dict[str, Any]]) -> list[str]:
    """Of the figures that the rows have: the base model's, then by alpha."""
    names = {name for row in rows for name in row if PERPLEXITY.fullmatch(name)}
    return sorted(names, key=lambda name: -1.0 if name == "base" else float(name.removeprefix("alpha_")))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
