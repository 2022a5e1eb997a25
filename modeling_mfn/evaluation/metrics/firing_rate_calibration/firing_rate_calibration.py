"""Evenness of features' firing rates, and their distance from a target rate: an `evaluate` metric."""

import datasets
import evaluate
import numpy as np
from scipy.special import xlogy

_DESCRIPTION = """\
Measures how even the firing rates of a sparse code's features are, and how close to a target rho. The firing rate of a
feature is the share of tokens on which it is active.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): firing rates, one per feature, each from 0 to 1.
    rho (float): target firing rate, above 0 and below 1. Default: the mean of the rates.

Returns:
    active_features: mean number of active features per token, which is the sum of the rates.
    mean, std: mean and population standard deviation of the rates.
    coefficient_of_variation: std / mean.
    kl: mean over features of KL(Bernoulli(rate) || Bernoulli(rho)), in nats.
    dead_share: share of features whose rate is 0.
    evenness: entropy of the features' shares of all firings, divided by the log of the number of features.

Examples:
    >>> import evaluate
    >>> from modeling_mfn.evaluation.metrics import path
    >>> metric = evaluate.load(path("firing_rate_calibration"))
    >>> found = metric.compute(predictions=[0.2, 0.2, 0.0, 0.0], rho=0.1)
    >>> found["std"], found["coefficient_of_variation"], found["dead_share"], found["evenness"]
    (0.1, 1.0, 0.5, 0.5)
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
class FiringRateCalibration(evaluate.Metric):
    """Measures of one layer's firing rates."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
            reference_urls=["https://doi.org/10.20944/preprints202510.2064.v1"],
        )

    def _compute(self, predictions: list[float], rho: float | None = None) -> dict[str, float]:
        rates = np.asarray(predictions, np.float64)
        if not ((rates >= 0) & (rates <= 1)).all():
            raise ValueError(f"firing rates are from {rates.min()} to {rates.max()}; they must be between 0 and 1")
        rho = float(rates.mean()) if rho is None else rho
        if not 0 < rho < 1:
            raise ValueError(f"rho is {rho}; a target firing rate must be between 0 and 1")
        kl = xlogy(rates, rates / rho) + xlogy(1 - rates, (1 - rates) / (1 - rho))
        shares = rates / rates.sum() if rates.any() else np.full_like(rates, np.nan)
        return {
            "active_features": float(rates.sum()),
            "mean": float(rates.mean()),
            "std": float(rates.std()),
            "coefficient_of_variation": float(rates.std() / rates.mean()) if rates.any() else float("nan"),
            "kl": float(kl.mean()),
            "dead_share": float((rates == 0).mean()),
            "evenness": float(-xlogy(shares, shares).sum() / np.log(len(rates))) if len(rates) > 1 else float("nan"),
        }
