"""What a prediction's measurement is: figures with their intervals, of the MFN models and of each baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from ..model.modeling_mfn import MFNForCausalLM
from .intervals import Estimate

MFN, POST_HOC_SAE, RANDOM_SAE, NO_RATE_LOSS = "MFN", "post-hoc SAE", "random SAE", "MFN without rate loss"


RESIDUAL_STREAM = "residual stream"
"""What a figure can be of. A post-hoc SAE is an `MFNForCausalLM`, too: the frozen base model, at alpha = 0, whose MFN
layers were trained to reconstruct and nothing else. At alpha = 1 it is the SAE spliced in."""


Subjects = Mapping[str, Sequence[MFNForCausalLM]]
"""Name, one of the above -> its models, one a seed, all with MFN layers in the same blocks and of the same m and k."""


Outcome = Literal["confirmed", "partly", "not confirmed", "not measured"]


@dataclass(frozen=True)
class PaperCriterion:
    """What the paper's own table (section 7) asks for. The paper says nothing of intervals: the figure by itself meets
    it or not."""

    criterion: str
    met: bool | None
    """`None` where it was not measured."""
    name: str
    """Of the figure."""
    figure: Estimate
    baseline: str
    """The subject that the paper compares with."""
    baseline_figure: Estimate

    @classmethod
    def judged(
        cls,
        criterion: str,
        figures: Mapping[str, Mapping[str, Estimate]],
        name: str,
        meets: Callable[[float], bool],
        baseline: str,
    ) -> PaperCriterion:
        """Of the figure `name` of the MFN models; NaN stands for a subject that was not measured."""
        figure, against = (figures.get(subject, {}).get(name, Estimate(math.nan)) for subject in (MFN, baseline))
        met = None if math.isnan(figure.value) else meets(figure.value)
        return cls(criterion, met, name, figure, baseline, against)

    def __str__(self) -> str:
        if self.met is None:
            return "not measured"
        against = "" if math.isnan(self.baseline_figure.value) else f" ({self.baseline}: {self.baseline_figure})"
        return f"{'met' if self.met else 'not met'}: {self.name.replace('_', ' ')} {self.figure}{against}"


@dataclass(frozen=True)
class PredictionResult:
    """One of the paper's five predictions, measured."""

    prediction: str
    """`P1` to `P5`."""
    claim: str
    """What the paper predicts."""
    criterion: str
    """When it counts as confirmed, and when as partly so."""
    outcome: Outcome
    reason: str
    """A sentence: which figure decided, and by how much."""
    headline: str
    """The name of the figure that decided."""
    figures: dict[str, dict[str, Estimate]]
    """Subject -> name -> figure, averaged over layers and seeds."""
    baseline: str
    """The subject that the headline is compared with."""
    paper_criterion: PaperCriterion
    """The paper's own, beside the stricter `criterion`."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else was measured: by layer, by seed, curves. JSON's types and `Estimate`s alone."""

    def to_json(self) -> dict[str, Any]:
        """Figures become `{"value", "low", "high"}`, and what is not finite null."""
        return {name: plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PredictionResult:
        """The result that `to_json` made the record of; figures in `details` stay mappings."""
        paper = record["paper_criterion"]
        figures = {name: _estimate_of(paper[name]) for name in ("figure", "baseline_figure")}
        changed = {
            "figures": estimates_of(record["figures"]),
            "paper_criterion": PaperCriterion(**{**paper, **figures}),
        }
        return cls(**{**record, **changed})


def estimates_of(record: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Estimate]]:
    """Subject -> name -> figure, of what `plain` made of it."""
    return {subject: {name: _estimate_of(of) for name, of in own.items()} for subject, own in record.items()}


def _estimate_of(record: Mapping[str, Any]) -> Estimate:
    return Estimate(*(math.nan if part is None else part for part in record.values()))


def plain(value: Any) -> Any:
    """Figures and numpy's numbers as what JSON has."""
    if isinstance(value, Estimate):
        return {name: plain(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = [
    "PaperCriterion",
    "PredictionResult",
    "Subjects",
    "estimates_of",
    "plain",
]
