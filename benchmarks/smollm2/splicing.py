"""What a model loses when blocks read something else than their residual stream."""

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
"""The residual stream after a block's attention, (B, T, d) -> what the rest of the model reads in its place."""


def through(layer: MFNLayer) -> Replacement:
    """What the MFN layer would put there at alpha = 1."""

    def replace(h: Tensor) -> Tensor:
        return layer.reconstruct(layer.encode(h), layer.standardise(h))

    return replace


def constant(vector: Tensor) -> Replacement:
    """The same vector (d,) for every token."""
    return lambda h: vector.expand_as(h)


@contextmanager
def spliced(model: MFNForCausalLM, replacements: Mapping[int, Replacement], keep_first: bool = False) -> Iterator[None]:
    """A context in which blocks with an MFN layer go on from a replacement instead of what that layer returns.

    Args:
        model: at alpha = 0, where its other MFN layers are as good as absent.
        replacements: block -> what it reads.
        keep_first: leave the first position of each row alone, whose residual is like no other's.
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
    """Cross entropy in nats, (rows, T - 1), of windows of tokens (rows, T)."""
    windows = [{"input_ids": row} for row in tokens.numpy()]
    return torch.from_numpy(perplexity.next_token_losses(model, windows, batch_size, description))


def recovered(loss: float, base: float, ablated: float) -> float:
    """The share of what ablation costs that a replacement does not cost."""
    return (ablated - loss) / (ablated - base)


@torch.no_grad()
def reconstruction_figures(layer: MFNLayer, h: Tensor) -> dict[str, float]:
    """How well a layer reconstructs the residual streams of windows, (rows, T, d).

    - `explained_variance`: 1 - sum |h - h_hat|^2 / sum |h - mean h|^2 over tokens, without the first of each window;
    - `explained_variance_all`: over all tokens, of which the first ones may outweigh the others together;
    - `explained_variance_standardised`: over all tokens, with h and h_hat shifted and scaled as h is standardised;
    - `active_features`: mean number a token; `dead_share`: of features that are silent on all of these tokens.
    """
    h_hat = torch.cat([through(layer)(rows) for rows in h.split(4)])
    codes = [layer.encode(rows) for rows in h.split(4)]
    active = torch.cat([code.indices[code.values > 0] for code in codes])
    std, mean = torch.std_mean(h, dim=-1, keepdim=True)
    return {
        "explained_variance": _explained(h[:, 1:], h_hat[:, 1:]),
        "explained_variance_all": _explained(h, h_hat),
        "explained_variance_standardised": _explained((h - mean) / std, (h_hat - mean) / std),
        "active_features": len(active) / h[..., 0].numel(),
        "dead_share": 1 - len(active.unique()) / layer.config.num_features,
    }


def _explained(h: Tensor, h_hat: Tensor) -> float:
    h, h_hat = h.flatten(0, 1).double(), h_hat.flatten(0, 1).double()
    return 1 - float((h - h_hat).square().sum() / (h - h.mean(0)).square().sum())
