"""Firing rates of a model's features and the overlap of features, each with replicates for intervals over windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from ...utils.extras import needs

with needs("evaluate"):
    from scipy import sparse
    from scipy.sparse import csr_array
    from scipy.special import xlogy

    from ...features.activations import token_activations

if TYPE_CHECKING:
    from ...model.mfn_for_causal_lm import MFNForCausalLM

NEAR_DUPLICATE = 0.5
"""Jaccard index above which two features count as near duplicates."""
JACKKNIFE_GROUPS = 30
"""Groups of windows, each of which is left out once for intervals."""

STD, CV, DEAD, OVERLAP = "firing rate std", "firing rate CV", "dead share", "RMS correlation"
"""Names of the measures that P1 is judged by."""

Replicates = dict[str, np.ndarray]
"""Name of a measure -> (1 + G,): its value on all windows, then without each of G groups of windows."""


class LayerFiring(NamedTuple):
    """Firing of one layer's features, without pruned ones, on a text of N tokens."""

    rates: np.ndarray
    """(m,) firing rates."""
    replicates: Replicates
    """Measures of `rate_measures` and `overlap_measures`."""
    tokens: int
    """N."""


def target_rate(model: MFNForCausalLM, rho: float | None = None) -> float:
    """Returns rho, by default k / m.

    Raises:
        ValueError: if rho is not between 0 and 1.
    """
    if rho is None:
        return model.config.k / model.config.num_features
    if not 0 < rho < 1:
        raise ValueError(f"rho is {rho}; a firing rate lies between 0 and 1")
    return rho


def measure_firing(
    model: MFNForCausalLM, windows: Sequence[Mapping[str, Any]], rho: float | None = None, *, batch_size: int = 8
) -> dict[int, LayerFiring]:
    """Measures a model's firing by layer.

    One layer at a time, memory holds a few matrices (m, m) of float32. The counts of pairs in each group are sparse.

    Args:
        model: MFN model.
        windows: at least two rows with `input_ids` (T,), and `attention_mask` (T,) where they are padded.
        rho: target firing rate, by default k / m.
        batch_size: windows per forward.

    Raises:
        ValueError: if there are fewer than two windows, no token counts, or `rho` is not between 0 and 1.
    """
    rho = target_rate(model, rho)
    number = min(JACKKNIFE_GROUPS, len(windows))
    if number < 2:
        raise ValueError(f"there are {len(windows)} windows; intervals need at least 2")
    groups = [
        _active(model, [windows[row] for row in range(group, len(windows), number)], batch_size)
        for group in tqdm(range(number), "firing rates", leave=False)
    ]
    found = {}
    for layer in model.config.layers:
        kept = np.setdiff1d(np.arange(model.config.num_features), model.config.pruned_features.get(str(layer), []))
        active = [group[layer][:, kept] for group in groups]
        tokens = sum(each.shape[0] for each in active)
        if tokens == 0:
            raise ValueError("windows have no token that counts")
        rates = sum(each.sum(axis=0, dtype=np.float64) for each in active) / tokens
        found[layer] = LayerFiring(rates, firing_replicates(active, rho), tokens)
    return found


def firing_replicates(groups: Sequence[csr_array], rho: float) -> Replicates:
    """Computes all measures of one layer from all groups of tokens, then without each group.

    Args:
        groups: matrices (N_g, m), 1 where a feature is active on a token. N_g may differ.
        rho: target firing rate.
    """
    pairs = [(active.T @ active).tocsr() for active in groups]
    together = np.zeros((groups[0].shape[1],) * 2, np.float32)  # exact up to 2^24 tokens
    for of_group in pairs:
        together += of_group.toarray()
    tokens = sum(active.shape[0] for active in groups)
    found = [_of_pairs(together, tokens, rho)]
    for of_group, active in zip(pairs, groups, strict=True):
        found.append(_of_pairs(together - of_group.toarray(), tokens - active.shape[0], rho))
    replicates = {name: np.array([measures[name] for measures in found]) for name in found[0]}
    replicates[f"{OVERLAP} at chance"][1:] = np.nan  # depends on the number of tokens alone
    return replicates


def rate_measures(rates: np.ndarray, rho: float) -> dict[str, float]:
    """Measures how even firing rates (m,) are, and how close to rho.

    - `active features`: their sum, the mean number of active features per token;
    - `firing rate mean`, `firing rate std`: over features; `firing rate CV` is their ratio, std / mean;
    - `KL to rho`: mean over features of KL(Bernoulli(p_i) || Bernoulli(rho)) in nats, which is eq. 6 divided by m;
    - `dead share`: share of features that are never active;
    - `evenness`: entropy of the features' shares of all firings, divided by log m (Pielou 1966). It is 1 if all
      features fire equally often.
    """
    rates = np.asarray(rates, np.float64)
    total = rates.sum()
    divergence = xlogy(rates, rates / rho) + xlogy(1 - rates, (1 - rates) / (1 - rho))
    shares = rates / total if total else np.full_like(rates, np.nan)
    return {
        "active features": float(total),
        "firing rate mean": float(rates.mean()),
        STD: float(rates.std()),
        CV: float(rates.std() / rates.mean()) if total else np.nan,
        "KL to rho": float(divergence.mean()),
        DEAD: float((rates == 0).mean()),
        "evenness": float(-xlogy(shares, shares).sum() / np.log(len(rates))),
    }


def overlap_measures(together: np.ndarray, tokens: int) -> dict[str, float]:
    """Measures how much features are active on the same tokens.

    - `co-activation`: share of tokens on which both features of a pair are active, averaged over pairs. It is
      E[L0 (L0 - 1)] / (m (m - 1)), whichever features are active;
    - `co-activation at chance`: mean of p_i p_j over pairs;
    - `RMS correlation`: root of the mean over pairs of phi^2, the squared correlation of being active. Pairs are of
      features that are active on some tokens and not on all;
    - `RMS correlation at chance`: with permuted tokens, phi^2 of every pair has the expectation 1 / (N - 1), whatever
      the rates;
    - `near duplicates`: share of features with a partner whose Jaccard index |A and B| / |A or B| is above 0.5, among
      features that are ever active.

    Args:
        together: (m, m) float32, number of tokens on which each pair is active. The diagonal counts each feature.
        tokens: N.
    """
    counts = together.diagonal().astype(np.float64)
    rates = counts / tokens
    pairs = len(rates) * (len(rates) - 1)
    both = (together.sum(dtype=np.float64) - counts.sum()) / tokens
    return {
        "co-activation": float(both / pairs),
        "co-activation at chance": float((rates.sum() ** 2 - (rates**2).sum()) / pairs),
        OVERLAP: _rms_correlation(together, tokens),
        f"{OVERLAP} at chance": (tokens - 1) ** -0.5 if tokens > 1 else np.nan,
        "near duplicates": _near_duplicates(together),
    }


def _rms_correlation(together: np.ndarray, tokens: int) -> float:
    rates = together.diagonal().astype(np.float64) / tokens
    variances = rates * (1 - rates)
    varied = variances > 0
    number = int(varied.sum())
    if number < 2:
        return np.nan
    covariances = together / np.float32(tokens)
    covariances -= np.outer(rates.astype(np.float32), rates.astype(np.float32))
    np.fill_diagonal(covariances, 0)
    weights = np.divide(1, variances, where=varied, out=np.zeros_like(rates)).astype(np.float32)
    square = (np.square(covariances, out=covariances) @ weights).astype(np.float64) @ weights
    return float(np.sqrt(square / (number * (number - 1))))


def _near_duplicates(together: np.ndarray) -> float:
    counts = together.diagonal()
    alive = counts > 0
    if not alive.any():
        return np.nan
    # |A and B| / |A or B| > J is the same as |A and B| (1 + J) / J - |A| - |B| > 0
    excess = together * np.float32((1 + NEAR_DUPLICATE) / NEAR_DUPLICATE)
    excess -= counts
    excess -= counts[:, None]
    np.fill_diagonal(excess, 0)
    return float((excess.max(axis=1) > 0)[alive].mean())


def _of_pairs(together: np.ndarray, tokens: int, rho: float) -> dict[str, float]:
    return rate_measures(together.diagonal() / tokens, rho) | overlap_measures(together, tokens)


def _active(model: MFNForCausalLM, windows: Sequence[Mapping[str, Any]], batch_size: int) -> dict[int, csr_array]:
    """Returns (N, m) float32 by layer, 1 where a feature is active."""
    found: dict[int, list[csr_array]] = {layer: [] for layer in model.config.layers}
    for batch in token_activations(model, windows, batch_size=batch_size):
        for layer, code in batch.codes.items():
            found[layer].append((code > 0).astype(np.float32))
    return {layer: sparse.vstack(parts, format="csr") for layer, parts in found.items()}


__all__ = [
    "CV",
    "DEAD",
    "OVERLAP",
    "STD",
    "LayerFiring",
    "Replicates",
    "firing_replicates",
    "measure_firing",
    "overlap_measures",
    "rate_measures",
    "target_rate",
]
