"""Training record of a model, and the curves that its Trainer logged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ...utils.files import read_json

RECORD, STATE = "training_record.json", "trainer_state.json"
MAX_POINTS = 500
"""Points of a curve at most."""
NO_CURVE = ("step", "epoch", "total_flos")
"""Logged numbers that are no curve."""


def training(model: Path) -> dict[str, Any] | None:
    """Reads how a model was trained; None if nothing is recorded.

    Returns:
        Content of the training record, with `curves`: name -> [[step, value], ...].

    Raises:
        ValueError: If a file is damaged.
    """
    record = read_json(model / RECORD, dict[str, Any])
    curves = _curves(read_json(model / STATE, dict[str, Any]) or {})
    return None if record is None and not curves else (record or {}) | {"curves": curves}


def _curves(state: dict[str, Any]) -> dict[str, list[list[float]]]:
    logged = state.get("log_history")
    curves: dict[str, list[list[float]]] = {}
    for entry in logged if isinstance(logged, list) else []:
        numbers = {n: float(v) for n, v in entry.items() if _is_number(v)} if isinstance(entry, dict) else {}
        if "step" in numbers:
            for name in numbers.keys() - set(NO_CURVE):
                curves.setdefault(name, []).append([int(numbers["step"]), numbers[name]])
    return {name: _thinned(curves[name]) for name in sorted(curves) if len(curves[name]) > 1}


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """Returns evenly chosen points of a long curve, with the last one."""
    every = -(-len(points) // MAX_POINTS)
    return [point for place, point in enumerate(reversed(points)) if place % every == 0][::-1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


__all__ = ["training"]
