"""Alignment of the features of two models, or of two seeds of one model: an `evaluate` metric."""

import datasets
import evaluate
import numpy as np
from scipy.optimize import linear_sum_assignment

_DESCRIPTION = """\
Measures how similar the features of two models are: linear CKA of their codes, and the one-to-one matching of features
with the largest sum of correlations (Hungarian method). The matching is also measured at chance.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of list of float): code of each token in the first model, N rows of m_a activations.
    references (list of list of float): code of the same tokens in the second model, N rows of m_b activations.
    center (bool): True to centre features, so that similarities are Pearson's correlations. With False, similarities
        are cosines, as for directions, which are given as d rows with one column per feature. Default: True.
    permutations (int): number of times that chance is measured, with the rows of the second model permuted. Default: 1.
    seed (int): seed of the permutations. Default: 0.

Returns:
    cka: linear CKA (Kornblith et al. 2019), from 0 to 1. It is invariant to rotations and does not see single features.
    mean_similarity: mean over matched pairs. Features that never vary (with center=False: that are 0) are left out.
    matched_0.7, matched_0.8, matched_0.9: share of matched pairs with at least this similarity.
    mean_similarity_at_chance: mean similarity of the best matching after a permutation, averaged over permutations. NaN
        without permutations.
    pairs: number of matched pairs.

Examples:
    >>> import evaluate
    >>> from modeling_mfn.evaluation.metrics import path
    >>> metric = evaluate.load(path("cross_seed_alignment"))
    >>> ours = [[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 1.0]]
    >>> theirs = [[0.0, 1.0], [0.0, 0.0], [2.0, 0.0], [1.0, 0.0]]
    >>> found = metric.compute(predictions=ours, references=theirs)
    >>> round(found["cka"], 6), round(found["mean_similarity"], 6), found["matched_0.9"], found["pairs"]
    (1.0, 1.0, 1.0, 2)
"""

_CITATION = """\
@misc{dev2025monosemantic,
  title = {Monosemantic Feature Neurons: A Sparse Autoencoding Layer for Interpretable, Steerable Transformer Features},
  author = {Dev, Roger},
  year = {2025},
  doi = {10.20944/preprints202510.2064.v1}
}
@inproceedings{kornblith2019similarity,
  title = {Similarity of Neural Network Representations Revisited},
  author = {Kornblith, Simon and Norouzi, Mohammad and Lee, Honglak and Hinton, Geoffrey},
  booktitle = {International Conference on Machine Learning},
  year = {2019}
}
"""

_LEVELS = (0.7, 0.8, 0.9)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CrossSeedAlignment(evaluate.Metric):
    """Linear CKA and the best one-to-one matching of two models' features."""

    def _info(self) -> evaluate.MetricInfo:
        rows = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": rows, "references": rows}),
            reference_urls=[
                "https://doi.org/10.20944/preprints202510.2064.v1",
                "https://proceedings.mlr.press/v97/kornblith19a.html",
            ],
        )

    def _compute(
        self,
        predictions: list[list[float]],
        references: list[list[float]],
        center: bool = True,
        permutations: int = 1,
        seed: int = 0,
    ) -> dict[str, float]:
        a, b = (_matrix(rows, name) for rows, name in ((predictions, "predictions"), (references, "references")))
        if center:
            a, b = a - a.mean(0), b - b.mean(0)
        similarities = _matched(a, b)
        random = np.random.default_rng(seed)
        chance = [_matched(a, b[random.permutation(len(b))]) for _ in range(permutations)]
        return {
            "cka": _linear_cka(a, b),
            "mean_similarity": _mean(similarities),
            **{f"matched_{level}": _mean(similarities >= level) for level in _LEVELS},
            "mean_similarity_at_chance": _mean([_mean(each) for each in chance]),
            "pairs": len(similarities),
        }


def _matrix(rows: list[list[float]], name: str) -> np.ndarray:
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        raise ValueError(f"rows of {name} have lengths {sorted(lengths)}; each must have one entry per feature")
    return np.asarray(rows, np.float64)


def _linear_cka(a: np.ndarray, b: np.ndarray) -> float:
    """Linear CKA, |a'b|^2 / (|a'a| |b'b|) in Frobenius norms."""
    norms = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
    return float(np.linalg.norm(a.T @ b) ** 2 / norms) if norms > 0 else float("nan")


def _matched(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(P,) cosines of the columns that the best matching pairs up."""
    matrix = _units(a).T @ _units(b)
    return matrix[linear_sum_assignment(matrix, maximize=True)]


def _units(columns: np.ndarray) -> np.ndarray:
    """Columns at unit length, without those that rounding leaves of a constant."""
    norms = np.linalg.norm(columns, axis=0)
    kept = norms > 1e-12 * max(norms.max(initial=0), 1e-300)
    return columns[:, kept] / norms[kept]


def _mean(values: np.ndarray | list[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
