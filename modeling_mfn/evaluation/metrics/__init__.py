"""The five predictions' figures as modules of `evaluate`, which need nothing of this package: a folder each, with the
module and its card, as the Hub has them."""

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
    """The folder of a metric, for `evaluate.load`.

    Raises:
        ValueError: if there is no such metric.
    """
    if name not in NAMES:
        raise ValueError(f"there is no metric {name!r}; there are {', '.join(NAMES)}")
    return str(Path(__file__).parent / name)


__all__ = ["NAMES", "path"]
