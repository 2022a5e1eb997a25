"""Activations and residuals of a text's tokens, batch by batch: what every measurement of features is made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array, vstack

from ..data.windows import Windows, input_batches
from ..model.modeling_mfn import MFNForCausalLM
from ..model.modes import evaluating
from ..model.sparse_code import SparseCode


class TokenActivations(NamedTuple):
    """A batch of B windows of T tokens, N of which count."""

    input_ids: np.ndarray
    """(B, T) int64."""
    counted: np.ndarray
    """(B, T) bool, the tokens that count: all but padding. They are the rows below, window by window."""
    codes: dict[int, csr_array]
    """Layer -> (N, m) float64; what is stored are the firings, in the order of features."""
    residuals: dict[int, np.ndarray]
    """Layer -> (N, d) float32, h, which the MFN layer reads. Empty unless it was asked for."""


def token_activations(
    model: MFNForCausalLM,
    windows: Windows,
    *,
    layers: Sequence[int] | None = None,
    residuals: bool = False,
    batch_size: int = 8,
) -> Iterator[TokenActivations]:
    """Runs a model, as it is, at its alpha and k, over windows; it is in evaluation mode meanwhile.

    Args:
        layers: blocks; by default all that have an MFN layer.
        residuals: whether to yield h, too.
        batch_size: windows a batch.

    Raises:
        ValueError: if the model has no such layer, or windows of one batch differ in length.
    """
    for batch in input_batches(windows, batch_size):
        yield activations_of(model, batch, layers=layers, residuals=residuals)


class ActivationsAt(NamedTuple):
    """What a model makes of P chosen tokens."""

    codes: dict[int, csr_array]
    """Layer -> (P, m)."""
    residuals: dict[int, np.ndarray]
    """Layer -> (P, d) float32; empty unless asked for."""


def activations_at(
    model: MFNForCausalLM,
    windows: Windows,
    places: np.ndarray,
    *,
    residuals: bool = False,
    batch_size: int = 8,
) -> ActivationsAt:
    """The activations at some places of a text; windows without any are passed over.

    Args:
        windows: all of one length T.
        places: (P,) int64, ascending and distinct: T * window + position, of tokens that are no padding.
        residuals, batch_size: see `token_activations`.

    Raises:
        ValueError: if a place is in padding.
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
    """One batch of `token_activations`."""
    chosen = model.config.layers if layers is None else layers
    for layer in chosen:
        model.config.check_feature((layer, 0), pruned=True)
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with evaluating(model):
        out = model.model(**inputs, output_codes=True, output_reconstructions=residuals, use_cache=False)
    mask = inputs.get("attention_mask")
    counted = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    return TokenActivations(
        inputs["input_ids"].cpu().numpy(),
        counted.cpu().numpy(),
        {layer: as_csr(out.codes[layer].tokens(mask)) for layer in chosen},
        {layer: out.reconstructions[layer].residual[counted].float().cpu().numpy() for layer in chosen}
        if residuals
        else {},
    )


def as_csr(code: SparseCode) -> csr_array:
    """A code (N, K) as a matrix (N, m) in float64. Only firings are stored."""
    tokens, k = code.values.shape
    values, indices = code.values.double().cpu().numpy().ravel(), code.indices.int().cpu().numpy().ravel()
    starts = np.arange(0, tokens * k + 1, k, dtype=np.int32)  # scikit-learn wants indices of 32 bits
    matrix = csr_array((values, indices, starts), shape=(tokens, code.num_features))
    matrix.sum_duplicates()  # where features are steered, one may stand there twice
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
