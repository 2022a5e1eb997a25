"""P4, causal interventions: "Direct interventions on z predictably modulate attention heads / MLP behavior."

Measured: the first-order prediction of an intervention, its directional derivative by a central difference in float64,
against its real effect on logits, attention heads and MLPs.

- First order predicts any small change well. A random direction of the same norm, and measures by size of effect, show
  how much of the agreement is due to that.
- Where TopK chooses other features in a later MFN layer, the derivative misses a jump. Measures say how often that
  happens, and what the correlation is with and without it.
- Behind the last MFN layer no feature can be replaced, and first order is nearly exact. Where there are several MFN
  layers, the last one is measured but not judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..intervals import Estimate, bootstrap, differences_by_seed, mean
from ..measures.first_order import FEATURE, RANDOM_DIRECTION, STRENGTHS, measure_interventions
from ..measures.intervention_effects import sample_sites
from ..result import MFN, POST_HOC_SAE, Estimates, Outcome, PaperCriterion, PredictionResult, Subjects

if TYPE_CHECKING:
    from ...data.windows import Windows

CLAIM = "Interventions on z predictably modulate attention heads, MLPs and logits."
MIN_CORRELATION, MIN_DOSE_RESPONSE = 0.8, 0.9
PAPER_CRITERION = (
    "A predictable change of logits under controlled interventions on z. The paper names no number: here the "
    f"correlation of the first-order prediction with the real change is above {MIN_CORRELATION}. Baseline: "
    "perturbation tests, which are random directions of the same norm."
)
CRITERION = (
    "Predicted is the first-order change, from the derivative along the intervention. "
    "Judged are the MFN layers before the last one, where there are several. Behind the last one no feature can be "
    "replaced, and first order is nearly exact. "
    "Confirmed if all of these hold at ablation, each with its interval and in every seed. "
    f"(a) Predicted and real changes of the logits at the token correlate by more than {MIN_CORRELATION}, and the "
    f"logit predicted to move most follows the dose with a Spearman correlation above {MIN_DOSE_RESPONSE}. "
    f"(b) Those of attention heads and MLPs correlate by more than {MIN_CORRELATION}, too. "
    "(c) The correlation of logits is higher than along a random direction of the same norm, and than in post-hoc SAEs "
    "that are spliced in, by paired differences. "
    "Partly confirmed if (a) holds in the same sense, unless both baselines are surely more predictable. "
    "The paper asks for a predictable logit change, and claims heads and MLPs."
)
LATER_TOKENS = 8
"""Tokens behind an intervention on which its effects are measured, too."""
HEADLINE, DOSE = "correlation of logits", "dose response"
HEADS, MLPS = "correlation of attention", "correlation of MLP"
FLIPS = "interventions with a later feature replaced"
WITH_FLIP, WITHOUT_FLIP = f"{HEADLINE}, a later feature replaced", f"{HEADLINE}, none replaced"
MEDIANS = ("relative error", "KL", "later KL")
"""Measures that are averaged by the median: large values would dominate a mean."""
EFFECT_EDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, math.inf)
"""Edges of classes of size of effect, in nats of KL at the token."""
CURVE_RESAMPLES = 200
PERTURBATION = f"{RANDOM_DIRECTION} in {MFN}"
"""Subject that stands for the paper's perturbation tests."""


def intervention_predictability(
    subjects: Subjects,
    windows: Windows,
    *,
    interventions: int = 32,
    later: int = LATER_TOKENS,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> PredictionResult:
    """Measures P4.

    All models, layers and strengths are measured at the same sites, which are tokens of the text. Intervals are over
    sites, and differences are paired by site. Measures are of the MFN layers before the last one, where there are
    several, unless they name a layer.

    Args:
        subjects: MFN models and post-hoc SAEs, which run at alpha = 1. Other subjects are left out.
        windows: held-out text.
        interventions: number of sites. At each, one feature of every layer of every model is changed.
        later: tokens after a site on which effects are measured, too; at least 1.
        strengths: multiples of the activation, with 0 and without 1.
        seed: seed of sites, features, directions and the bootstrap.

    Raises:
        ValueError: if strengths lack 0 or have 1, `later` is below 1, or windows are too short.
    """
    if 0 not in strengths or 1 in strengths or later < 1:
        raise ValueError(f"strengths are {strengths} and later is {later}; give 0 among them, not 1, and at least 1")
    sites = sample_sites(windows, interventions, later, seed)
    given = {name: subjects[name] for name in (MFN, POST_HOC_SAE) if subjects.get(name)}
    layers = next(iter(given.values()))[0].config.layers if given else []
    found: dict[str, _Values] = {}
    for name, models in given.items():
        measured = [measure_interventions(model, sites, strengths, seed, name) for model in models]
        for kind in (kind for kind in measured[0] if all(kind in each for each in measured)):
            subject = name if kind == FEATURE else f"{kind} in {name}"
            found[subject] = _Values.of([each[kind] for each in measured], strengths)

    judged_layers = slice(0, max(1, len(layers) - 1))
    judged = {name: values.of_layers(judged_layers) for name, values in found.items()}
    estimates = {
        name: judged[name].estimates(seed) | _of_each_layer(values, layers, seed) for name, values in found.items()
    }
    baselines = [name for name in (PERTURBATION, POST_HOC_SAE) if name in found and MFN in found]
    differences = {name: _difference(judged[MFN], judged[name]) for name in baselines}
    by_seed = {name: _by_seed(judged[name]) for name in (MFN, *baselines) if name in found}
    outcome, reason = _judge(estimates, differences, by_seed, layers)
    details = {
        "judged_layers": list(layers[judged_layers]),
        "difference": differences,
        "by_seed": by_seed,
        "by_strength": {name: _by_strength(values, seed) for name, values in judged.items()},
        "by_effect": {name: _by_effect(values) for name, values in judged.items()},
        "by_layer": {name: _by_layer(values, layers) for name, values in found.items()},
    }
    paper = PaperCriterion.judged(PAPER_CRITERION, estimates, HEADLINE, lambda r: r > MIN_CORRELATION, PERTURBATION)
    return PredictionResult("P4", CLAIM, CRITERION, outcome, reason, HEADLINE, estimates, POST_HOC_SAE, paper, details)


@dataclass(frozen=True)
class _Values:
    """Measures of one subject at all sites."""

    arrays: dict[str, np.ndarray]
    """Measure -> (sites, seeds, layers, S), or (sites, seeds, layers, 1) for measures over all strengths."""
    strengths: list[float]
    """S strengths. An inactive feature can only be raised, so its strengths are above 1."""

    @classmethod
    def of(cls, models: Sequence[Mapping[str, np.ndarray]], strengths: Sequence[float]) -> _Values:
        """Stacks the measures of several seeds, and adds whether a feature of a later MFN layer was replaced."""
        arrays = {name: np.stack([each[name] for each in models], axis=1) for name in models[0]}
        replaced, correlation = arrays["replaced features"], arrays[HEADLINE]
        flips = np.where(np.isnan(replaced), np.nan, replaced > 0)
        arrays[FLIPS] = flips
        arrays[WITH_FLIP] = np.where(flips == 1, correlation, np.nan)
        arrays[WITHOUT_FLIP] = np.where(flips == 0, correlation, np.nan)
        whole = correlation.shape[-1] == len(strengths)
        return cls(arrays, list(strengths) if whole else [strength for strength in strengths if strength > 1])

    def of_layers(self, layers: slice) -> _Values:
        return _Values({name: array[:, :, layers] for name, array in self.arrays.items()}, self.strengths)

    def at_reference(self, name: str) -> np.ndarray:
        """(sites, seeds, layers) at ablation, or where an inactive feature is raised by about one activation."""
        array, given = self.arrays[name], self.strengths
        place = given.index(0) if 0 in given else int(np.argmin([abs(strength - 2) for strength in given]))
        return array[..., place if array.shape[-1] > 1 else 0]

    def estimates(self, seed: int) -> dict[str, Estimate]:
        """Estimates at the reference strength."""
        return {name: _estimate(name, self.at_reference(name), seed) for name in self.arrays}


def _estimate(name: str, values: np.ndarray, seed: int, resamples: int = 1000) -> Estimate:
    """Mean or median of values (sites, ...) without NaN, with its bootstrap interval over sites."""
    values = values.reshape(len(values), -1)
    known = ~np.isnan(values)
    values, known = values[known.any(1)], known[known.any(1)]
    if not len(values):
        return Estimate(math.nan)
    if name in MEDIANS:
        return bootstrap(lambda v, k: np.median(v[k]), values, known, resamples=resamples, seed=seed)
    sums, counts = np.where(known, values, 0).sum(1), known.sum(1)
    return bootstrap(lambda total, number: total.sum() / number.sum(), sums, counts, resamples=resamples, seed=seed)


def _of_each_layer(values: _Values, layers: Sequence[int], seed: int) -> dict[str, Estimate]:
    """Headline of each MFN layer, also of the last one."""
    correlations = values.at_reference(HEADLINE)
    return {_at_layer(layer): _estimate(HEADLINE, correlations[..., row], seed) for row, layer in enumerate(layers)}


def _at_layer(layer: int) -> str:
    return f"{HEADLINE}, layer {layer}"


def _by_strength(values: _Values, seed: int) -> dict[float, dict[str, Estimate]]:
    """Curves over strengths, with fewer resamples."""
    curves = {name: array for name, array in values.arrays.items() if array.shape[-1] > 1}
    return {
        strength: {name: _estimate(name, array[..., at], seed, CURVE_RESAMPLES) for name, array in curves.items()}
        for at, strength in enumerate(values.strengths)
    }


def _by_effect(values: _Values) -> list[dict[str, Any]]:
    """Headline over interventions of all strengths, by class of KL."""
    correlations, divergences = values.arrays[HEADLINE], values.arrays["KL"]
    found = []
    for low, high in pairwise(EFFECT_EDGES):
        chosen = correlations[(divergences >= low) & (divergences < high)]
        found.append({"KL from": low, "KL below": high, HEADLINE: _mean(chosen), "interventions": len(chosen)})
    return found


def _by_layer(values: _Values, layers: Sequence[int]) -> dict[int, dict[str, float]]:
    """Correlations, and how often and how many later features are replaced, averaged over sites and seeds."""
    names = [name for name in values.arrays if name.startswith(("correlation", "replaced", FLIPS))]
    arrays = {name: values.at_reference(name) for name in names}
    return {layer: {name: _mean(of[..., row]) for name, of in arrays.items()} for row, layer in enumerate(layers)}


def _by_seed(values: _Values) -> dict[str, list[float]]:
    """Judged measures, averaged over sites and layers."""
    arrays = {name: values.at_reference(name) for name in (HEADLINE, DOSE, HEADS, MLPS)}
    return {name: [_mean(array[:, seed]) for seed in range(array.shape[1])] for name, array in arrays.items()}


def _difference(ours: _Values, theirs: _Values) -> Estimate:
    """Difference of the headline, averaged over seeds and layers and paired by site."""
    own, other = (_site_means(values.at_reference(HEADLINE)) for values in (ours, theirs))
    return mean(own - other)


def _site_means(values: np.ndarray) -> np.ndarray:
    """(sites,) mean of (sites, ...) without NaN."""
    flat = values.reshape(len(values), -1)
    known = ~np.isnan(flat)
    return np.where(known.any(1), np.where(known, flat, 0).sum(1) / np.maximum(known.sum(1), 1), np.nan)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _judge(
    estimates: Estimates,
    differences: Mapping[str, Estimate],
    by_seed: Mapping[str, Mapping[str, Sequence[float]]],
    layers: Sequence[int],
) -> tuple[Outcome, str]:
    """Applies `CRITERION`. Returns the outcome and the reason."""
    missing = [name for name in (MFN, POST_HOC_SAE) if name not in estimates]
    if missing:
        return "not measured", f"no model to intervene on is given of: {', '.join(missing)}"
    ours, seeds = estimates[MFN], by_seed[MFN]

    def above(name: str, limit: float) -> bool:
        return ours[name].low > limit and min(seeds[name]) > limit

    # the last block has no attention behind its MFN layer
    written = [name for name in (HEADS, MLPS) if not math.isnan(ours[name].value)]
    predictable = above(HEADLINE, MIN_CORRELATION) and above(DOSE, MIN_DOSE_RESPONSE)
    more = all(
        difference.low > 0 and min(differences_by_seed(seeds[HEADLINE], by_seed[name][HEADLINE])) > 0
        for name, difference in differences.items()
    )
    less = all(difference.high < 0 for difference in differences.values())
    outcome: Outcome = "not confirmed"
    if predictable and more and all(above(name, MIN_CORRELATION) for name in written):
        outcome = "confirmed"
    elif predictable and not less:
        outcome = "partly"
    return outcome, _reason(estimates, differences, layers)


def _reason(estimates: Estimates, differences: Mapping[str, Estimate], layers: Sequence[int]) -> str:
    ours, theirs = estimates[MFN], estimates[POST_HOC_SAE]
    of_layers = ", ".join(f"{ours[_at_layer(layer)].value:.3g} at {layer}" for layer in layers)
    last = f", of which {layers[-1]}, the last MFN layer, is not judged" if len(layers) > 1 else ""
    against = ", ".join(f"{difference} against {name}" for name, difference in differences.items())
    reason = (
        f"Predicted and real change of logits correlate by {ours[HEADLINE]} at ablation (by block: {of_layers}{last}), "
        f"in post-hoc SAEs by {theirs[HEADLINE]} (difference {against}); of attention by {ours[HEADS]}, of MLPs by "
        f"{ours[MLPS]}; dose response is {ours[DOSE]}."
    )
    if math.isnan(ours[FLIPS].value):
        return reason
    return reason + (
        f" After {ours[FLIPS].value:.0%} of the interventions a feature of a later MFN layer was replaced; logits "
        f"correlate by {ours[WITH_FLIP]} in these and by {ours[WITHOUT_FLIP]} in the others."
    )


__all__ = ["LATER_TOKENS", "intervention_predictability"]
