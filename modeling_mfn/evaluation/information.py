"""Mutual information of features and concepts: how much of a task's label the firing of one feature tells."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array
from scipy.stats import entropy

from .probes import Score
from .tasks import Task


def best_feature_information(codes: csr_array, task: Task) -> Score:
    """The mutual information of a task's label and the firing of the feature that has most of it on the training side,
    over the label's entropy: 1 if the feature fires on all tokens of one label and on none of the other. For the
    shuffled labels the feature is chosen by these.

    Args:
        codes: (n, m) of the task's tokens, as many of either label. So this is about telling the two apart, not about
            how often the concept comes up in text.
    """
    held_out = task.held_out
    best, best_shuffled = (
        int(np.argmax(mutual_information(codes[~held_out], labels[~held_out])))
        for labels in (task.labels, task.shuffled)
    )

    def share(feature: int, labels: np.ndarray, rows: np.ndarray) -> float:
        bits = mutual_information(codes[:, [feature]][rows], labels[rows]).item()
        return float(bits / entropy(np.bincount(labels[rows]), base=2))

    return Score(
        share(best, task.labels, ~held_out),
        share(best, task.labels, held_out),
        share(best_shuffled, task.shuffled, held_out),
    )


def mutual_information(codes: csr_array, labels: np.ndarray) -> np.ndarray:
    """(m,) bits that the firing of each feature tells of a label: activations (n, m), of which firings alone are
    stored, and labels (n,) bool. The plug-in estimate, which is above 0 by chance by some 1 / (2 n ln 2)."""
    n = len(labels)
    fired = np.stack([np.bincount(codes[labels == label].indices, minlength=codes.shape[1]) for label in (False, True)])
    tokens = np.array([n - labels.sum(), labels.sum()])[:, None]
    joint = np.stack([tokens - fired, fired]) / n  # (fired or not, label, m)
    independent = joint.sum(0, keepdims=True) * joint.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(joint > 0, joint * np.log2(joint / independent), 0.0).sum((0, 1))


__all__ = ["best_feature_information", "mutual_information"]
