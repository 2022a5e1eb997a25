"""P1, firing-rate calibration: how even firing rates are, how near to rho, and how little features overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..intervals import Estimate, less_by_seed, with_interval
from ..measures.firing_rates import CV, DEAD, OVERLAP, STD, LayerFiring, Replicates, measure_firing, target_rate
from ..result import MFN, NO_RATE_LOSS, POST_HOC_SAE, RANDOM_SAE, Outcome, PaperCriterion, PredictionResult, Subjects

PAPER_STD = 0.05
MOST_DEAD = 0.01

PAPER_CRITERION = f"A standard deviation of mean firing rates of at most {PAPER_STD}; baseline: a random SAE."
CRITERION = (
    f"Confirmed: the paper's criterion, a standard deviation of firing rates of at most {PAPER_STD}, which sparsity "
    "alone can meet, and five more: a coefficient of variation below that of the post-hoc SAE, below that of a random "
    f"SAE, and below that of MFN without rate loss; at most {MOST_DEAD:.0%} of the features silent; an overlap (RMS "
    "correlation of when two features are active) of at most the post-hoc SAE's. Each with its whole 95 % interval, "
    "and in every seed. Partly: the paper's, with its interval and in every seed."
)


def firing_rate_calibration(
    subjects: Subjects, windows: Sequence[Mapping[str, Any]], rho: float | None = None, *, batch_size: int = 8
) -> PredictionResult:
    """P1: firing rates converge to rho, with low overlap.

    The paper's criterion, a standard deviation of at most 0.05, asks little: rates are k / m on average, a few per
    cent, so that even very uneven ones deviate by little, and those of a random SAE, too. Hence the further conditions,
    on the rates' coefficient of variation, on silent features and on overlap. Overlap is judged by correlation: the
    mean of pairwise co-activation, which is reported, too, is fixed by the number of active features a token.

    Each figure is a mean over layers and seeds. Intervals are over windows: Student's t of a figure's jackknife
    pseudo-values (Tukey 1958), one for each of 30 groups of windows, the same for all models, so that differences of
    subjects are of pairs.

    Args:
        subjects: to be judged, MFN, a post-hoc SAE, a random SAE and MFN without the rate loss.
        windows: held-out text, at least two windows: rows with `input_ids` (T,), and `attention_mask` (T,) where they
            are padded. Whether a feature is silent depends on how much there is.
        rho: target firing rate; by default k / m.
        batch_size: windows a forward.

    Returns:
        `figures` has those of `rate_figures` and `overlap_figures`. `details` has `by_layer`, `by_seed` (values alone),
        `differences` (MFN's figures less a baseline's), `rate_quantiles` (101, of all layers' and seeds' rates),
        `tokens` and `rho`.

    Raises:
        ValueError: if there is no subject, windows are fewer than two or have no token, or `rho` is out of range.
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
        name: {figure: with_interval(values - average[figure]) for figure, values in averages[MFN].items()}
        for name, average in averages.items()
        if name != MFN and MFN in averages
    }
    figures = {name: _figures(average) for name, average in averages.items()}
    by_seed = {name: [_values(_average(list(seed.values()))) for seed in seeds] for name, seeds in measured.items()}
    outcome, reason = judge(figures, differences, by_seed)
    return PredictionResult(
        prediction="P1",
        claim="Firing rates converge to the target rho, with low overlap across features.",
        criterion=CRITERION,
        outcome=outcome,
        reason=reason,
        headline=CV,
        figures=figures,
        baseline=POST_HOC_SAE,
        paper_criterion=PaperCriterion.judged(
            PAPER_CRITERION, figures, STD, lambda deviation: deviation <= PAPER_STD, RANDOM_SAE
        ),
        details={
            "by_layer": {
                name: {layer: _figures(_average([seed[layer] for seed in seeds])) for layer in seeds[0]}
                for name, seeds in measured.items()
            },
            "by_seed": by_seed,
            "differences": differences,
            "rate_quantiles": {name: _rate_quantiles(seeds) for name, seeds in measured.items()},
            "tokens": {name: next(iter(seeds[0].values())).tokens for name, seeds in measured.items()},
            "rho": {name: target_rate(subjects[name][0], rho) for name in measured},
        },
    )


def judge(
    figures: Mapping[str, Mapping[str, Estimate]],
    differences: Mapping[str, Mapping[str, Estimate]],
    by_seed: Mapping[str, Sequence[Mapping[str, float]]],
) -> tuple[Outcome, str]:
    """Whether the criterion is met, and a sentence on it.

    Args:
        figures: subject -> name -> figure.
        differences: baseline -> name -> MFN's figure less the baseline's.
        by_seed: subject -> name -> value, for each of its seeds.
    """
    missing = [name for name in (MFN, POST_HOC_SAE, RANDOM_SAE, NO_RATE_LOSS) if name not in figures]
    if missing:
        return "not measured", f"Not given: {', '.join(missing)}."
    ours = figures[MFN]

    def of_seeds(name: str) -> list[float]:
        return [seed[name] for seed in by_seed[MFN]]

    def less(baseline: str, name: str) -> list[float]:
        return less_by_seed(of_seeds(name), [seed[name] for seed in by_seed[baseline]])

    conditions = {
        f"standard deviation {ours[STD]} (at most {PAPER_STD})": (
            ours[STD].high <= PAPER_STD, max(of_seeds(STD)) <= PAPER_STD
        ),
        **{
            f"coefficient of variation {ours[CV]} (below {figures[name][CV]} of the {name})": (
                differences[name][CV].high < 0, max(less(name, CV)) < 0
            )
            for name in (POST_HOC_SAE, RANDOM_SAE, NO_RATE_LOSS)
        },
        f"dead share {ours[DEAD]} (at most {MOST_DEAD})": (
            ours[DEAD].high <= MOST_DEAD, max(of_seeds(DEAD)) <= MOST_DEAD
        ),
        f"overlap {ours[OVERLAP]} (at most the post-hoc SAE's {figures[POST_HOC_SAE][OVERLAP]})": (
            differences[POST_HOC_SAE][OVERLAP].high <= 0, max(less(POST_HOC_SAE, OVERLAP)) <= 0
        ),
    }  # fmt: skip
    kinds = {"Met": (True, True), "Met, but not in every seed": (True, False)}
    sorted_out = {kind: [name for name, met in conditions.items() if met == of] for kind, of in kinds.items()}
    sorted_out["Not met"] = [name for name, (surely, _) in conditions.items() if not surely]
    reason = " ".join(f"{kind}: {'; '.join(names)}." for kind, names in sorted_out.items() if names)
    met = [all(each) for each in conditions.values()]
    outcome: Outcome = "confirmed" if all(met) else "partly" if met[0] else "not confirmed"
    random = figures[RANDOM_SAE]
    return outcome, f"{reason} A random SAE has a standard deviation of {random[STD]}."


def _average(layers: Sequence[LayerFiring]) -> Replicates:
    names = layers[0].replicates
    return {name: np.mean([layer.replicates[name] for layer in layers], axis=0) for name in names}


def _values(replicates: Replicates) -> dict[str, float]:
    return {name: float(values[0]) for name, values in replicates.items()}


def _rate_quantiles(seeds: Sequence[Mapping[int, LayerFiring]]) -> list[float]:
    rates = np.concatenate([layer.rates for seed in seeds for layer in seed.values()])
    return np.quantile(rates, np.linspace(0, 1, 101)).tolist()


def _figures(replicates: Replicates) -> dict[str, Estimate]:
    """None of which can be below 0."""
    figures = {name: with_interval(values) for name, values in replicates.items()}
    return {name: figure._replace(low=max(figure.low, 0.0)) for name, figure in figures.items()}


__all__ = ["firing_rate_calibration", "judge"]
