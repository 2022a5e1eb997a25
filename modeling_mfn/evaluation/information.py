"""Mutual information of features and concepts: how much of a task's label the firing of one feature tells."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array
from scipy.stats import entropy

from .activations import Windows, activations_at
from .probes import Score
from .result import Figure, Subjects, mean
from .tasks import Task, rows_of, task_places


def concept_information(
    subjects: Subjects, windows: Windows, tasks: list[Task], *, batch_size: int = 8
) -> dict[str, dict[str, Figure]]:
    """Each subject's `best_feature_information`, averaged over layers and seeds: a mean over tasks, with its interval
    by bootstrap over tasks. `probe_purity` has it among its figures, too.

    Returns:
        Subject -> "information", on held-out units; "information, training" and "information, shuffled labels".
    """
    places, found = task_places(tasks), {}
    for name, models in subjects.items():
        scores = []
        for model in models:
            codes = activations_at(model, windows, places, batch_size=batch_size).codes.values()
            scores += [[best_feature_information(of[rows_of(task, places)], task) for task in tasks] for of in codes]
        training, held_out, shuffled = np.mean(scores, axis=0).T
        found[name] = {
            "information": mean(held_out),
            "information, training": mean(training),
            "information, shuffled labels": mean(shuffled),
        }
    return found


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


__all__ = ["best_feature_information", "concept_information", "mutual_information"]
