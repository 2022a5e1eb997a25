"""Replacements of the residual stream in some blocks, and losses with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from modeling_mfn import MFNForCausalLM
from modeling_mfn.evaluation.measures import perplexity
from modeling_mfn.model.mfn_layer import MFNLayer

Replacement = Callable[[Tensor], Tensor]
"""Function from the residual stream after a block's attention, (B, T, d), to its replacement, (B, T, d)."""


def through(layer: MFNLayer) -> Replacement:
    """Replacement by the MFN layer's reconstruction, its output at alpha = 1."""

    def replace(h: Tensor) -> Tensor:
        return layer.reconstruct(layer.encode(h), layer.standardise(h))

    return replace


def constant(vector: Tensor) -> Replacement:
    """Replacement by one vector (d,) for every token."""
    return lambda h: vector.expand_as(h)


@contextmanager
def spliced(model: MFNForCausalLM, replacements: Mapping[int, Replacement], keep_first: bool = False) -> Iterator[None]:
    """Context in which a replacement stands in for the output of the MFN layer in some blocks.

    Args:
        model: a model at alpha = 0, so that other MFN layers change nothing.
        replacements: block -> replacement.
        keep_first: True to leave the first token of each row alone. Its residual stream is unusual.
    """

    def hook(replace: Replacement) -> Callable[..., Tensor]:
        def swap(module: MFNLayer, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            h = inputs[0]
            replaced = replace(h)
            return torch.cat([h[:, :1], replaced[:, 1:]], 1) if keep_first else replaced

        return swap

    handles = [model.mfn_layers[n].register_forward_hook(hook(replace)) for n, replace in replacements.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def next_token_losses(model: MFNForCausalLM, tokens: Tensor, batch_size: int = 4, description: str = "loss") -> Tensor:
    """Next-token cross entropy in nats, (rows, T - 1), of windows of tokens (rows, T)."""
    windows = [{"input_ids": row} for row in tokens.numpy()]
    return torch.from_numpy(perplexity.next_token_losses(model, windows, batch_size, description))


def recovered(loss: float, base: float, ablated: float) -> float:
    """Share of an ablation's loss above the base model that a replacement recovers."""
    return (ablated - loss) / (ablated - base)


@torch.no_grad()
def reconstruction_figures(layer: MFNLayer, h: Tensor) -> dict[str, float]:
    """Quality of a layer's reconstruction of residual streams (rows, T, d).

    - `explained_variance`: 1 - sum |h - h_hat|^2 / sum |h - mean h|^2 over tokens, without the first token of a row;
    - `explained_variance_all`: over all tokens; the first tokens may outweigh all others together;
    - `explained_variance_standardised`: over all tokens, with h and h_hat shifted and scaled as h is standardised;
    - `active_features`: mean number per token;
    - `dead_share`: share of features that are silent on all of these tokens.
    """
    h_hat = torch.cat([through(layer)(rows) for rows in h.split(4)])
    codes = [layer.encode(rows) for rows in h.split(4)]
    active = torch.cat([code.indices[code.values > 0] for code in codes])
    std, mean = torch.std_mean(h.double(), dim=-1, keepdim=True)
    return {
        "explained_variance": _explained_variance(h[:, 1:], h_hat[:, 1:]),
        "explained_variance_all": _explained_variance(h, h_hat),
        "explained_variance_standardised": _explained_variance((h - mean) / std, (h_hat - mean) / std),
        "active_features": len(active) / h[..., 0].numel(),
        "dead_share": 1 - len(active.unique()) / layer.config.num_features,
    }


def _explained_variance(h: Tensor, h_hat: Tensor) -> float:
    h, h_hat = h.flatten(0, 1).double(), h_hat.flatten(0, 1).double()
    return 1 - float((h - h_hat).square().sum() / (h - h.mean(0)).square().sum())
