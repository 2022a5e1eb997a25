"""The file `evaluation.json` next to the weights: perplexities that the model card shows.

{"perplexity": [{"data": "what text", "tokens": 4096, "base": 40.6, "alpha_0": 40.6, "alpha_1": 54.2,
                 "weights": "22cbca9fb0ff7732", "k": 32}]}

`weights` is the digest of the weights that were measured. Rows without `weights` and `k`, as people write them, are
taken as they are.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..utils.files import read_json, write_whole

logger = logging.get_logger(__name__)

EVALUATION_FILE = "evaluation.json"
PERPLEXITY = re.compile(r"base|alpha_\d+(\.\d+)?(e-\d{1,3})?")
"""Name of a perplexity in a row: `base` for the base model, `alpha_0.5` for the MFN model at alpha 0.5."""


@dataclass
class _Evaluation:
    """Part of the file that is read."""

    perplexity: list[dict[str, Any]] = field(default_factory=list)


def read_perplexities(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the perplexities of a model's folder, one row per text; [] if there is no file.

    Raises:
        ValueError: If the file is damaged, or a row lacks its text or a finite perplexity. Also if a row is of other
            weights than the folder's, or of another k.
    """
    file = Path(folder) / EVALUATION_FILE
    rows = _read_rows(file)
    measured = _measured(folder)
    for row in rows:
        for name, own in measured.items():
            if row.get(name, own) != own:
                raise ValueError(
                    f"{file} has a perplexity on {row['data']!r} of {name} {row[name]}, and the model has {own}; "
                    "measure it again (mfn evaluate), or delete the file"
                )
    return rows


def _measured(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Values that a perplexity depends on: digest of the folder's weights, and k; {} where the config does not say."""
    config = read_json(Path(folder) / "config.json", dict[str, Any]) or {}
    found = {"weights": config.get("weights_digest"), "k": config.get("k")}
    return found if found["weights"] else {}


def _read_rows(file: Path) -> list[dict[str, Any]]:
    found = read_json(file, _Evaluation)
    rows = found.perplexity if found else []
    for row in rows:
        values = [row[name] for name in perplexity_names([row])]
        if not values or not isinstance(row.get("data"), str) or not all(map(is_number, values)):
            raise ValueError(
                f"{file} has the perplexity {row!r}; it must have `data`, a text, and finite numbers for some of "
                "base, alpha_0, alpha_1 and other alphas"
            )
    return rows


def add_perplexities(folder: str | os.PathLike[str], rows: list[dict[str, Any]]) -> None:
    """Writes perplexities of the model in a folder. A row replaces an earlier row of the same `data`.

    Rows of other weights or another k are dropped, with a warning. All else stays.

    Raises:
        ValueError: If the file is damaged.
    """
    file = Path(folder) / EVALUATION_FILE
    measured, new = _measured(folder), {row["data"] for row in rows}
    others = [row for row in _read_rows(file) if row["data"] not in new]
    kept = [row for row in others if all(row.get(name, own) == own for name, own in measured.items())]
    if dropped := [row["data"] for row in others if row not in kept]:
        logger.warning(f"{file} loses the perplexity on {dropped[0]!r}, which was of other weights or another k")
    content = (read_json(file, dict[str, Any]) or {}) | {"perplexity": kept + [row | measured for row in rows]}
    write_whole(file, json.dumps(content, indent=2) + "\n")


def perplexity_names(rows: list[dict[str, Any]]) -> list[str]:
    """Names of all perplexities in some rows: the base model's first, then by alpha."""
    names = {name for row in rows for name in row if PERPLEXITY.fullmatch(name)}
    return sorted(names, key=lambda name: -1.0 if name == "base" else float(name.removeprefix("alpha_")))


def is_number(value: Any) -> bool:
    """Returns True for a finite int or float. A bool is not a number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


__all__ = ["EVALUATION_FILE", "add_perplexities", "is_number", "perplexity_names", "read_perplexities"]
