"""Area under the ROC curve, computed from counts."""

from __future__ import annotations

import numpy as np


def auroc(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Computes the area under the ROC curve of values counted in bins.

    The area is the probability that a positive has a larger value than a negative; two values in one bin count half.
    It is exact if only equal values share a bin.

    Args:
        positives: Count of positives in each bin, (..., bins), in ascending order of the values.
        negatives: Count of negatives in the same bins.

    Returns:
        Areas, (...); NaN where there are no positives or no negatives.
    """
    positives, negatives = positives.astype(np.float64), negatives.astype(np.float64)
    below = negatives.cumsum(-1) - negatives / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        area: np.ndarray = (positives * below).sum(-1) / (positives.sum(-1) * negatives.sum(-1))
    return area


__all__ = ["auroc"]
