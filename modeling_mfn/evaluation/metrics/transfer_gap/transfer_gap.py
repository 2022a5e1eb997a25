"""What a model loses in perplexity on other domains than it was trained on: an `evaluate` metric."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """\
What a model's features lose in perplexity on domains that they were not trained on, against the base model, or another
baseline, on the same domains.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): the model's perplexity on each target domain.
    references (list of float): the base model's on the same domains.
    source (pair of float): the model's and the base model's perplexity on the domain that features were trained on.
        Optional.
    threshold (float): the gap up to which a domain counts as transferred to. Default 0.05.

Returns:
    gaps: of each domain, perplexity / reference - 1.
    mean_gap: their mean.
    worst_gap: the largest.
    share_within: share of the domains with a gap of at most the threshold.
    source_gap, excess_gap: with `source`, the gap at home, and what is lost beyond it elsewhere,
        (1 + mean_gap) / (1 + source_gap) - 1. A model that is as much worse than its base everywhere transfers without
        an excess.

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
    """Perplexity on target domains against a baseline's."""

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
            raise ValueError(f"perplexities are as low as {pairs.min()}; they are at least 1")
        gaps = perplexities[0] / perplexities[1] - 1
        mean_gap = float(gaps.mean())
        found: dict[str, float | list[float]] = {
            "gaps": gaps.tolist(),
            "mean_gap": mean_gap,
            "worst_gap": float(gaps.max()),
            # a gap of 5 % is one in decimals, too, which floats are not
            "share_within": float((gaps <= threshold + 1e-9).mean()),
        }
        if source is not None:
            found["source_gap"] = source[0] / source[1] - 1
            found["excess_gap"] = (1 + mean_gap) / (source[0] / source[1]) - 1
        return found
