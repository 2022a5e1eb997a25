"""Linear and k-sparse probes of a task on a matrix of activations: the area under the ROC curve on the held-out side.

Nothing is fitted, scaled or chosen on the held-out side.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy.sparse import coo_array, csr_array, issparse
from scipy.stats import entropy, rankdata
from sklearn import config_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from ...utils.roc import auroc
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


Matrix: TypeAlias = np.ndarray | csr_array
"""(n, p): a row for each token of a task."""


STRENGTHS = (0.003, 0.03, 0.3, 3.0)
"""Among which the linear probe's C, the inverse of its L2 regularisation, is chosen."""


FOLDS = 3
SPARSE_C = 1.0
"""C of sparse probes, which have too few weights to need a choice."""


class Score(NamedTuple):
    """A task's figure, an area under the ROC curve unless something else is said."""

    training: float
    """On the units that the probe was fitted to."""
    held_out: float
    shuffled: float
    """On the held-out side, of a probe that was fitted to shuffled labels, for these: what chance makes of the text."""


def scaled(features: Matrix, fitted: np.ndarray) -> Matrix:
    """Activations in units that make one range of C serve all models, by the tokens (n,) bool that a probe is fitted
    on alone. A code is divided by the root mean square of its firings, one number: what is large stays large, and zeros
    stay zeros. Dense columns are standardised each by itself."""
    training = features[fitted]
    if issparse(features):
        size = np.sqrt(np.mean(training.data**2)) if training.nnz else 1.0
        return features / size
    deviation = training.std(0)
    return (features - training.mean(0)) / np.where(deviation > 0, deviation, 1.0)


def linear_probe(features: Matrix, task: Task, seed: int = 0) -> Score:
    """Logistic regression on all p columns of scaled activations. C is chosen by the mean area on folds of the training
    side that share no unit, and serves the shuffled labels, too."""
    fold = _folds(task, seed)

    def area_without(out: int, c: float) -> float:
        weights = _fit(features, task.labels, (fold >= 0) & (fold != out), c)
        return area(features[fold == out] @ weights, task.labels[fold == out])

    areas = [np.mean([area_without(out, c) for out in range(FOLDS)]) for c in STRENGTHS]
    best = STRENGTHS[int(np.argmax(areas))]
    probes = [_fit(features, labels, ~task.held_out, best) for labels in (task.labels, task.shuffled)]
    return _score([features @ weights for weights in probes], task)


class SparseProbe(NamedTuple):
    """A probe that reads few columns."""

    columns: np.ndarray
    """(s,) indices."""
    weights: np.ndarray
    """(s,)."""

    def __call__(self, features: Matrix) -> np.ndarray:
        """(n,) what it makes of each token."""
        return _dense(features[:, self.columns]) @ self.weights


def fit_sparse(
    features: Matrix, labels: np.ndarray, fitted: np.ndarray, sizes: Sequence[int]
) -> dict[int, SparseProbe]:
    """Logistic regression on few columns of scaled activations: those that by themselves have the largest area under
    the ROC curve, or that of their negative, among the `fitted` tokens (n,) bool. Gurnee et al. 2023 ("Finding neurons
    in a haystack", section 3) and SAEBench take the difference of means over positive and over negative tokens, which
    prefers columns of large values: among features of a code, but not among standardised coordinates of h."""
    areas = column_areas(features[fitted], labels[fitted]) - 0.5
    order = np.argsort(-np.abs(areas), kind="stable")
    found = {}
    for size in sizes:
        chosen = order[:size]
        # one weight is known but for its size, which has no part in the area
        alone = size == 1
        weights = np.sign(areas[chosen]) if alone else _fit(_dense(features[:, chosen]), labels, fitted, SPARSE_C)
        found[size] = SparseProbe(chosen, weights)
    return found


def sparse_probes(features: Matrix, task: Task, sizes: Sequence[int] = (1, 2, 5)) -> dict[int, Score]:
    """Of the probes of [`fit_sparse`]. Columns and weights for the shuffled labels are chosen by these."""
    probes = [fit_sparse(features, labels, ~task.held_out, sizes) for labels in (task.labels, task.shuffled)]
    return {size: _score([of_labels[size](features) for of_labels in probes], task) for size in sizes}


def column_areas(features: Matrix, labels: np.ndarray) -> np.ndarray:
    """(p,) [`area`] of each column of (n, p), by sums of ranks (Mann & Whitney 1947); entries of a sparse one are at
    least 0."""
    positive = int(labels.sum())
    ranks = _positive_ranks(features, labels) if issparse(features) else rankdata(features, axis=0)[labels].sum(0)
    return (ranks - positive * (positive + 1) / 2) / (positive * (len(labels) - positive))


def _positive_ranks(features: csr_array, labels: np.ndarray) -> np.ndarray:
    """(p,) the sum of the ranks of positive tokens in each column, ties sharing their mean rank. What is not stored is
    0, and all of it comes first."""
    entries = coo_array(features)
    stored = entries.data > 0
    row, column, value = entries.row[stored], entries.col[stored], entries.data[stored]
    n, p = features.shape
    count = np.bincount(column, minlength=p)
    zeros = n - count
    one_after_another = rankdata(column * (len(value) + 1.0) + rankdata(value, "dense"))
    rank = one_after_another + (zeros - np.cumsum(count) + count)[column]
    positive = labels[row]
    silent = labels.sum() - np.bincount(column[positive], minlength=p)
    return np.bincount(column[positive], rank[positive], minlength=p) + silent * (zeros + 1) / 2


def area(values: np.ndarray, labels: np.ndarray) -> float:
    """The area under the ROC curve of (n,) values, for telling positive tokens from negative ones; ties count half."""
    distinct, level = np.unique(values, return_inverse=True)
    return float(auroc(*(np.bincount(level[labels == label], minlength=len(distinct)) for label in (True, False))))


def _dense(features: Matrix) -> np.ndarray:
    return features if isinstance(features, np.ndarray) else features.toarray()


def _fit(features: Matrix, labels: np.ndarray, rows: np.ndarray, c: float) -> np.ndarray:
    """(p,) weights of a probe that is fitted on some rows (n,) bool."""
    with config_context(assume_finite=True, skip_parameter_validation=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, solver="liblinear", tol=1e-3).fit(features[rows], labels[rows]).coef_[0]


def _score(values: Sequence[np.ndarray], task: Task) -> Score:
    """Of what a probe, and one that was fitted to shuffled labels, make of each token (n,)."""
    held_out = task.held_out
    return Score(
        area(values[0][~held_out], task.labels[~held_out]),
        area(values[0][held_out], task.labels[held_out]),
        area(values[1][held_out], task.shuffled[held_out]),
    )


def _folds(task: Task, seed: int) -> np.ndarray:
    """(n,) fold of each token, -1 on the held-out side; units of either label are dealt out evenly."""
    units, first, unit = np.unique(task.units, return_index=True, return_inverse=True)
    chance = np.random.default_rng(seed).random(len(units))
    fold = np.empty(len(units), np.int64)
    fold[np.lexsort((chance, task.labels[first], task.held_out[first]))] = np.arange(len(units)) % FOLDS
    return np.where(task.held_out, -1, fold[unit])


__all__ = [
    "Score",
    "area",
    "best_feature_information",
    "column_areas",
    "fit_sparse",
    "linear_probe",
    "mutual_information",
    "scaled",
    "sparse_probes",
]
