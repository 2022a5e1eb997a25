"""Alignment of one layer of two models: linear CKA of their codes, and their features matched one to one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...utils.extras import needs

with needs("evaluate"):
    from scipy.sparse import csr_array

    from ...features.comparison import Moments, compare_features, match

if TYPE_CHECKING:
    from ...model.mfn_for_causal_lm import MFNForCausalLM

CKA_GROUPS = 10
"""Groups of tokens, each of which is left out once for the interval of CKA."""


@dataclass(frozen=True)
class Alignment:
    """Comparison of one layer of two models."""

    layer: int
    """Block index."""
    seeds: tuple[int, int]
    """Numbers of the two models among all that are compared."""
    features: int
    """Features that are not pruned, in the model that has more of them."""
    cka: float
    """Linear CKA of the codes on held-out text."""
    cka_without: np.ndarray
    """(G,) linear CKA without each of G groups of tokens."""
    chance_cka: float
    """Linear CKA with the tokens of one model permuted."""
    pairs: np.ndarray
    """(P, 2) features that were matched on other text."""
    correlations: np.ndarray
    """(P,) Pearson's correlation on held-out text.

    0 where one of the two features does not vary on this text, NaN where neither does.
    """
    masses: np.ndarray
    """(P,) share of all activation on held-out text, averaged over the two features."""
    chosen_correlations: np.ndarray
    """(P,) correlation on the text that chose the pairs."""
    chance: np.ndarray
    """(P',) correlation of the pairs that are matched, and measured, with the tokens of one model permuted."""
    cosine_pairs: np.ndarray
    """(Q, 2) features that were matched by direction."""
    cosines: np.ndarray
    """(Q,) cosine of the decoder directions."""
    cosine_masses: np.ndarray
    """(Q,) share of all activation, averaged over the two features."""
    chance_cosines: np.ndarray
    """(Q,) cosine with the entries of the directions of one model permuted."""
    live: float
    """Share of features that vary on the text that chose, averaged over the two models."""


class Codes(NamedTuple):
    """Activations (N, m) of one layer of a model."""

    choosing: csr_array
    """Codes on the text that chooses the matching."""
    held_out: csr_array
    """Codes on held-out text, in the order of groups of tokens."""


def align(
    model_a: MFNForCausalLM,
    model_b: MFNForCausalLM,
    layer: int,
    a: Codes,
    b: Codes,
    seed: int = 0,
    seeds: tuple[int, int] = (0, 1),
) -> Alignment:
    """Matches the features of one layer of two models on one text and compares them on another.

    Args:
        model_a, model_b: models whose directions are compared.
        layer: block index.
        a, b: their codes of the same tokens.
        seed: seed of the permutations that measure chance.
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


def linear_cka(a: csr_array | np.ndarray, b: csr_array | np.ndarray) -> float:
    """Linear CKA of two representations of the same N tokens (Kornblith et al. 2019, section 3).

    |A'B|^2 / (|A'A| |B'B|) of the centred representations, in Frobenius norms. It is computed in float64 from sums over
    sparse entries, without approximation. Representations that are equal up to rotation and scale have 1; a constant
    one has NaN.

    Args:
        a, b: (N, m_a) and (N, m_b), sparse or dense.
    """
    a, b = csr_array(a, dtype=np.float64), csr_array(b, dtype=np.float64)
    return _cka(_moments(a, b).covariance_norms()[0], _moments(a, a), _moments(b, b))


def _moments(a: csr_array, b: csr_array, random: np.random.Generator | None = None) -> Moments:
    """Moments of all tokens at once. With `random`, chance is measured, too."""
    moments = Moments((a.shape[1], b.shape[1]), int(random is not None))
    moments.add(a, b, random or np.random.default_rng())
    return moments


def _cka_without_groups(a: csr_array, b: csr_array, whole: tuple[Moments, Moments, Moments]) -> np.ndarray:
    """(G,) CKA without each group of tokens. `whole` has the moments of a and b, of a and a, and of b and b."""
    found = []
    for rows in np.array_split(np.arange(a.shape[0]), min(CKA_GROUPS, a.shape[0])):
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


__all__ = ["CKA_GROUPS", "Alignment", "Codes", "align", "linear_cka"]
