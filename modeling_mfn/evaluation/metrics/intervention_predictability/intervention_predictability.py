"""Agreement of predicted and real effects of interventions: an `evaluate` metric."""

import datasets
import evaluate
import numpy as np
from scipy.stats import rankdata

_DESCRIPTION = """\
Measures how well the changes that interventions make agree with predicted changes, such as those of a gradient. Changes
are of logits, or of the outputs of attention heads and MLPs.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): predicted changes.
    references (list of float): real changes, at least one of them other than 0.

Returns:
    correlation: Pearson's correlation. NaN where one of the two never varies.
    rank_correlation: Spearman's correlation, 1 if a larger predicted change is always a larger real change, as in a
        dose response. NaN where one of the two never varies.
    sign_agreement: share of the real changes other than 0 that go in the predicted direction.
    slope: least-squares slope through 0 of real on predicted changes, 1 if sizes are right on average. NaN where all
        predicted changes are 0.
    relative_error: |real - predicted| / |real| in Euclidean norms. 0 is best, and a prediction of no change has 1.

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
    """Agreement of predicted and real changes."""

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
