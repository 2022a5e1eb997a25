"""P4: interventions on z change predictably what follows. First-order predictions against what they really do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ...data.windows import Windows
from ...model.modeling_mfn import MFNForCausalLM
from ..intervals import Estimate, bootstrap, less_by_seed, mean
from ..measures.first_order import response_figures
from ..measures.intervention_effects import Bench, Push, Response, Site, exact_copy, readers, sample_sites
from ..result import MFN, POST_HOC_SAE, Outcome, PaperCriterion, PredictionResult, Subjects

STRENGTHS = (0.0, 0.5, 1.5, 2.0, 4.0)
"""Multiples of a feature's activation that it is set to; 0 ablates it."""
LATER = 8
"""Tokens behind an intervention that its effects are looked for on."""
EFFECTS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, math.inf)
"""Edges of the classes of size of effect, in nats of KL at the token."""
FEATURE, RANDOM_DIRECTION, ADDED = "feature", "random direction", "inactive feature"
HEADLINE, DOSE = "correlation of logits", "dose response"
HEADS, MLPS = "correlation of attention", "correlation of MLP"
FLIPS = "interventions with a later feature replaced"
WITH_FLIP, WITHOUT_FLIP = f"{HEADLINE}, a later feature replaced", f"{HEADLINE}, none replaced"
LEVEL, DOSE_LEVEL = 0.8, 0.9
MEDIANS = ("relative error", "KL", "later KL")
"""Figures whose large values would drown the rest in a mean."""
PAPER_CRITERION = (
    "A predictable change of logits under controlled interventions on z, for which the paper names no number: here a "
    f"correlation of the first-order prediction with the real change above {LEVEL}; baseline: perturbation tests, "
    "random directions of the same norm."
)
CRITERION = (
    "Predicted is the first-order change, from the derivative along the intervention. Judged are the MFN layers before "
    "the last one, where there are several: behind the last one no feature can be replaced, and first order is nearly "
    "exact. Confirmed: at ablation the predicted and the real change (a) of the logits at the token correlate by more "
    f"than {LEVEL}, and the logit predicted to move most follows the dose with a Spearman correlation above "
    f"{DOSE_LEVEL}; (b) those of attention heads and MLPs correlate by more than {LEVEL}, too; (c) the correlation of "
    "logits is higher than that of a random direction of the same norm and than that of post-hoc SAEs spliced in. Each "
    "with its interval, that of the paired difference, and in every seed. Partly: (a), in the same sense, unless both "
    "baselines are surely more predictable. The paper asks for a predictable logit change, and claims heads and MLPs."
)

Measured = dict[str, dict[str, np.ndarray]]
"""Kind of intervention -> figure -> values (sites, layers, S), or (sites, layers, 1) where all strengths make one."""


def measure_interventions(
    model: MFNForCausalLM,
    sites: Sequence[Site],
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    description: str = "interventions",
) -> Measured:
    """Intervenes at each site on a random active feature of each layer, and compares with what the derivative says:
    the figures of [`first_order.response_figures`]. The model runs at alpha = 1, in float64.

    Kinds of interventions: `feature`, its activation a set to strength * a; `random direction`, the same place moved as
    far along a direction without a meaning; and `inactive feature`, one that is active on some token before but not at
    the site, raised by as much, at strengths above 1. NaN where a layer has no active feature.

    Args:
        model: an MFN model; it stays as it is.
        sites: where to intervene.
        strengths: multiples of the activation, without 1.
        seed: of the choice of features and directions.
        description: shown beside the progress bar.
    """
    twin = exact_copy(model)
    layers = twin.config.layers
    found: Measured = {}
    for place, site in enumerate(tqdm(sites, description, leave=False)):
        bench = Bench(twin, site)
        for row, layer in enumerate(layers):
            random = np.random.default_rng((seed, place, layer))
            for kind, changes, response in _interventions(bench, layer, np.array(strengths) - 1, random):
                baseline = bench.baseline["logits"][0]
                for name, values in response_figures(response, changes, baseline, readers(twin, layer)).items():
                    shape = (len(sites), len(layers), len(values))
                    array = found.setdefault(kind, {}).setdefault(name, np.full(shape, np.nan))
                    array[place, row] = values
    return found


def _interventions(
    bench: Bench, layer: int, changes: np.ndarray, random: np.random.Generator
) -> Iterator[tuple[str, np.ndarray, Response]]:
    """Kind, changes and response of each intervention at one layer."""
    active = bench.activations(layer)
    if not active:
        return
    feature = int(random.choice(list(active)))
    direction = torch.from_numpy(random.standard_normal(bench.model.config.hidden_size))
    pushes = [Push(feature), Push(feature, direction / direction.norm())]
    both = bench.responses(layer, pushes, active[feature], changes)
    yield from ((kind, changes, response) for kind, response in zip((FEATURE, RANDOM_DIRECTION), both, strict=True))
    up, others = changes[changes > 0], bench.seen_before(layer)
    if len(up) and others:
        (response,) = bench.responses(layer, [Push(int(random.choice(others)))], active[feature], up)
        yield ADDED, up, response


def intervention_predictability(
    subjects: Subjects,
    windows: Windows,
    *,
    interventions: int = 32,
    later: int = LATER,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> PredictionResult:
    """P4 of the paper (section 7): does a change of z do to logits, heads and MLPs what the model's derivative says?

    The prediction is the first-order one, the directional derivative along the intervention by a central difference
    through the real forward in float64. Intervals are over sites, tokens of the text at which all models, layers and
    strengths are measured; differences are paired by site. Where TopK chooses other features in a later MFN layer, the
    derivative misses a jump: figures say how often, and what the correlation is with and without. So they are of the
    MFN layers before the last one, where there are several, but for those that name a layer. First order predicts any
    small change well: what it predicts of a random direction of the same norm stands beside, and figures by size of
    effect in the details.

    Args:
        subjects: `MFN`, and `post-hoc SAE`, which is spliced in: all run at alpha = 1. Others are left out.
        windows: held-out text.
        interventions: how many sites; at each, one feature of every layer of every model.
        later: tokens after a site that effects are measured on, too; at least 1.
        strengths: multiples of the activation, 0 among them, without 1.
        seed: of sites, features, directions and the bootstrap.

    Raises:
        ValueError: if strengths lack 0 or have 1, later is below 1, or windows are too short.
    """
    if 0 not in strengths or 1 in strengths or later < 1:
        raise ValueError(f"strengths are {strengths} and later is {later}; give 0 among them, not 1, and at least 1")
    sites = sample_sites(windows, interventions, later, seed)
    given = {name: subjects[name] for name in (MFN, POST_HOC_SAE) if subjects.get(name)}
    layers = next(iter(given.values()))[0].config.layers if given else []
    found: Measured = {}
    for name, of_name in given.items():
        models = [measure_interventions(model, sites, strengths, seed, name) for model in of_name]
        for kind in (kind for kind in models[0] if all(kind in each for each in models)):
            subject = name if kind == FEATURE else f"{kind} in {name}"
            found[subject] = _with_flips(
                {figure: np.stack([each[kind][figure] for each in models], axis=1) for figure in models[0][kind]}
            )
    judged = slice(0, max(1, len(layers) - 1))
    before_last = {
        name: {figure: array[:, :, judged] for figure, array in values.items()} for name, values in found.items()
    }
    figures = {
        name: _overall(before_last[name], strengths, seed) | _of_layers(values, strengths, layers, seed)
        for name, values in found.items()
    }
    baselines = [name for name in (f"{RANDOM_DIRECTION} in {MFN}", POST_HOC_SAE) if name in found and MFN in found]
    at = list(strengths).index(0)
    differences = {name: _difference(before_last[MFN][HEADLINE], before_last[name][HEADLINE], at) for name in baselines}
    by_seed = {name: _by_seed(before_last[name], at) for name in (MFN, *baselines) if name in found}
    outcome, reason = _verdict(figures, differences, by_seed, layers)
    details = {
        "judged_layers": list(layers[judged]),
        "difference": differences,
        "by_seed": by_seed,
        "by_strength": {name: _by_strength(values, strengths, seed) for name, values in before_last.items()},
        "by_effect": {name: _by_effect(values) for name, values in before_last.items()},
        "by_layer": {name: _by_layer(values, strengths, layers) for name, values in found.items()},
    }
    claim = "Interventions on z predictably modulate attention heads, MLPs and logits."
    perturbed = f"{RANDOM_DIRECTION} in {MFN}"
    paper = PaperCriterion.judged(PAPER_CRITERION, figures, HEADLINE, lambda r: r > LEVEL, perturbed)
    return PredictionResult("P4", claim, CRITERION, outcome, reason, HEADLINE, figures, POST_HOC_SAE, paper, details)


def _with_flips(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Figures, and those of whether an intervention replaced a feature of a later MFN layer."""
    replaced, correlation = values["replaced features"], values[HEADLINE]
    flips = np.where(np.isnan(replaced), np.nan, replaced > 0)
    return values | {
        FLIPS: flips,
        WITH_FLIP: np.where(flips == 1, correlation, np.nan),
        WITHOUT_FLIP: np.where(flips == 0, correlation, np.nan),
    }


def _strengths(values: dict[str, np.ndarray], strengths: Sequence[float]) -> list[float]:
    """Those that a subject's figures are at: an inactive feature can only be raised."""
    number = max(array.shape[-1] for array in values.values())
    return list(strengths) if number == len(strengths) else [strength for strength in strengths if strength > 1]


def _figure(name: str, values: np.ndarray, seed: int, resamples: int = 1000) -> Estimate:
    """Of values (sites, ...), NaN left out, the mean or median with its interval, by bootstrap over sites."""
    values = values.reshape(len(values), -1)
    known = ~np.isnan(values)
    values, known = values[known.any(1)], known[known.any(1)]
    if not len(values):
        return Estimate(math.nan)
    if name in MEDIANS:
        return bootstrap(lambda v, k: np.median(v[k]), values, known, resamples=resamples, seed=seed)
    sums, counts = np.where(known, values, 0).sum(1), known.sum(1)
    return bootstrap(lambda total, number: total.sum() / number.sum(), sums, counts, resamples=resamples, seed=seed)


def _at(values: dict[str, np.ndarray], strengths: Sequence[float]) -> int:
    """The strength that stands for all: ablation, or, of an inactive feature, raising it by about one activation."""
    given = _strengths(values, strengths)
    return given.index(0) if 0 in given else int(np.argmin([abs(strength - 2) for strength in given]))


def _overall(values: dict[str, np.ndarray], strengths: Sequence[float], seed: int) -> dict[str, Estimate]:
    at = _at(values, strengths)
    return {name: _figure(name, array[..., at if array.shape[-1] > 1 else 0], seed) for name, array in values.items()}


def _of_layer(layer: int) -> str:
    return f"{HEADLINE}, layer {layer}"


def _of_layers(
    values: dict[str, np.ndarray], strengths: Sequence[float], layers: Sequence[int], seed: int
) -> dict[str, Estimate]:
    """The headline of each MFN layer, also of the last one."""
    at = _at(values, strengths)
    return {
        _of_layer(layer): _figure(HEADLINE, values[HEADLINE][:, :, row, at], seed) for row, layer in enumerate(layers)
    }


def _by_strength(values: dict[str, np.ndarray], strengths: Sequence[float], seed: int) -> dict[float, Any]:
    """Curves, for which fewer resamples will do."""
    return {
        strength: {
            name: _figure(name, array[..., at], seed, 200) for name, array in values.items() if array.shape[-1] > 1
        }
        for at, strength in enumerate(_strengths(values, strengths))
    }


def _by_effect(values: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The headline over interventions of all strengths whose KL lies between two edges."""
    found = []
    for low, high in pairwise(EFFECTS):
        chosen = values[HEADLINE][(values["KL"] >= low) & (values["KL"] < high)]
        found.append({"KL from": low, "KL below": high, HEADLINE: _mean(chosen), "interventions": len(chosen)})
    return found


def _by_layer(
    values: dict[str, np.ndarray], strengths: Sequence[float], layers: Sequence[int]
) -> dict[int, dict[str, float]]:
    """Correlations, and how often and how many later features are replaced, averaged over sites and seeds."""
    names, at = [name for name in values if name.startswith(("correlation", "replaced", FLIPS))], _at(values, strengths)
    return {layer: {name: _mean(values[name][:, :, row, at]) for name in names} for row, layer in enumerate(layers)}


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _difference(ours: np.ndarray, theirs: np.ndarray, at: int) -> Estimate:
    """Of the averages over seeds and layers, paired by site."""
    averages = [_site_means(values[..., at]) for values in (ours, theirs)]
    return mean(averages[0] - averages[1])


def _by_seed(values: dict[str, np.ndarray], at: int) -> dict[str, list[float]]:
    """What is judged, averaged over sites and layers."""
    arrays = {
        name: values[name][..., at if values[name].shape[-1] > 1 else 0] for name in (HEADLINE, DOSE, HEADS, MLPS)
    }
    return {name: [_mean(of[:, seed]) for seed in range(of.shape[1])] for name, of in arrays.items()}


def _site_means(values: np.ndarray) -> np.ndarray:
    """(sites, ...) -> (sites,), NaN left out."""
    flat = values.reshape(len(values), -1)
    known = ~np.isnan(flat)
    return np.where(known.any(1), np.where(known, flat, 0).sum(1) / np.maximum(known.sum(1), 1), np.nan)


def _verdict(
    figures: dict[str, dict[str, Estimate]],
    differences: dict[str, Estimate],
    by_seed: dict[str, dict[str, list[float]]],
    layers: Sequence[int],
) -> tuple[Outcome, str]:
    missing = [name for name in (MFN, POST_HOC_SAE) if name not in figures]
    if missing:
        return "not measured", f"no model to intervene on is given of: {', '.join(missing)}"
    ours, theirs, seeds = figures[MFN], figures[POST_HOC_SAE], by_seed[MFN]

    def above(name: str, level: float) -> bool:
        return ours[name].low > level and min(seeds[name]) > level

    # the last block has no attention behind its MFN layer
    written = [name for name in (HEADS, MLPS) if not math.isnan(ours[name].value)]
    predictable = above(HEADLINE, LEVEL) and above(DOSE, DOSE_LEVEL)
    more = all(
        difference.low > 0 and min(less_by_seed(seeds[HEADLINE], by_seed[name][HEADLINE])) > 0
        for name, difference in differences.items()
    )
    less = all(difference.high < 0 for difference in differences.values())
    outcome: Outcome = "not confirmed"
    if predictable and more and all(above(name, LEVEL) for name in written):
        outcome = "confirmed"
    elif predictable and not less:
        outcome = "partly"
    of_layers = ", ".join(f"{ours[_of_layer(layer)].value:.3g} at {layer}" for layer in layers)
    last = f", of which {layers[-1]}, the last MFN layer, is not judged" if len(layers) > 1 else ""
    against = ", ".join(f"{difference} against {name}" for name, difference in differences.items())
    flipped = "" if math.isnan(ours[FLIPS].value) else (
        f" After {ours[FLIPS].value:.0%} of the interventions a feature of a later MFN layer was replaced; logits "
        f"correlate by {ours[WITH_FLIP]} in these and by {ours[WITHOUT_FLIP]} in the others."
    )  # fmt: skip
    reason = (
        f"Predicted and real change of logits correlate by {ours[HEADLINE]} at ablation (by block: {of_layers}{last}), "
        f"in post-hoc SAEs by {theirs[HEADLINE]} (difference {against}); of attention by {ours[HEADS]}, of MLPs by "
        f"{ours[MLPS]}; dose response is {ours[DOSE]}.{flipped}"
    )
    return outcome, reason


__all__ = ["intervention_predictability", "measure_interventions"]
