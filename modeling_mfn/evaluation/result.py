"""What a prediction's measurement is: figures with their intervals, of the MFN models and of each baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

from ..modeling_mfn import MFNForCausalLM

MFN, POST_HOC_SAE, RANDOM_SAE, NO_RATE_LOSS = "MFN", "post-hoc SAE", "random SAE", "MFN without rate loss"
RESIDUAL_STREAM = "residual stream"
"""What a figure can be of. A post-hoc SAE is an `MFNForCausalLM`, too: the frozen base model, at alpha = 0, whose MFN
layers were trained to reconstruct and nothing else. At alpha = 1 it is the SAE spliced in."""

Subjects = Mapping[str, Sequence[MFNForCausalLM]]
"""Name, one of the above -> its models, one a seed, all with MFN layers in the same blocks and of the same m and k."""

Outcome = Literal["confirmed", "partly", "not confirmed", "not measured"]
CONFIDENCE = 0.95


class Figure(NamedTuple):
    """A figure and its bootstrap interval of 95 %; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.value:.3g}{interval}"


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
    figures: dict[str, dict[str, Figure]]
    """Subject -> name -> figure, averaged over layers and seeds."""
    baseline: str
    """The subject that the headline is compared with."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else was measured: by layer, by seed, curves. JSON's types and `Figure`s alone."""

    def to_json(self) -> dict[str, Any]:
        """Figures become `{"value", "low", "high"}`, and what is not finite null."""
        return {name: plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PredictionResult:
        """The result that `to_json` made the record of; figures in `details` stay mappings."""
        return cls(**{**record, "figures": figures_of(record["figures"])})


def bootstrap(statistic: Callable[..., Any], *samples: np.ndarray, resamples: int = 1000, seed: int = 0) -> Figure:
    """A statistic of samples, with the percentile interval of 95 % from resampling them along their first axis.

    Args:
        statistic: takes the resampled samples, an array (n, ...) each, and gives a number.
        samples: arrays (n, ...) of the same n independent units: windows of text, concepts, features. Several are
            resampled together.
    """
    value, numbers = float(statistic(*samples)), np.arange(len(samples[0]))
    return _with_interval(value, numbers, lambda rows: statistic(*(of[rows] for of in samples)), False, resamples, seed)


def mean(values: Sequence[float] | np.ndarray, seed: int = 0) -> Figure:
    """The mean of independent values, NaN ones left out, with its bootstrap interval."""
    kept = np.asarray(values, np.float64)
    kept = kept[~np.isnan(kept)]
    return _with_interval(float(kept.mean()), kept, np.mean, True, 1000, seed) if len(kept) else Figure(math.nan)


def _with_interval(
    value: float, units: np.ndarray, statistic: Callable[..., Any], vectorized: bool, resamples: int, seed: int
) -> Figure:
    if len(units) < 2:
        return Figure(value)
    found = stats.bootstrap(
        (units,),
        statistic,
        vectorized=vectorized,
        n_resamples=resamples,
        batch=100,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=seed,
    )
    return Figure(value, *map(float, found.confidence_interval))


def figures_of(record: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Figure]]:
    """Subject -> name -> figure, of what `plain` made of it."""
    return {
        subject: {
            name: Figure(*(math.nan if part is None else part for part in of.values())) for name, of in own.items()
        }
        for subject, own in record.items()
    }


def plain(value: Any) -> Any:
    """Figures and numpy's numbers as what JSON has."""
    if isinstance(value, Figure):
        return {name: plain(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["Figure", "PredictionResult", "Subjects", "bootstrap", "figures_of", "mean", "plain"]
