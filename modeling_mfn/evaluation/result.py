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
    """A figure and its interval of 95 %; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.value:.3g}{interval}"


@dataclass(frozen=True)
class PaperCriterion:
    """What the paper's own table (section 7) asks for. The paper says nothing of intervals: the figure by itself meets
    it or not."""

    criterion: str
    met: bool | None
    """`None` where it was not measured."""
    name: str
    """Of the figure."""
    figure: Figure
    baseline: str
    """The subject that the paper compares with."""
    baseline_figure: Figure

    @classmethod
    def judged(
        cls,
        criterion: str,
        figures: Mapping[str, Mapping[str, Figure]],
        name: str,
        meets: Callable[[float], bool],
        baseline: str,
    ) -> PaperCriterion:
        """Of the figure `name` of the MFN models; NaN stands for a subject that was not measured."""
        figure, against = (figures.get(subject, {}).get(name, Figure(math.nan)) for subject in (MFN, baseline))
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
    figures: dict[str, dict[str, Figure]]
    """Subject -> name -> figure, averaged over layers and seeds."""
    baseline: str
    """The subject that the headline is compared with."""
    paper_criterion: PaperCriterion
    """The paper's own, beside the stricter `criterion`."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else was measured: by layer, by seed, curves. JSON's types and `Figure`s alone."""

    def to_json(self) -> dict[str, Any]:
        """Figures become `{"value", "low", "high"}`, and what is not finite null."""
        return {name: plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PredictionResult:
        """The result that `to_json` made the record of; figures in `details` stay mappings."""
        paper = record["paper_criterion"]
        figures = {name: _figure_of(paper[name]) for name in ("figure", "baseline_figure")}
        changed = {"figures": figures_of(record["figures"]), "paper_criterion": PaperCriterion(**{**paper, **figures})}
        return cls(**{**record, **changed})


def bootstrap(statistic: Callable[..., Any], *samples: np.ndarray, resamples: int = 1000, seed: int = 0) -> Figure:
    """A statistic of samples, with the percentile interval of 95 % from resampling them along their first axis.

    Args:
        statistic: takes the resampled samples, an array (n, ...) each, and gives a number.
        samples: arrays (n, ...) of the same n independent units: windows of text, concepts, features. Several are
            resampled together.
    """
    value, numbers = float(statistic(*samples)), np.arange(len(samples[0]))
    if len(numbers) < 2:
        return Figure(value)
    found = stats.bootstrap(
        (numbers,),
        lambda rows: statistic(*(of[rows] for of in samples)),
        vectorized=False,
        n_resamples=resamples,
        batch=100,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=seed,
    )
    return Figure(value, *map(float, found.confidence_interval))


def mean(values: Sequence[float] | np.ndarray, groups: Sequence[Any] | np.ndarray | None = None) -> Figure:
    """The mean of independent values, NaN ones left out, with Student's t interval: a percentile bootstrap of ten
    values is too narrow and holds their mean in 88 to 90 % of cases instead of 95.

    Args:
        values: (n,).
        groups: (n,) what each belongs to. Each group counts as much as another, however many values it has; they are
            taken to spread alike around their groups' means. By default all are of one.
    """
    values = np.asarray(values, np.float64)
    known = ~np.isnan(values)
    if not known.any():
        return Figure(math.nan)
    values = values[known]
    numbers = np.unique(np.zeros(len(values)) if groups is None else np.asarray(groups)[known], return_inverse=True)[1]
    counts = np.bincount(numbers)
    means = np.bincount(numbers, values) / counts
    value, freedom = float(means.mean()), len(values) - len(counts)
    if freedom == 0:
        return Figure(value)
    variance = ((values - means[numbers]) ** 2).sum() / freedom
    margin = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(variance * (1 / counts).sum()) / len(counts)
    return Figure(value, float(value - margin), float(value + margin))


def mean_of_pairs(values: np.ndarray, ends: np.ndarray, weights: np.ndarray | None = None) -> Figure:
    """The mean of values that belong to pairs, NaN ones left out. Two pairs with an end in common are taken to be
    correlated, in a way that their residuals tell: sums of products over all such couples of pairs are in the variance
    (Fafchamps & Gubert 2007, "The formation of risk sharing networks"; Aronow et al. 2015), which is never less than
    that of independent values. Of pairs without any end in common, all of one weight, the interval is `mean`'s.

    Args:
        values: (P,).
        ends: (P, 2) int, numbers of what is paired.
        weights: (P,), at least 0; equal ones by default.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones(len(values)) if weights is None else weights
    known = ~np.isnan(values) & (weights > 0)
    if not known.any():
        return Figure(math.nan)
    values, shares = values[known], weights[known] / weights[known].sum()
    value = float(shares @ values)
    names, places = np.unique(ends[known], return_inverse=True)
    independent = len(names) / 2  # pairs, if none of them had an end in common
    if independent < 2:
        return Figure(value)
    residuals = shares * (values - value)
    at_ends = np.bincount(places.ravel(), np.repeat(residuals, 2))
    alone = residuals @ residuals
    variance = max(at_ends @ at_ends - alone, alone) * independent / (independent - 1)
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, independent - 1) * math.sqrt(variance))
    return Figure(value, value - margin, value + margin)


def difference(ours: Figure, theirs: Figure) -> Figure:
    """Of two independent figures whose intervals are symmetric."""
    value, margin = ours.value - theirs.value, math.hypot(ours.high - ours.value, theirs.high - theirs.value)
    return Figure(value, value - margin, value + margin)


def less_by_seed(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Differences from the same seed of a baseline, or from the mean of its seeds where it lacks that one."""
    average = float(np.mean(theirs))
    return [own - (theirs[seed] if seed < len(theirs) else average) for seed, own in enumerate(ours)]


def figures_of(record: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Figure]]:
    """Subject -> name -> figure, of what `plain` made of it."""
    return {subject: {name: _figure_of(of) for name, of in own.items()} for subject, own in record.items()}


def _figure_of(record: Mapping[str, Any]) -> Figure:
    return Figure(*(math.nan if part is None else part for part in record.values()))


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


__all__ = [
    "Figure", "PaperCriterion", "PredictionResult", "Subjects", "bootstrap", "difference", "figures_of", "less_by_seed",
    "mean", "mean_of_pairs", "plain",
]  # fmt: skip
