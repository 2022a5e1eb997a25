"""Quality of probes for concepts, and their gain over a baseline's probes: an `evaluate` metric."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

_DESCRIPTION = """\
Measures how well a probe of a model's features tells a concept's tokens from others: the area under the ROC curve
(AUROC) of its scores on held-out examples. Also measures the gain over a baseline, such as a probe of the residual
stream.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): score of each held-out example, on any monotone scale.
    references (list of int): 1 where the example has the concept, else 0.
    baseline (list of float): scores that the baseline's probe gives to the same examples. Optional.
    tasks (list): name or number of each example's task, where there are several concepts. Optional. Results are then
        means over tasks, each of which needs examples of both labels.

Returns:
    auroc: area under the ROC curve, the share of pairs of a positive and a negative example in the right order.
    average_precision: mean precision over recall.
    baseline_auroc: AUROC of the baseline, where it is given.
    gain: auroc / baseline_auroc - 1.
    error_reduction: 1 - (1 - auroc) / (1 - baseline_auroc). It can be 10 % where a gain of 10 % would need an AUROC
        above 1. NaN where the baseline makes no error.

Examples:
    >>> import evaluate
    >>> from modeling_mfn.evaluation.metrics import path
    >>> metric = evaluate.load(path("probe_purity"))
    >>> scores, labels = [0.9, 0.8, 0.3, 0.1], [1, 1, 0, 0]
    >>> found = metric.compute(predictions=scores, references=labels, baseline=[0.9, 0.1, 0.3, 0.0])
    >>> found["auroc"], found["baseline_auroc"], round(found["gain"], 4), found["error_reduction"]
    (1.0, 0.75, 0.3333, 1.0)
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
class ProbePurity(evaluate.Metric):
    """AUROC of a probe's scores, and its gain over a baseline."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://doi.org/10.20944/preprints202510.2064.v1"],
        )

    def _compute(
        self,
        predictions: list[float],
        references: list[int],
        baseline: list[float] | None = None,
        tasks: list[str] | None = None,
    ) -> dict[str, float]:
        scores, labels = np.asarray(predictions), np.asarray(references)
        for name, given in (("baseline", baseline), ("tasks", tasks)):
            if given is not None and len(given) != len(scores):
                raise ValueError(f"{name} has {len(given)} entries for {len(scores)} predictions; give as many")
        groups = _groups(labels, tasks)
        found = {
            "auroc": float(np.mean([roc_auc_score(labels[rows], scores[rows]) for rows in groups])),
            "average_precision": float(
                np.mean([average_precision_score(labels[rows], scores[rows]) for rows in groups])
            ),
        }
        if baseline is not None:
            other = np.asarray(baseline, np.float64)
            area = float(np.mean([roc_auc_score(labels[rows], other[rows]) for rows in groups]))
            found["baseline_auroc"] = area
            found["gain"] = found["auroc"] / area - 1 if area > 0 else float("nan")
            found["error_reduction"] = 1 - (1 - found["auroc"]) / (1 - area) if area < 1 else float("nan")
        return found


def _groups(labels: np.ndarray, tasks: list[str] | None) -> list[np.ndarray]:
    """Returns the rows of each task."""
    names, task = np.unique(np.zeros(len(labels), int) if tasks is None else np.asarray(tasks), return_inverse=True)
    groups = [np.flatnonzero(task == place) for place in range(len(names))]
    for name, rows in zip(names, groups, strict=True):
        if set(labels[rows].tolist()) != {0, 1}:
            of_task = "" if tasks is None else f" of task {name!s}"
            raise ValueError(
                f"references{of_task} are {sorted(set(labels[rows].tolist()))}; they must be 0 and 1, both"
            )
    return groups
