"""Perplexities and verdicts that `mfn evaluate` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...model.configuration_mfn import MFNConfig
from ...utils.files import read_json

PREDICTIONS = ("P1", "P2", "P3", "P4", "P5")
SHOWN = ("prediction", "claim", "criterion", "outcome", "reason", "headline", "baseline", "figures", "paper_criterion")
"""Fields of a result that the page gets. Curves and figures by layer are left out."""


def fidelity(model: Path, config: MFNConfig) -> list[dict[str, Any]] | None:
    """Reads the perplexities of a model: one row per text. Rows of other weights or another k are left out.

    Returns:
        Rows of `evaluation.json`; None if there are none.

    Raises:
        ValueError: If the file is damaged.
    """
    content = read_json(model / "evaluation.json", dict[str, Any]) or {}
    rows = content.get("perplexity")
    if not isinstance(rows, list):
        return None
    measured = {"weights": config.weights_digest, "k": config.k} if config.weights_digest else {}
    rows = [row for row in rows if isinstance(row, dict)]
    return [row for row in rows if all(row.get(name, own) == own for name, own in measured.items())] or None


def verdicts(folder: Path) -> list[dict[str, Any]] | None:
    """Reads the results in a folder of `mfn evaluate`, one row per prediction; None if there are none.

    Raises:
        ValueError: If a file is damaged.
    """
    found = (read_json(folder / f"{name}.json", dict[str, Any]) for name in PREDICTIONS)
    return [{name: each.get(name) for name in SHOWN} for each in found if each is not None] or None


__all__ = ["fidelity", "verdicts"]
