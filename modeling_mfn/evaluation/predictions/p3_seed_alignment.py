"""P3: features align across random seeds. Models of one base whose trainings differ by chance, compared feature by
feature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array, vstack
from tqdm.auto import tqdm

from ...data.windows import Windows
from ...features.activations import token_activations
from ...features.comparison import LEVELS, Moments, compare_features, match
from ...model.modeling_mfn import MFNForCausalLM
from ..intervals import Estimate, difference, mean, mean_of_pairs, with_interval
from ..result import MFN, POST_HOC_SAE, RANDOM_SAE, Outcome, PaperCriterion, PredictionResult, Subjects

HEADLINE = "matched correlation"
LEVEL = 0.8
PAPER_CRITERION = (
    f"CKA of codes between different seeds above {LEVEL}; any two codes of one residual stream have a high one, also "
    "those of random SAEs, which stand beside. The paper's text names matching as another measure."
)
CRITERION = (
    "Confirmed: the mean correlation of one-to-one matched features, on text that did not choose the matching, is (a) "
    f"above {LEVEL} with its interval, and in every pair of seeds, and (b) above the post-hoc SAEs': the interval of "
    "the difference is above 0, and every pair of seeds is above every pair of SAEs. Partly: (a) or (b), or linear CKA "
    f"is, with its interval, above {LEVEL} and above those of the post-hoc SAEs and of random SAEs, with theirs. The "
    f"paper names CKA or matching, r > {LEVEL}; CKA alone is high for any two codes of one residual stream."
)
GROUPS = 10
"""Of tokens, each of which is left out once for the interval of CKA."""
CURVE = tuple(round(0.05 * step, 2) for step in range(21))


@dataclass(frozen=True)
class Alignment:
    """One layer of two models."""

    layer: int
    """Its block."""
    seeds: tuple[int, int]
    """Numbers of the two models among all that are compared."""
    features: int
    """That are not pruned, of the model that has more of them."""
    cka: float
    """Linear CKA of the codes on held-out text."""
    cka_without: np.ndarray
    """(G,) the same without each of G groups of its tokens."""
    chance_cka: float
    """The same with the tokens of one of the two permuted."""
    pairs: np.ndarray
    """(P, 2) the features that were matched on other text."""
    correlations: np.ndarray
    """(P,) Pearson's on held-out text, of these; 0 where one of the two does not vary on it, NaN where neither
    does."""
    masses: np.ndarray
    """(P,) the two features' shares of all activation on held-out text, averaged."""
    chosen_correlations: np.ndarray
    """(P,) on the text that chose the pairs, which flatter themselves there."""
    chance: np.ndarray
    """(P',) as `correlations`, of the matching that is chosen, and measured, with the tokens of one of the two
    permuted."""
    cosine_pairs: np.ndarray
    """(Q, 2)."""
    cosines: np.ndarray
    """(Q,) of the decoders' directions, matched by themselves."""
    cosine_masses: np.ndarray
    """(Q,)."""
    chance_cosines: np.ndarray
    """(Q,) with the entries of the directions of one of the two permuted."""
    live: float
    """Features that vary on the text that chose, as a share of all, averaged over the two models."""


class Codes(NamedTuple):
    """A model's activations of one layer, tokens by features (N, m)."""

    choosing: csr_array
    """On the text that chooses the matching."""
    held_out: csr_array
    """In the order of groups of tokens."""


def linear_cka(a: csr_array | np.ndarray, b: csr_array | np.ndarray) -> float:
    """Linear CKA of two representations of the same N tokens, (N, m_a) and (N, m_b), sparse or dense:
    |A'B|^2 / (|A'A| |B'B|) of the centred ones, in Frobenius norms (Kornblith et al. 2019, section 3). Exact, in
    float64, from sums over the sparse entries. 1 for equal ones up to rotation and scale; NaN if one is constant.
    """
    a, b = csr_array(a, dtype=np.float64), csr_array(b, dtype=np.float64)
    return _cka(_moments(a, b).covariance_norms()[0], _moments(a, a), _moments(b, b))


def align(
    model_a: MFNForCausalLM,
    model_b: MFNForCausalLM,
    layer: int,
    a: Codes,
    b: Codes,
    seed: int = 0,
    seeds: tuple[int, int] = (0, 1),
) -> Alignment:
    """Matches the features of one layer of two models one to one on one text, by the largest sum of correlations, and
    compares them on another; and matches their directions by cosine (Paulo & Belrose 2025).

    Args:
        model_a, model_b: whose directions are compared.
        layer: block index.
        a, b: their codes of the same tokens.
        seed: of the permutations that measure chance.
        seeds: numbers of the two models among all that are compared.
    """
    random = np.random.default_rng(seed)
    chosen, scored = (_moments(*pair, random=random) for pair in zip(a, b, strict=True))
    sizes = (a.choosing.shape[1], b.choosing.shape[1])
    varied = [chosen.varied(side, np.arange(size)) for side, size in enumerate(sizes)]
    found, by_chance = (match([each], (varied[0], varied[1]), sizes) for each in chosen.correlations(*varied))
    directions = compare_features(model_a, model_b, layer=layer, permutations=1, seed=seed).directions
    shares = [sums / max(sums.sum(), np.finfo(float).tiny) for sums in scored.sums]
    norms = scored.covariance_norms()
    itself = (_moments(a.held_out, a.held_out), _moments(b.held_out, b.held_out))
    return Alignment(
        layer=layer,
        seeds=seeds,
        features=len(directions.pairs) + max(map(len, directions.unmatched)),
        cka=_cka(norms[0], *itself),
        cka_without=_cka_without_groups(a.held_out, b.held_out, (scored, *itself)),
        chance_cka=_cka(norms[1], *itself),
        pairs=found.pairs,
        correlations=scored.pair_correlations(found.pairs)[0],
        masses=_masses(shares, found.pairs),
        chosen_correlations=found.similarities,
        chance=scored.pair_correlations(by_chance.pairs)[1],
        cosine_pairs=directions.pairs,
        cosines=directions.similarities,
        cosine_masses=_masses(shares, directions.pairs),
        chance_cosines=directions.chance[0],
        live=float(np.mean([len(features) / size for features, size in zip(varied, sizes, strict=True)])),
    )


def cross_seed_alignment(
    subjects: Subjects,
    windows: Windows,
    choosing_windows: Windows,
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> PredictionResult:
    """P3 of the paper (section 7): do models of different seeds find the same features?

    For every pair of a subject's models and every layer: linear CKA of codes, and features matched one to one, on codes
    and on directions. Shares of correlations are of all features, so that those that never fire count as not matched.
    Intervals are over matched pairs of features, those of all layers and pairs of seeds together; of CKA over
    windows: Student's t of jackknife pseudo-values, one for each of ten groups of windows. A feature of a model stands
    in several pairs where there are more than two models, which `result.mean_of_pairs` takes into account. Intervals
    say how sure a mean is for these models, not for further ones: seeds are few, and `details["by_seeds"]` shows how
    much one pair of them differs from another.

    Args:
        subjects: of each the models of two or more seeds, of one base model; those with fewer are left out. Each runs
            at its own alpha.
        windows: held-out text, on which codes are compared.
        choosing_windows: other text, such as training text, on which the matching of codes is chosen.
        batch_size: windows a forward.
        seed: of permutations.
    """
    found = {
        name: _pairs(models, windows, choosing_windows, batch_size, seed, name)
        for name, models in subjects.items()
        if len(models) > 1
    }
    pooled = {name: [each for pair in pairs.values() for each in pair.values()] for name, pairs in found.items()}
    figures = {name: _figures(alignments) for name, alignments in pooled.items()}
    differences = {
        name: difference(figures[MFN][HEADLINE], of[HEADLINE])
        for name, of in figures.items()
        if MFN in figures and name != MFN
    }
    by_seeds = {name: {seeds: _summary([*at.values()]) for seeds, at in pairs.items()} for name, pairs in found.items()}
    outcome, reason = _verdict(figures, differences, by_seeds)
    details = {
        "difference": differences,
        "by_layer": {name: _by_layer(pairs) for name, pairs in found.items()},
        "by_seeds": by_seeds,
        "share_above": {name: _curve(alignments) for name, alignments in pooled.items()},
    }
    claim = "Features align across random seeds."
    paper = PaperCriterion.judged(PAPER_CRITERION, figures, "CKA", lambda cka: cka > LEVEL, RANDOM_SAE)
    return PredictionResult("P3", claim, CRITERION, outcome, reason, HEADLINE, figures, POST_HOC_SAE, paper, details)


def _pairs(
    models: Sequence[MFNForCausalLM], windows: Windows, choosing: Windows, batch_size: int, seed: int, name: str
) -> dict[str, dict[int, Alignment]]:
    """Pair of seeds, as `0-1` -> layer -> alignment."""
    rows = list(windows)
    grouped = [row for group in range(GROUPS) for row in rows[group::GROUPS]]
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


def _moments(a: csr_array, b: csr_array, random: np.random.Generator | None = None) -> Moments:
    """Of all tokens at once; with `random`, chance beside it."""
    moments = Moments((a.shape[1], b.shape[1]), int(random is not None))
    moments.add(a, b, random or np.random.default_rng())
    return moments


def _cka_without_groups(a: csr_array, b: csr_array, whole: tuple[Moments, Moments, Moments]) -> np.ndarray:
    """(G,) CKA without each of the groups, in whose order the tokens are. `whole`: moments of a and b, of a, and of b
    by themselves."""
    found = []
    for rows in np.array_split(np.arange(a.shape[0]), min(GROUPS, a.shape[0])):
        of_a, of_b = a[rows], b[rows]
        part = (_moments(of_a, of_b), _moments(of_a, of_a), _moments(of_b, of_b))
        both, *itself = (of.without(own) for of, own in zip(whole, part, strict=True))
        found.append(_cka(both.covariance_norms()[0], *itself))
    return np.array(found)


def _cka(norm: float, a: Moments, b: Moments) -> float:
    scale = math.sqrt(a.covariance_norms()[0] * b.covariance_norms()[0])
    return norm / scale if scale > 0 else math.nan


def _masses(shares: Sequence[np.ndarray], pairs: np.ndarray) -> np.ndarray:
    return np.mean([share[pairs[:, side]] for side, share in enumerate(shares)], axis=0)


def _pooled(alignments: Sequence[Alignment], name: str) -> np.ndarray:
    return np.concatenate([getattr(each, name) for each in alignments])


def _ends(alignments: Sequence[Alignment], name: str) -> np.ndarray:
    """(P, 2) numbers of the features in pairs that tell apart those of all layers and models."""
    models = [each.layer * 2**16 + np.array(each.seeds, np.int64) for each in alignments]
    return np.concatenate([of * 2**32 + getattr(each, name) for of, each in zip(models, alignments, strict=True)])


def _cka_figure(alignments: Sequence[Alignment]) -> Estimate:
    """A mean over layers and pairs of seeds, whose interval is of the text."""
    replicates = np.array([[each.cka, *each.cka_without] for each in alignments])
    replicates = replicates[~np.isnan(replicates[:, 0])]
    return with_interval(replicates.mean(0)) if len(replicates) else Estimate(math.nan)


def _average(alignments: Sequence[Alignment], name: str) -> Estimate:
    return Estimate(_mean(np.array([getattr(each, name) for each in alignments])))


def _figures(alignments: Sequence[Alignment]) -> dict[str, Estimate]:
    correlations, cosines = (_pooled(alignments, name) for name in ("correlations", "cosines"))
    pairs, cosine_pairs = (_ends(alignments, name) for name in ("pairs", "cosine_pairs"))
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
        "CKA": _cka_figure(alignments),
        "CKA, chance": _average(alignments, "chance_cka"),
        "live features": _average(alignments, "live"),
    }


def _share(alignments: Sequence[Alignment], level: float) -> Estimate:
    """Of all features, those that never fire and have no partner, too, how many are matched above a level."""
    correlations = _pooled(alignments, "correlations")
    if not len(correlations):
        return Estimate(0.0)
    above = mean_of_pairs(correlations >= level, _ends(alignments, "pairs"))
    matched = sum(len(each.pairs) for each in alignments) / sum(each.features for each in alignments)
    return Estimate(*(matched * part for part in above))


def _verdict(
    figures: dict[str, dict[str, Estimate]], differences: dict[str, Estimate], by_seeds: dict[str, Any]
) -> tuple[Outcome, str]:
    missing = [name for name in (MFN, POST_HOC_SAE) if name not in figures]
    if missing:
        return "not measured", f"models of two or more seeds are needed; there are none of: {', '.join(missing)}"
    ours, theirs, less = figures[MFN], figures[POST_HOC_SAE], differences[POST_HOC_SAE]
    lowest, highest = (
        f(pair[HEADLINE] for pair in by_seeds[of].values()) for f, of in ((min, MFN), (max, POST_HOC_SAE))
    )
    better = less.low > 0 and lowest > highest
    aligned = ours[HEADLINE].low > LEVEL and lowest > LEVEL
    beside = [figures[name]["CKA"] for name in (POST_HOC_SAE, RANDOM_SAE) if name in figures]
    by_cka = len(beside) == 2 and ours["CKA"].low > max(LEVEL, *(figure.high for figure in beside))
    outcome: Outcome = "not confirmed"
    if aligned and better:
        outcome = "confirmed"
    elif aligned or better or by_cka:
        outcome = "partly"
    reason = (
        f"Matched features correlate by {ours[HEADLINE]} on held-out text, {'surely' if aligned else 'not surely'} "
        f"above {LEVEL}, and post-hoc SAEs' by {theirs[HEADLINE]} (difference {less}, "
        f"{'surely' if better else 'not surely'} above 0 between all seeds); CKA is {ours['CKA']} against "
        f"{' and '.join(map(str, beside))} of post-hoc {'and random ' if len(beside) == 2 else ''}SAEs."
    )
    return outcome, reason


def _summary(alignments: Sequence[Alignment]) -> dict[str, float]:
    correlations = _pooled(alignments, "correlations")
    return {
        HEADLINE: _mean(correlations),
        "share of features matched above 0.8": _share(alignments, 0.8).value,
        "matched cosine": _mean(_pooled(alignments, "cosines")),
        "CKA": _mean(np.array([each.cka for each in alignments])),
    }


def _mean(values: np.ndarray) -> float:
    """NaN ones left out, NaN if there are no others."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else math.nan


def _by_layer(pairs: dict[str, dict[int, Alignment]]) -> dict[int, Any]:
    layers = next(iter(pairs.values()))
    return {layer: _summary([at[layer] for at in pairs.values()]) for layer in layers}


def _curve(alignments: Sequence[Alignment]) -> dict[float, float]:
    """The share of features that are matched from each level of correlation on."""
    return {level: _share(alignments, level).value for level in CURVE}


__all__ = ["Alignment", "Codes", "align", "cross_seed_alignment", "linear_cka"]
