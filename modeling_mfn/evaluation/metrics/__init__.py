"""Measures of the five predictions as metrics of `evaluate`.

Each folder holds a module and its card, as on the Hub, and needs nothing else of this package.
"""

from __future__ import annotations

from pathlib import Path

NAMES = (
    "firing_rate_calibration",
    "probe_purity",
    "cross_seed_alignment",
    "intervention_predictability",
    "transfer_gap",
)


def path(name: str) -> str:
    """Returns the folder of a metric, for `evaluate.load`.

    Raises:
        ValueError: if there is no such metric.
    """
    if name not in NAMES:
        raise ValueError(f"there is no metric {name!r}; there are {', '.join(NAMES)}")
    return str(Path(__file__).parent / name)


__all__ = ["NAMES", "path"]
