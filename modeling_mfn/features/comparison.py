"""Two models' features, matched one to one: by what they write, and by when they are active."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from tqdm.auto import tqdm

from ..data.windows import Windows, input_batches
from ..model.modeling_mfn import MFNForCausalLM
from .activations import activations_of

LEVELS = (0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Matching:
    """The one-to-one matching of two models' features with the largest sum of similarities."""

    pairs: np.ndarray
    """(P, 2) int64, feature of a and feature of b, the most similar first."""
    similarities: np.ndarray
    """(P,) float64, from -1 to 1."""
    unmatched: tuple[np.ndarray, np.ndarray]
    """Features of a and of b without a partner: the other model has fewer."""
    left_out: tuple[np.ndarray, np.ndarray]
    """Features of a and of b that have no similarity: pruned ones, and among activations those that never vary."""
    chance: tuple[np.ndarray, ...]
    """For each permutation the similarities (P,) that the best matching has at chance."""

    def share_above(self, level: float) -> float:
        """Share of the pairs with at least this similarity; 0 where there are none."""
        return _share(self.similarities, level)

    def chance_above(self, level: float) -> float:
        """The same at chance, averaged over permutations; `ValueError` if there were none."""
        if not self.chance:
            raise ValueError("chance was not measured; give compare_features permutations of at least 1")
        return sum(_share(similarities, level) for similarities in self.chance) / len(self.chance)

    @property
    def shares(self) -> dict[float, float]:
        """Share of the pairs with a similarity of at least 0.7, 0.8 and 0.9."""
        return {level: self.share_above(level) for level in LEVELS}


@dataclass(frozen=True)
class FeatureComparison:
    """What [`compare_features`] found."""

    layer: int
    directions: Matching
    """By cosine of the decoders' directions."""
    activations: Matching | None
    """By Pearson's correlation of activations over the same tokens; `None` without text."""
    tokens: int
    """Tokens that the correlations are from."""


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
    """Matches the features of one layer of two models one to one, with the largest sum of similarities there is.

    Correlations are exact, from sums over sparse codes, and the text is read once. Each model runs at its own alpha and
    k. A matrix of m_a x m_b similarities is held in float64, and the assignment takes a time of m^3 at worst.

    The best of so many matchings is above 0 by chance alone. A permutation measures that: of the d entries of b's
    directions, the same for all of them, and of the tokens of a batch for b's activations. What each model's features
    are like among themselves then stays, and what the two have in common is gone.

    Args:
        model_a, model_b: MFN models of the same hidden size and vocabulary; their m may differ.
        windows: rows with `input_ids` (T,), and `attention_mask` (T,) where they are padded: a `datasets.Dataset`, or
            any iterable of such mappings. Rows of one batch have equal length.
        layer: block index.
        batch_size: rows a batch; b's activations are permuted within it.
        permutations: how many times chance is measured.
        seed: of the permutations.

    Raises:
        ValueError: if a model has no such layer, the two differ in hidden size or vocabulary, or the text has no token.
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


def _share(similarities: np.ndarray, level: float) -> float:
    return int((similarities >= level).sum()) / max(len(similarities), 1)


def _check(models: tuple[MFNForCausalLM, MFNForCausalLM], layer: int) -> None:
    for name, what in (("hidden_size", "directions lie in different spaces"), ("vocab_size", "tokens differ")):
        values = [getattr(model.config, name) for model in models]
        if values[0] != values[1]:
            raise ValueError(f"the models have {name} {values[0]} and {values[1]}: {what}; give models of one base")
    for model in models:
        model.config.check_feature((layer, 0), pruned=True)


def _kept(model: MFNForCausalLM, layer: int) -> np.ndarray:
    """Features (P,) that are not pruned."""
    return np.setdiff1d(np.arange(model.config.num_features), model.config.pruned_features.get(str(layer), []))


def _directions(model: MFNForCausalLM, layer: int, features: np.ndarray) -> np.ndarray:
    directions = model.mfn_layers[layer].rows_of(torch.from_numpy(features)).decoder.values.detach()
    return F.normalize(directions.double(), dim=-1).cpu().numpy()


def match(
    similarities: Iterable[np.ndarray],
    compared: tuple[np.ndarray, np.ndarray],
    sizes: tuple[int, int],
) -> Matching:
    """The matching by the first matrix of similarities between compared features, and chance by the others."""
    found = []
    for matrix in similarities:
        rows, columns = linear_sum_assignment(matrix, maximize=True)
        values = matrix[rows, columns]
        order = np.argsort(-values, kind="stable")
        found.append((values[order], np.stack([compared[0][rows[order]], compared[1][columns[order]]], 1)))
    (values, pairs), *chance = found
    left_out = tuple(np.setdiff1d(np.arange(size), of) for size, of in zip(sizes, compared, strict=True))
    unmatched = tuple(np.setdiff1d(of, pairs[:, side]) for side, of in enumerate(compared))
    return Matching(pairs, values, unmatched, left_out, tuple(each for each, _ in chance))  # type: ignore[arg-type]


class Moments:
    """Sums over tokens of two models' activations."""

    def __init__(self, sizes: tuple[int, int], permutations: int = 0) -> None:
        self.tokens = 0
        self.sums = [np.zeros(size) for size in sizes]
        self.squares = [np.zeros(size) for size in sizes]
        self.products = [csr_array(sizes) for _ in range(1 + permutations)]
        """(m_a, m_b), as the tokens are, then with those of b permuted."""

    def add(self, a: csr_array, b: csr_array, random: np.random.Generator) -> None:
        """Takes in the activations (N, m_a) and (N, m_b) of one batch."""
        self.tokens += a.shape[0]
        for side, activations in enumerate((a, b)):
            self.sums[side] += activations.sum(axis=0)
            self.squares[side] += activations.power(2).sum(axis=0)
        for place, products in enumerate(self.products):
            partner = b[random.permutation(b.shape[0])] if place else b
            self.products[place] = products + a.T @ partner

    def without(self, part: Moments) -> Moments:
        """Those of all tokens but the ones of `part`, which were among them; without permutations."""
        rest = Moments((len(self.sums[0]), len(self.sums[1])))
        rest.tokens = self.tokens - part.tokens
        rest.sums = [of - own for of, own in zip(self.sums, part.sums, strict=True)]
        rest.squares = [of - own for of, own in zip(self.squares, part.squares, strict=True)]
        rest.products = [self.products[0] - part.products[0]]
        return rest

    def _variance(self, side: int) -> np.ndarray:
        return self.squares[side] / self.tokens - (self.sums[side] / self.tokens) ** 2

    def varied(self, side: int, features: np.ndarray) -> np.ndarray:
        """Those of some features whose activation is not always the same."""
        # what rounding leaves of a variance of 0 is far below this share of the mean square
        return features[(self._variance(side) > 1e-12 * self.squares[side] / self.tokens)[features]]

    def correlations(self, features_a: np.ndarray, features_b: np.ndarray) -> Iterator[np.ndarray]:
        """Pearson's, (A, B) for A and B features: as the tokens are, then for each permutation."""
        chosen = (features_a, features_b)
        means = [self.sums[side][features] / self.tokens for side, features in enumerate(chosen)]
        deviations = [np.sqrt(self._variance(side)[features]) for side, features in enumerate(chosen)]
        for products in self.products:
            covariances = products[features_a][:, features_b].toarray() / self.tokens - np.outer(*means)
            yield covariances / np.outer(*deviations)

    def pair_correlations(self, pairs: np.ndarray) -> list[np.ndarray]:
        """Pearson's of given pairs (P, 2) of features: (P,) as the tokens are, then for each permutation. 0 where one
        of the two varies and the other never does, NaN where neither does."""
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
        """Squared Frobenius norms of the (m_a, m_b) covariances: as the tokens are, then for each permutation."""
        mean_a, mean_b = (sums / self.tokens for sums in self.sums)
        outer = float((mean_a @ mean_a) * (mean_b @ mean_b))
        return [
            float(products.power(2).sum()) / self.tokens**2
            - 2 * float(mean_a @ (products @ mean_b)) / self.tokens
            + outer
            for products in self.products
        ]


__all__ = ["FeatureComparison", "Matching", "Moments", "compare_features", "match"]
