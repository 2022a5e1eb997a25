"""Comparison of two models: features matched one to one, by their directions and by their activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..data.windows import Windows, input_batches
from ..model.mfn_for_causal_lm import MFNForCausalLM
from ..model.twins import check_has_features
from ..utils.extras import needs
from .activations import activations_of

with needs("labels"):
    from scipy.optimize import linear_sum_assignment
    from scipy.sparse import csr_array

LEVELS = (0.7, 0.8, 0.9)
"""Similarities from which on a pair of features counts as a match."""
ROUNDING = 1e-12
"""Share of the mean square below which a variance is what rounding leaves of 0."""


@dataclass(frozen=True)
class Matching:
    """One-to-one matching of two models' features with the largest sum of similarities."""

    pairs: np.ndarray
    """(P, 2) int64: feature of a and feature of b, the most similar pair first."""
    similarities: np.ndarray
    """(P,) float64: similarity of each pair, from -1 to 1."""
    unmatched: tuple[np.ndarray, np.ndarray]
    """Features of a and of b without a partner, because the other model has fewer."""
    left_out: tuple[np.ndarray, np.ndarray]
    """Features of a and of b without a similarity: pruned ones, and among activations those that never vary."""
    chance: tuple[np.ndarray, ...]
    """Similarities (P,) of the best matching at chance, for each permutation."""

    def share_above(self, level: float) -> float:
        """Share of pairs with at least this similarity; 0 if there are no pairs."""
        return _share(self.similarities, level)

    def chance_above(self, level: float) -> float:
        """Share of pairs with at least this similarity at chance, averaged over permutations.

        Raises:
            ValueError: If there were no permutations.
        """
        if not self.chance:
            raise ValueError("chance was not measured; give compare_features permutations of at least 1")
        return sum(_share(similarities, level) for similarities in self.chance) / len(self.chance)

    @property
    def shares(self) -> dict[float, float]:
        """Share of pairs with a similarity of at least 0.7, 0.8 and 0.9: level -> share."""
        return {level: self.share_above(level) for level in LEVELS}


@dataclass(frozen=True)
class FeatureComparison:
    """Result of `compare_features`."""

    layer: int
    directions: Matching
    """Matching by the cosine of the decoders' directions."""
    activations: Matching | None
    """Matching by Pearson's correlation of activations over the same tokens; `None` without text."""
    tokens: int
    """Number of tokens behind the correlations."""


def compare_features(
    model_a: MFNForCausalLM,
    model_b: MFNForCausalLM,
    windows: Windows | None = None,
    *,
    layer: int,
    batch_size: int = 8,
    permutations: int = 0,
    seed: int = 0,
) -> FeatureComparison:
    """Matches the features of one layer of two models one to one, with the largest sum of similarities.

    Correlations are exact, from sums over sparse codes, and the text is read once. Each model runs at its own alpha and
    k. A matrix of m_a x m_b similarities is held in float64. The assignment takes a time of m^3 at worst.

    The best of so many matchings is above 0 by chance alone, which permutations measure. They permute the d entries of
    b's directions, all directions alike, and the tokens of a batch for b's activations. Similarities within each model
    stay, and everything that the two models have in common is gone.

    Args:
        model_a: MFN model.
        model_b: MFN model of the same hidden size and vocabulary; its number of features may differ.
        windows: Rows with `input_ids` (T,), and `attention_mask` (T,) where they are padded: a `datasets.Dataset`, or
            any iterable of such mappings. Rows of one batch have equal length. Without text, directions alone are
            compared.
        layer: Block with an MFN layer in both models.
        batch_size: Windows per batch; b's activations are permuted within a batch.
        permutations: Number of times that chance is measured.
        seed: Seed of the permutations.

    Raises:
        ValueError: If a model has no such layer, hidden sizes or vocabularies differ, or the text has no token.
    """
    models = (model_a, model_b)
    _check(models, layer)
    random = np.random.default_rng(seed)
    kept_a, kept_b = (_kept(model, layer) for model in models)
    rows_a, rows_b = _directions(model_a, layer, kept_a), _directions(model_b, layer, kept_b)
    permuted = [rows_b[:, random.permutation(rows_b.shape[1])] for _ in range(permutations)]
    sizes = (model_a.config.num_features, model_b.config.num_features)
    directions = match((rows_a @ each.T for each in (rows_b, *permuted)), (kept_a, kept_b), sizes)
    if windows is None:
        return FeatureComparison(layer, directions, None, 0)
    moments = Moments(sizes, permutations)
    for batch in tqdm(input_batches(windows, batch_size), "comparing activations", unit="batch", leave=False):
        a, b = (activations_of(model, batch, layers=[layer]).codes[layer] for model in models)
        moments.add(a, b, random)
    if moments.tokens == 0:
        raise ValueError("windows have no token; correlations need some")
    varied = (moments.varied(0, kept_a), moments.varied(1, kept_b))
    activations = match(moments.correlations(*varied), varied, sizes)
    return FeatureComparison(layer, directions, activations, moments.tokens)


def match(
    similarities: Iterable[np.ndarray],
    compared: tuple[np.ndarray, np.ndarray],
    sizes: tuple[int, int],
) -> Matching:
    """Matches features by the first matrix of similarities, and measures chance by the others.

    Args:
        similarities: Matrices (A, B) of similarities between the compared features.
        compared: Features (A,) of a and (B,) of b that the rows and columns stand for.
        sizes: Number of features of a and of b.
    """
    found = []
    for matrix in similarities:
        rows, columns = linear_sum_assignment(matrix, maximize=True)
        values = matrix[rows, columns]
        order = np.argsort(-values, kind="stable")
        found.append((values[order], np.stack([compared[0][rows[order]], compared[1][columns[order]]], 1)))
    (values, pairs), *chance = found
    left_out = tuple(np.setdiff1d(np.arange(size), own) for size, own in zip(sizes, compared, strict=True))
    unmatched = tuple(np.setdiff1d(own, pairs[:, side]) for side, own in enumerate(compared))
    return Matching(pairs, values, unmatched, left_out, tuple(each for each, _ in chance))  # type: ignore[arg-type]


class Moments:
    """Sums over tokens of two models' activations, from which correlations follow."""

    def __init__(self, sizes: tuple[int, int], permutations: int = 0) -> None:
        self.tokens = 0
        self.sums = [np.zeros(size) for size in sizes]
        self.squares = [np.zeros(size) for size in sizes]
        self.products = [csr_array(sizes) for _ in range(1 + permutations)]
        """Matrices (m_a, m_b): one for the tokens in their order, then one per permutation of b's tokens."""

    def add(self, a: csr_array, b: csr_array, random: np.random.Generator) -> None:
        """Adds the activations (N, m_a) and (N, m_b) of one batch."""
        self.tokens += a.shape[0]
        for side, activations in enumerate((a, b)):
            self.sums[side] += activations.sum(axis=0)
            self.squares[side] += activations.power(2).sum(axis=0)
        for place, products in enumerate(self.products):
            partner = b[random.permutation(b.shape[0])] if place else b
            self.products[place] = products + a.T @ partner

    def without(self, part: Moments) -> Moments:
        """Sums without the tokens of `part`, which were among them; permutations are left out."""
        rest = Moments((len(self.sums[0]), len(self.sums[1])))
        rest.tokens = self.tokens - part.tokens
        rest.sums = [whole - own for whole, own in zip(self.sums, part.sums, strict=True)]
        rest.squares = [whole - own for whole, own in zip(self.squares, part.squares, strict=True)]
        rest.products = [self.products[0] - part.products[0]]
        return rest

    def varied(self, side: int, features: np.ndarray) -> np.ndarray:
        """Selects those of some features of one model whose activation is not always the same."""
        return features[(self._variance(side) > ROUNDING * self.squares[side] / self.tokens)[features]]

    def correlations(self, features_a: np.ndarray, features_b: np.ndarray) -> Iterator[np.ndarray]:
        """Yields Pearson's correlations (A, B) of A and B features: one matrix, then one per permutation."""
        chosen = (features_a, features_b)
        means = [self.sums[side][features] / self.tokens for side, features in enumerate(chosen)]
        deviations = [np.sqrt(self._variance(side)[features]) for side, features in enumerate(chosen)]
        for products in self.products:
            covariances = products[features_a][:, features_b].toarray() / self.tokens - np.outer(*means)
            yield covariances / np.outer(*deviations)

    def pair_correlations(self, pairs: np.ndarray) -> list[np.ndarray]:
        """Pearson's correlations (P,) of pairs (P, 2) of features: one array, then one per permutation.

        A correlation is 0 if one feature of the pair varies and the other never does, NaN if neither varies.
        """
        varied = np.stack([np.isin(pairs[:, side], self.varied(side, np.unique(pairs[:, side]))) for side in (0, 1)])
        means = [self.sums[side][pairs[:, side]] / self.tokens for side in (0, 1)]
        spread = np.sqrt(np.prod([self._variance(side)[pairs[:, side]].clip(0) for side in (0, 1)], axis=0))
        found = []
        for products in self.products:
            covariances = np.asarray(products[pairs[:, 0], pairs[:, 1]]).ravel() / self.tokens - means[0] * means[1]
            correlations = np.divide(covariances, spread, out=np.zeros(len(pairs)), where=varied.all(0))
            found.append(np.where(varied.any(0), correlations, np.nan))
        return found

    def covariance_norms(self) -> list[float]:
        """Squared Frobenius norm of the covariances (m_a, m_b): one number, then one per permutation."""
        mean_a, mean_b = (sums / self.tokens for sums in self.sums)
        outer = float((mean_a @ mean_a) * (mean_b @ mean_b))
        return [
            float(products.power(2).sum()) / self.tokens**2
            - 2 * float(mean_a @ (products @ mean_b)) / self.tokens
            + outer
            for products in self.products
        ]

    def _variance(self, side: int) -> np.ndarray:
        return self.squares[side] / self.tokens - (self.sums[side] / self.tokens) ** 2


def _share(similarities: np.ndarray, level: float) -> float:
    return int((similarities >= level).sum()) / max(len(similarities), 1)


def _check(models: tuple[MFNForCausalLM, MFNForCausalLM], layer: int) -> None:
    for model in models:
        check_has_features(model)
    for name, what in (("hidden_size", "directions lie in different spaces"), ("vocab_size", "tokens differ")):
        values = [getattr(model.config, name) for model in models]
        if values[0] != values[1]:
            raise ValueError(f"the models have {name} {values[0]} and {values[1]}: {what}; give models of one base")
    for model in models:
        model.config.check_feature((layer, 0), pruned=True)


def _kept(model: MFNForCausalLM, layer: int) -> np.ndarray:
    """Features (P,) of a layer that are not pruned."""
    return np.setdiff1d(np.arange(model.config.num_features), model.config.pruned_features.get(str(layer), []))


def _directions(model: MFNForCausalLM, layer: int, features: np.ndarray) -> np.ndarray:
    directions = model.mfn_layers[layer].rows_of(torch.from_numpy(features)).decoder.values.detach()
    return F.normalize(directions.double(), dim=-1).cpu().numpy()


__all__ = ["FeatureComparison", "Matching", "Moments", "compare_features", "match"]
