"""Area under the ROC curve, from counts."""

from __future__ import annotations

import numpy as np


def auroc(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """The area under the ROC curve of values that were counted in bins (..., bins), ascending: the chance that a
    positive's value is larger than a negative's, half of it where both are in the same bin. Exact if equal values alone
    share a bin. NaN where there are no positives, or no negatives."""
    positives, negatives = positives.astype(np.float64), negatives.astype(np.float64)
    below = negatives.cumsum(-1) - negatives / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        area: np.ndarray = (positives * below).sum(-1) / (positives.sum(-1) * negatives.sum(-1))
    return area


__all__ = [
    "auroc",
]
