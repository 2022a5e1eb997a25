"""P1, firing-rate calibration: "Firing rates converge to target rho with low overlap across units."

Measured: how even firing rates are, how close to rho, how many features are silent, and how much features overlap.

The paper asks for a standard deviation of at most 0.05. That is little: rates are k / m on average, a few per cent.
Even very uneven rates deviate by less, and the rates of a random SAE, too. `CRITERION` therefore adds the coefficient
of variation, silent features and overlap. Overlap is judged by correlation: the mean co-activation of pairs depends on
the number of active features per token alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..intervals import Estimate, differences_by_seed, jackknife
from ..measures.firing_rates import CV, DEAD, OVERLAP, STD, LayerFiring, Replicates, measure_firing, target_rate
from ..result import (
    MFN,
    NO_RATE_LOSS,
    POST_HOC_SAE,
    RANDOM_SAE,
    Estimates,
    Outcome,
    PaperCriterion,
    PredictionResult,
    Subjects,
)

CLAIM = "Firing rates converge to the target rho, with low overlap across features."
MAX_STD = 0.05
MAX_DEAD_SHARE = 0.01
PAPER_CRITERION = f"A standard deviation of mean firing rates of at most {MAX_STD}; baseline: a random SAE."
CRITERION = (
    "Confirmed if all of these hold, each with its whole 95 % interval and in every seed. "
    f"(a) The standard deviation of firing rates is at most {MAX_STD}, the paper's criterion, which sparsity alone can "
    "meet. (b) The coefficient of variation is below that of the post-hoc SAE, of a random SAE, and of MFN without "
    f"rate loss. (c) At most {MAX_DEAD_SHARE:.0%} of the features are silent. (d) The overlap, as RMS correlation of "
    "when two features are active, is at most that of the post-hoc SAE. Partly confirmed if (a) holds in the same "
    "sense."
)


def firing_rate_calibration(
    subjects: Subjects, windows: Sequence[Mapping[str, Any]], rho: float | None = None, *, batch_size: int = 8
) -> PredictionResult:
    """Measures P1.

    Each measure is a mean over layers and seeds. Intervals are over windows, from a jackknife with 30 groups. The
    groups are the same for all models, so differences between subjects are paired.

    Args:
        subjects: MFN models, post-hoc SAEs, random SAEs and MFN models without the rate loss. The outcome needs all.
        windows: held-out text, at least two windows: rows with `input_ids` (T,), and `attention_mask` (T,) where they
            are padded. Features count as silent if they are silent on this text.
        rho: target firing rate, by default k / m.
        batch_size: windows per forward.

    Returns:
        Result with the measures of `rate_measures` and `overlap_measures`. Its details are `by_layer`, `by_seed`
        (values alone), `differences` (MFN minus a baseline), `rate_quantiles` (101, over the rates of all layers and
        seeds), `tokens` and `rho`.

    Raises:
        ValueError: if there is no model, there are fewer than two windows, no token counts, or `rho` is not between 0
            and 1.
    """
    if not any(subjects.values()):
        raise ValueError("subjects are empty; give at least one model")
    measured = {
        name: [measure_firing(model, windows, rho, batch_size=batch_size) for model in models]
        for name, models in subjects.items()
        if models
    }
    averages = {
        name: _average([layer for seed in seeds for layer in seed.values()]) for name, seeds in measured.items()
    }
    differences = {
        name: {measure: jackknife(values - average[measure]) for measure, values in averages[MFN].items()}
        for name, average in averages.items()
        if name != MFN and MFN in averages
    }
    estimates = {name: _estimates(average) for name, average in averages.items()}
    by_seed = {name: [_values(_average(list(seed.values()))) for seed in seeds] for name, seeds in measured.items()}
    outcome, reason = judge(estimates, differences, by_seed)
    return PredictionResult(
        prediction="P1",
        claim=CLAIM,
        criterion=CRITERION,
        outcome=outcome,
        reason=reason,
        headline=CV,
        figures=estimates,
        baseline=POST_HOC_SAE,
        paper_criterion=PaperCriterion.judged(PAPER_CRITERION, estimates, STD, lambda std: std <= MAX_STD, RANDOM_SAE),
        details={
            "by_layer": {name: _by_layer(seeds) for name, seeds in measured.items()},
            "by_seed": by_seed,
            "differences": differences,
            "rate_quantiles": {name: _rate_quantiles(seeds) for name, seeds in measured.items()},
            "tokens": {name: next(iter(seeds[0].values())).tokens for name, seeds in measured.items()},
            "rho": {name: target_rate(subjects[name][0], rho) for name in measured},
        },
    )


def judge(
    estimates: Estimates, differences: Estimates, by_seed: Mapping[str, Sequence[Mapping[str, float]]]
) -> tuple[Outcome, str]:
    """Applies `CRITERION`.

    Args:
        estimates: subject -> measure -> estimate.
        differences: baseline -> measure -> MFN minus the baseline.
        by_seed: subject -> measures of each seed.

    Returns:
        Outcome, and a sentence that gives the reason.
    """
    missing = [name for name in (MFN, POST_HOC_SAE, RANDOM_SAE, NO_RATE_LOSS) if name not in estimates]
    if missing:
        return "not measured", f"Not given: {', '.join(missing)}."
    ours = estimates[MFN]

    def at_most(measure: str, limit: float) -> tuple[bool, bool]:
        return ours[measure].high <= limit, max(seed[measure] for seed in by_seed[MFN]) <= limit

    def less(measure: str, baseline: str) -> tuple[float, float]:
        """High end of the difference, and its maximum over seeds."""
        own, other = ([seed[measure] for seed in by_seed[name]] for name in (MFN, baseline))
        return differences[baseline][measure].high, max(differences_by_seed(own, other))

    conditions = {f"standard deviation {ours[STD]} (at most {MAX_STD})": at_most(STD, MAX_STD)}
    for name in (POST_HOC_SAE, RANDOM_SAE, NO_RATE_LOSS):
        high, highest = less(CV, name)
        text = f"coefficient of variation {ours[CV]} (below {estimates[name][CV]} of the {name})"
        conditions[text] = high < 0, highest < 0
    conditions[f"dead share {ours[DEAD]} (at most {MAX_DEAD_SHARE})"] = at_most(DEAD, MAX_DEAD_SHARE)
    high, highest = less(OVERLAP, POST_HOC_SAE)
    text = f"overlap {ours[OVERLAP]} (at most the post-hoc SAE's {estimates[POST_HOC_SAE][OVERLAP]})"
    conditions[text] = high <= 0, highest <= 0

    kinds = {"Met": (True, True), "Met, but not in every seed": (True, False)}
    sorted_out = {kind: [text for text, met in conditions.items() if met == of] for kind, of in kinds.items()}
    sorted_out["Not met"] = [text for text, (surely, _) in conditions.items() if not surely]
    reason = " ".join(f"{kind}: {'; '.join(texts)}." for kind, texts in sorted_out.items() if texts)
    met = [all(each) for each in conditions.values()]
    outcome: Outcome = "confirmed" if all(met) else "partly" if met[0] else "not confirmed"
    return outcome, f"{reason} A random SAE has a standard deviation of {estimates[RANDOM_SAE][STD]}."


def _average(layers: Sequence[LayerFiring]) -> Replicates:
    names = layers[0].replicates
    return {name: np.mean([layer.replicates[name] for layer in layers], axis=0) for name in names}


def _values(replicates: Replicates) -> dict[str, float]:
    return {name: float(values[0]) for name, values in replicates.items()}


def _estimates(replicates: Replicates) -> dict[str, Estimate]:
    """Estimates with intervals cut at 0: no measure can be below it."""
    estimates = {name: jackknife(values) for name, values in replicates.items()}
    return {name: estimate._replace(low=max(estimate.low, 0.0)) for name, estimate in estimates.items()}


def _by_layer(seeds: Sequence[Mapping[int, LayerFiring]]) -> dict[int, dict[str, Estimate]]:
    return {layer: _estimates(_average([seed[layer] for seed in seeds])) for layer in seeds[0]}


def _rate_quantiles(seeds: Sequence[Mapping[int, LayerFiring]]) -> list[float]:
    rates = np.concatenate([layer.rates for seed in seeds for layer in seed.values()])
    return np.quantile(rates, np.linspace(0, 1, 101)).tolist()


__all__ = ["firing_rate_calibration", "judge"]
