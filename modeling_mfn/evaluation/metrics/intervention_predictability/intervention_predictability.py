"""How well the effects of interventions were predicted: an `evaluate` metric."""

import datasets
import evaluate
import numpy as np
from scipy.stats import rankdata

_DESCRIPTION = """\
How well the changes that interventions make, of logits or of what attention heads and MLPs write, agree with those that
were predicted, for instance by the gradient.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): predicted changes.
    references (list of float): the changes that were seen, at least one of them other than 0.

Returns:
    correlation: Pearson's. NaN, as the next one, where one of the two never varies.
    rank_correlation: Spearman's: whether a larger predicted change is a larger real one, as in a dose response.
    sign_agreement: share of the changes, of those that are not 0, that go in the predicted direction.
    slope: least squares, through 0, of real on predicted changes; 1 if sizes are right on average. NaN where all
        predicted ones are 0.
    relative_error: |real - predicted| / |real|, Euclidean norms; 0 at best, and 1 for a prediction of no change.

Examples:
    >>> import evaluate
    >>> from modeling_mfn.evaluation.metrics import path
    >>> metric = evaluate.load(path("intervention_predictability"))
    >>> found = metric.compute(predictions=[-1.0, 0.5, 2.0], references=[-2.0, 1.0, 4.0])
    >>> round(found["correlation"], 6), found["sign_agreement"], found["slope"], found["relative_error"]
    (1.0, 1.0, 2.0, 0.5)
"""

_CITATION = """\
@misc{dev2025monosemantic,
  title = {Monosemantic Feature Neurons: A Sparse Autoencoding Layer for Interpretable, Steerable Transformer Features},
  author = {Dev, Roger},
  year = {2025},
  doi = {10.20944/preprints202510.2064.v1}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class InterventionPredictability(evaluate.Metric):
    """Agreement of predicted with real changes."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
            reference_urls=["https://doi.org/10.20944/preprints202510.2064.v1"],
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        predicted, real = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
        changed = real != 0
        if not changed.any():
            raise ValueError(f"all {len(real)} references are 0; where nothing changed there is nothing to predict")
        signs = np.sign(predicted[changed]) == np.sign(real[changed])
        return {
            "correlation": _correlation(predicted, real),
            "rank_correlation": _correlation(rankdata(predicted), rankdata(real)),
            "sign_agreement": float(signs.mean()),
            "slope": float(predicted @ real / (predicted @ predicted)) if predicted.any() else float("nan"),
            "relative_error": float(np.linalg.norm(real - predicted) / np.linalg.norm(real)),
        }


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])
