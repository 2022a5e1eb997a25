"""P3, cross-seed alignment: "Features align across random seeds (e.g., via CKA / matching)", r > 0.8.

Measured: models of one base whose trainings differ by chance, two at a time and layer by layer.

- Linear CKA of their codes. It is high for any two codes of one residual stream, also for those of random SAEs.
- One-to-one matching of features with the largest sum of correlations. The matching is chosen on one text and measured
  on another, because matched pairs flatter themselves on the text that chose them.
- One-to-one matching of decoder directions by cosine (Paulo & Belrose 2025).

Chance is measured by permuting the tokens, or the entries of directions, of one of the two models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from ...utils.extras import needs
from ..intervals import Estimate, difference, jackknife, mean, mean_of_pairs
from ..measures.alignment import CKA_GROUPS, Alignment, Codes, align
from ..result import MFN, POST_HOC_SAE, RANDOM_SAE, Estimates, Outcome, PaperCriterion, PredictionResult, Subjects

with needs("evaluate"):
    from scipy.sparse import csr_array, vstack

    from ...features.activations import token_activations
    from ...features.comparison import LEVELS

if TYPE_CHECKING:
    from ...data.windows import Windows
    from ...model.mfn_for_causal_lm import MFNForCausalLM

CLAIM = "Features align across random seeds."
MIN_CORRELATION = 0.8
PAPER_CRITERION = (
    f"CKA of codes between different seeds above {MIN_CORRELATION}. Any two codes of one residual stream have a high "
    "CKA, also those of random SAEs, which are reported, too. The paper's text names matching as another measure."
)
CRITERION = (
    "The matching of features is chosen on other text than that on which it is judged. "
    "Confirmed if both of these hold. "
    f"(a) The mean correlation of matched features is above {MIN_CORRELATION} with its interval, and in every pair of "
    "seeds. (b) It is above that of post-hoc SAEs: the interval of the difference is above 0, and every pair of seeds "
    "is above every pair of SAEs. "
    "Partly confirmed if (a) or (b) holds, or if linear CKA is above these with its interval: "
    f"{MIN_CORRELATION}, and the intervals of post-hoc SAEs and of random SAEs. "
    f"The paper names CKA or matching, r > {MIN_CORRELATION}. CKA alone is high for any two codes of one residual "
    "stream."
)
HEADLINE = "matched correlation"
CURVE = tuple(round(0.05 * step, 2) for step in range(21))
"""Levels of correlation for the share of features that are matched above them."""


def cross_seed_alignment(
    subjects: Subjects,
    windows: Windows,
    choosing_windows: Windows,
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> PredictionResult:
    """Measures P3 for every pair of a subject's models and every layer.

    Shares of correlations are of all features: those that never fire count as not matched.

    Intervals are over matched pairs of features, of all layers and pairs of seeds together. Where there are more than
    two models, a feature is in several pairs; see [`intervals.mean_of_pairs`]. Intervals of CKA are over windows, from
    a jackknife with ten groups. Intervals are for these models, not for further seeds: `details["by_seeds"]` shows how
    much pairs of seeds differ.

    Args:
        subjects: subject -> models of two or more seeds and of one base model. Subjects with fewer models are left out.
            Each model runs at its own alpha.
        windows: held-out text, on which codes are compared.
        choosing_windows: other text, such as training text, on which the matching is chosen.
        batch_size: windows per forward.
        seed: seed of permutations.

    Raises:
        ValueError: if there is no token.
    """
    found = {
        name: _pairs(models, windows, choosing_windows, batch_size, seed, name)
        for name, models in subjects.items()
        if len(models) > 1
    }
    pooled = {name: [each for pair in pairs.values() for each in pair.values()] for name, pairs in found.items()}
    estimates = {name: _estimates(alignments) for name, alignments in pooled.items()}
    differences = {
        name: difference(estimates[MFN][HEADLINE], of[HEADLINE])
        for name, of in estimates.items()
        if MFN in estimates and name != MFN
    }
    by_seeds = {name: {seeds: _summary([*at.values()]) for seeds, at in pairs.items()} for name, pairs in found.items()}
    outcome, reason = _judge(estimates, differences, by_seeds)
    details = {
        "difference": differences,
        "by_layer": {name: _by_layer(pairs) for name, pairs in found.items()},
        "by_seeds": by_seeds,
        "share_above": {name: {level: _share(of, level).value for level in CURVE} for name, of in pooled.items()},
    }
    paper = PaperCriterion.judged(PAPER_CRITERION, estimates, "CKA", lambda cka: cka > MIN_CORRELATION, RANDOM_SAE)
    return PredictionResult("P3", CLAIM, CRITERION, outcome, reason, HEADLINE, estimates, POST_HOC_SAE, paper, details)


def _pairs(
    models: Sequence[MFNForCausalLM], windows: Windows, choosing: Windows, batch_size: int, seed: int, name: str
) -> dict[str, dict[int, Alignment]]:
    """Aligns each pair of models, named like `0-1`, in each layer."""
    rows = list(windows)
    grouped = [row for group in range(CKA_GROUPS) for row in rows[group::CKA_GROUPS]]
    texts = [
        [_codes(model, text, batch_size) for text in (choosing, grouped)]
        for model in tqdm(models, f"codes of {name}", leave=False)
    ]
    found: dict[str, dict[int, Alignment]] = {}
    places = [(pair, layer) for pair in combinations(range(len(models)), 2) for layer in models[0].config.layers]
    for seeds, layer in tqdm(places, f"matching features of {name}", leave=False):
        (first, codes_a), (second, codes_b) = (
            (models[place], Codes(*(codes[layer] for codes in texts[place]))) for place in seeds
        )
        alignment = align(first, second, layer, codes_a, codes_b, seed, seeds)
        found.setdefault(f"{seeds[0]}-{seeds[1]}", {})[layer] = alignment
    return found


def _codes(model: MFNForCausalLM, windows: Windows, batch_size: int) -> dict[int, csr_array]:
    batches = [batch.codes for batch in token_activations(model, windows, batch_size=batch_size)]
    if not any(codes.shape[0] for batch in batches for codes in batch.values()):
        raise ValueError("windows have no token; alignment is measured on some")
    return {layer: csr_array(vstack([batch[layer] for batch in batches], format="csr")) for layer in batches[0]}


def _pooled(alignments: Sequence[Alignment], name: str) -> np.ndarray:
    return np.concatenate([getattr(each, name) for each in alignments])


def _members(alignments: Sequence[Alignment], name: str) -> np.ndarray:
    """(P, 2) numbers of the features in pairs, distinct between layers and models."""
    features = _pooled(alignments, name)
    lengths = [len(getattr(each, name)) for each in alignments]
    layers = np.repeat([[each.layer] * 2 for each in alignments], lengths, axis=0)
    seeds = np.repeat([each.seeds for each in alignments], lengths, axis=0)
    columns = (layers, seeds, features)
    return np.ravel_multi_index(columns, [int(column.max(initial=0)) + 1 for column in columns])


def _estimates(alignments: Sequence[Alignment]) -> dict[str, Estimate]:
    correlations, cosines = (_pooled(alignments, name) for name in ("correlations", "cosines"))
    pairs, cosine_pairs = (_members(alignments, name) for name in ("pairs", "cosine_pairs"))
    masses, cosine_masses = (_pooled(alignments, name) for name in ("masses", "cosine_masses"))
    return {
        HEADLINE: mean_of_pairs(correlations, pairs),
        f"{HEADLINE}, weighted by activation": mean_of_pairs(correlations, pairs, masses),
        **{f"share of features matched above {level}": _share(alignments, level) for level in LEVELS},
        f"{HEADLINE}, on the text that chose": mean_of_pairs(_pooled(alignments, "chosen_correlations"), pairs),
        f"{HEADLINE}, chance": mean(_pooled(alignments, "chance")),
        "matched cosine": mean_of_pairs(cosines, cosine_pairs),
        "matched cosine, weighted by activation": mean_of_pairs(cosines, cosine_pairs, cosine_masses),
        **{f"share of cosines above {level}": mean_of_pairs(cosines >= level, cosine_pairs) for level in LEVELS},
        "matched cosine, chance": mean(_pooled(alignments, "chance_cosines")),
        "CKA": _cka_estimate(alignments),
        "CKA, chance": Estimate(_mean([each.chance_cka for each in alignments])),
        "live features": Estimate(_mean([each.live for each in alignments])),
    }


def _cka_estimate(alignments: Sequence[Alignment]) -> Estimate:
    """Mean over layers and pairs of seeds, with an interval over the text."""
    replicates = np.array([[each.cka, *each.cka_without] for each in alignments])
    replicates = replicates[~np.isnan(replicates[:, 0])]
    return jackknife(replicates.mean(0)) if len(replicates) else Estimate(math.nan)


def _share(alignments: Sequence[Alignment], level: float) -> Estimate:
    """Share of all features, also of those without a partner, that are matched above a level of correlation."""
    correlations = _pooled(alignments, "correlations")
    if not len(correlations):
        return Estimate(0.0)
    above = mean_of_pairs(correlations >= level, _members(alignments, "pairs"))
    matched = sum(len(each.pairs) for each in alignments) / sum(each.features for each in alignments)
    return Estimate(*(matched * part for part in above))


def _summary(alignments: Sequence[Alignment]) -> dict[str, float]:
    return {
        HEADLINE: _mean(_pooled(alignments, "correlations")),
        "share of features matched above 0.8": _share(alignments, 0.8).value,
        "matched cosine": _mean(_pooled(alignments, "cosines")),
        "CKA": _mean([each.cka for each in alignments]),
    }


def _by_layer(pairs: dict[str, dict[int, Alignment]]) -> dict[int, dict[str, float]]:
    layers = next(iter(pairs.values()))
    return {layer: _summary([at[layer] for at in pairs.values()]) for layer in layers}


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """Mean without NaN values, NaN if there are no others."""
    values = np.asarray(values)
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else math.nan


def _judge(estimates: Estimates, differences: dict[str, Estimate], by_seeds: dict[str, Any]) -> tuple[Outcome, str]:
    """Applies `CRITERION`. Returns the outcome and the reason."""
    missing = [name for name in (MFN, POST_HOC_SAE) if name not in estimates]
    if missing:
        return "not measured", f"models of two or more seeds are needed; there are none of: {', '.join(missing)}"
    ours, theirs, less = estimates[MFN], estimates[POST_HOC_SAE], differences[POST_HOC_SAE]
    lowest = min(pair[HEADLINE] for pair in by_seeds[MFN].values())
    highest = max(pair[HEADLINE] for pair in by_seeds[POST_HOC_SAE].values())
    better = less.low > 0 and lowest > highest
    aligned = ours[HEADLINE].low > MIN_CORRELATION and lowest > MIN_CORRELATION
    others = [estimates[name]["CKA"] for name in (POST_HOC_SAE, RANDOM_SAE) if name in estimates]
    by_cka = len(others) == 2 and ours["CKA"].low > max(MIN_CORRELATION, *(other.high for other in others))
    outcome: Outcome = "not confirmed"
    if aligned and better:
        outcome = "confirmed"
    elif aligned or better or by_cka:
        outcome = "partly"
    reason = (
        f"Matched features correlate by {ours[HEADLINE]} on held-out text, {'surely' if aligned else 'not surely'} "
        f"above {MIN_CORRELATION}, and post-hoc SAEs' by {theirs[HEADLINE]} (difference {less}, "
        f"{'surely' if better else 'not surely'} above 0 between all seeds); CKA is {ours['CKA']} against "
        f"{' and '.join(map(str, others))} of post-hoc {'and random ' if len(others) == 2 else ''}SAEs."
    )
    return outcome, reason


__all__ = ["cross_seed_alignment"]
