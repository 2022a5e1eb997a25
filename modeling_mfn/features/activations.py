"""Activations and residuals of a text's tokens, batch by batch, from which measures of features are computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data.windows import Windows, input_batches
from ..model.masks import tokens_that_count
from ..model.mfn_for_causal_lm import MFNForCausalLM
from ..model.mfn_layer import MFNLayer
from ..model.modes import evaluating
from ..model.sparse_code import SparseCode
from ..utils.extras import needs

with needs("labels"):
    from scipy.sparse import csr_array, vstack


class TokenActivations(NamedTuple):
    """Activations on a batch of B windows of T tokens, N of which count."""

    input_ids: np.ndarray
    """(B, T) int64."""
    counted: np.ndarray
    """(B, T) bool: true for tokens that count, which are all but padding. They are the rows below, in this order."""
    codes: dict[int, csr_array]
    """Layer -> activations (N, m) float64; firings are stored, in the order of features."""
    residuals: dict[int, np.ndarray]
    """Layer -> residual stream h (N, d) float32 before the MFN layer. Empty unless asked for."""


def token_activations(
    model: MFNForCausalLM,
    windows: Windows,
    *,
    layers: Sequence[int] | None = None,
    residuals: bool = False,
    batch_size: int = 8,
) -> Iterator[TokenActivations]:
    """Runs a model over windows and yields the activations of each batch.

    The model runs as it is, at its alpha and k, but in evaluation mode.

    Args:
        model: MFN model.
        windows: Rows of tokens; those of one batch have equal length.
        layers: Blocks with an MFN layer; by default all of them.
        residuals: True to yield the residual h, too.
        batch_size: Windows per batch.

    Raises:
        ValueError: If a layer does not exist, or windows of one batch differ in length.
    """
    for batch in input_batches(windows, batch_size):
        yield activations_of(model, batch, layers=layers, residuals=residuals)


class ActivationsAt(NamedTuple):
    """Activations at P chosen tokens."""

    codes: dict[int, csr_array]
    """Layer -> activations (P, m)."""
    residuals: dict[int, np.ndarray]
    """Layer -> residual h (P, d) float32. Empty unless asked for."""


def activations_at(
    model: MFNForCausalLM,
    windows: Windows,
    places: np.ndarray,
    *,
    residuals: bool = False,
    batch_size: int = 8,
) -> ActivationsAt:
    """Activations at some places of a text; windows without a place are not run.

    Args:
        model: MFN model.
        windows: Rows of tokens, all of one length T.
        places: (P,) int64, ascending and distinct: T * window + position, of tokens that are not padding.
        residuals: True to return the residual h, too.
        batch_size: Windows per batch.

    Raises:
        ValueError: If a place is in padding.
    """
    rows = list(windows)
    length = len(rows[0]["input_ids"])
    wanted = np.unique(places // length)
    found: list[TokenActivations] = []
    chosen = (rows[window] for window in wanted.tolist())
    for number, batch in enumerate(token_activations(model, chosen, residuals=residuals, batch_size=batch_size)):
        own = wanted[number * batch_size :][: len(batch.input_ids)]
        chosen_here = np.isin(own[:, None] * length + np.arange(length), places)
        if (padding := np.argwhere(chosen_here & ~batch.counted)).size:
            window, position = own[padding[0, 0]], padding[0, 1]
            raise ValueError(f"token {position} of window {window} is padding; places must be of tokens that count")
        kept = chosen_here[batch.counted]
        codes = {layer: code[kept] for layer, code in batch.codes.items()}
        found.append(batch._replace(codes=codes, residuals={at: h[kept] for at, h in batch.residuals.items()}))
    return ActivationsAt(
        {layer: vstack([batch.codes[layer] for batch in found], format="csr") for layer in found[0].codes},
        {layer: np.concatenate([batch.residuals[layer] for batch in found]) for layer in found[0].residuals},
    )


@torch.no_grad()
def activations_of(
    model: MFNForCausalLM,
    batch: Mapping[str, torch.Tensor],
    *,
    layers: Sequence[int] | None = None,
    residuals: bool = False,
) -> TokenActivations:
    """Activations on one batch of model inputs; see `token_activations` for the other arguments."""
    chosen = model.config.layers if layers is None else layers
    for layer in chosen:
        model.config.check_feature((layer, 0), pruned=True)
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with evaluating(model), _streams_before(model, chosen if residuals else ()) as streams:
        out = model.model(**inputs, output_codes=True, use_cache=False)
    counted = tokens_that_count(inputs).bool()
    return TokenActivations(
        inputs["input_ids"].cpu().numpy(),
        counted.cpu().numpy(),
        {layer: as_csr(out.codes[layer].tokens(counted)) for layer in chosen},
        {layer: h[counted.to(h.device)].float().cpu().numpy() for layer, h in streams.items()},
    )


@contextmanager
def _streams_before(model: MFNForCausalLM, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Yields layer -> residual stream (B, T, d) before its MFN layer in the last forward."""
    found: dict[int, torch.Tensor] = {}

    def keep(module: MFNLayer, arguments: tuple[Any, ...]) -> None:
        found[module.layer_index] = arguments[0]

    handles = [model.mfn_layers[layer].register_forward_pre_hook(keep) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def as_csr(code: SparseCode) -> csr_array:
    """Converts a code (N, K) to a sparse matrix (N, m) in float64 that stores firings only."""
    tokens, k = code.values.shape
    values, indices = code.values.double().cpu().numpy().ravel(), code.indices.int().cpu().numpy().ravel()
    starts = np.arange(0, tokens * k + 1, k, dtype=np.int32)  # scikit-learn takes 32-bit indices only
    matrix = csr_array((values, indices, starts), shape=(tokens, code.num_features))
    matrix.sum_duplicates()  # a steered feature may stand in a code twice
    matrix.eliminate_zeros()
    return matrix


__all__ = [
    "ActivationsAt",
    "TokenActivations",
    "activations_at",
    "activations_of",
    "as_csr",
    "token_activations",
]
