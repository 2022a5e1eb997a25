"""Loss in perplexity on domains that a model was not trained on: an `evaluate` metric."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """\
Measures the loss in perplexity of a model's features on domains that they were not trained on, relative to the base
model or another baseline on the same domains.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): perplexity of the model on each target domain.
    references (list of float): perplexity of the base model on the same domains.
    source (pair of float): perplexity of the model and of the base model on the domain that features were trained on.
        Optional.
    threshold (float): largest gap with which a domain counts as transferred to. Default: 0.05.

Returns:
    gaps: gap of each domain, perplexity / reference - 1.
    mean_gap: mean of the gaps.
    worst_gap: largest gap.
    share_within: share of domains with a gap of at most the threshold.
    source_gap: with `source`, the gap on the source.
    excess_gap: with `source`, (1 + mean_gap) / (1 + source_gap) - 1. It is 0 for a model that is worse than its base by
        the same factor on all domains.

Examples:
    >>> import evaluate
    >>> from modeling_mfn.evaluation.metrics import path
    >>> metric = evaluate.load(path("transfer_gap"))
    >>> found = metric.compute(predictions=[10.5, 24.0], references=[10.0, 20.0], source=(11.0, 10.0))
    >>> [round(gap, 4) for gap in found["gaps"]], round(found["worst_gap"], 4), found["share_within"]
    ([0.05, 0.2], 0.2, 0.5)
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
class TransferGap(evaluate.Metric):
    """Perplexity on target domains relative to a baseline."""

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

    def _compute(
        self,
        predictions: list[float],
        references: list[float],
        source: tuple[float, float] | None = None,
        threshold: float = 0.05,
    ) -> dict[str, float | list[float]]:
        perplexities = np.array([predictions, references], np.float64)
        pairs = perplexities if source is None else np.column_stack([perplexities, source])
        if not (pairs >= 1).all():
            raise ValueError(f"perplexities are as low as {pairs.min()}; they must be at least 1")
        gaps = perplexities[0] / perplexities[1] - 1
        mean_gap = float(gaps.mean())
        found: dict[str, float | list[float]] = {
            "gaps": gaps.tolist(),
            "mean_gap": mean_gap,
            "worst_gap": float(gaps.max()),
            # a gap of exactly 5 % may be slightly more in floating point
            "share_within": float((gaps <= threshold + 1e-9).mean()),
        }
        if source is not None:
            found["source_gap"] = source[0] / source[1] - 1
            found["excess_gap"] = (1 + mean_gap) / (source[0] / source[1]) - 1
        return found
