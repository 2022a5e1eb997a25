"""Result of measuring a prediction: estimates of the MFN models and of each baseline, and the outcome."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..utils.readers import parse_json
from .intervals import Estimate

if TYPE_CHECKING:
    from ..model.mfn_for_causal_lm import MFNForCausalLM

MFN, POST_HOC_SAE, RANDOM_SAE, NO_RATE_LOSS = "MFN", "post-hoc SAE", "random SAE", "MFN without rate loss"
FINE_TUNED_SAE, RESIDUAL_STREAM = "fine-tuned SAE", "residual stream"
"""Names of subjects, for which estimates are made.

A post-hoc SAE is an `MFNForCausalLM`, too: the frozen base model at alpha = 0, whose MFN layers learnt reconstruction
alone. At alpha = 1 the SAE is spliced in.
"""

Subjects = Mapping[str, Sequence["MFNForCausalLM"]]
"""Name of a subject -> its models, one per seed. All have MFN layers in the same blocks and the same m and k."""

Estimates = Mapping[str, Mapping[str, Estimate]]
"""Subject -> name of a measure -> estimate."""

Outcome = Literal["confirmed", "partly", "not confirmed", "not measured"]


@dataclass(frozen=True)
class PaperCriterion:
    """Criterion of the paper's own table (section 7).

    The paper does not mention intervals: the value alone meets the criterion or does not.
    """

    criterion: str
    met: bool | None
    """`None` where it was not measured."""
    name: str
    """Name of the measure."""
    figure: Estimate
    """Estimate of the MFN models."""
    baseline: str
    """Subject that the paper compares with."""
    baseline_figure: Estimate
    """Estimate of the baseline."""

    @classmethod
    def judged(
        cls,
        criterion: str,
        figures: Estimates,
        name: str,
        meets: Callable[[float], bool],
        baseline: str,
    ) -> PaperCriterion:
        """Applies `meets` to the value of the MFN models. A subject that was not measured has NaN."""
        ours, theirs = (figures.get(subject, {}).get(name, Estimate(math.nan)) for subject in (MFN, baseline))
        met = None if math.isnan(ours.value) else meets(ours.value)
        return cls(criterion, met, name, ours, baseline, theirs)

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
    """Prediction of the paper."""
    criterion: str
    """Conditions for the outcomes "confirmed" and "partly"."""
    outcome: Outcome
    reason: str
    """Sentence with the estimates that decided."""
    headline: str
    """Name of the measure that decided."""
    figures: dict[str, dict[str, Estimate]]
    """Subject -> name of a measure -> estimate, averaged over layers and seeds."""
    baseline: str
    """Subject that the headline is compared with."""
    paper_criterion: PaperCriterion
    """The paper's own criterion, next to the stricter `criterion`."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further measures: by layer, by seed, curves. Types of JSON and `Estimate` only."""

    def to_json(self) -> dict[str, Any]:
        """Returns the fields in types of JSON.

        Estimates become `{"value", "low", "high"}`; what is not finite becomes null.
        """
        return {name: plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PredictionResult:
        """Returns the result that `to_json` made the record from. Estimates in `details` stay mappings.

        Raises:
            ValueError: If the record is of something else.
        """
        return parse_json(json.dumps(dict(record)), cls)


def estimates_of(record: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Estimate]]:
    """Returns the estimates by subject and name that [`plain`] made the record from; `ValueError` for others."""
    return parse_json(json.dumps(record), dict[str, dict[str, Estimate]])


def plain(value: Any) -> Any:
    """Returns the value with estimates and NumPy numbers, at any depth, in types of JSON."""
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
    "FINE_TUNED_SAE",
    "MFN",
    "NO_RATE_LOSS",
    "POST_HOC_SAE",
    "RANDOM_SAE",
    "RESIDUAL_STREAM",
    "Estimates",
    "Outcome",
    "PaperCriterion",
    "PredictionResult",
    "Subjects",
    "estimates_of",
    "plain",
]
