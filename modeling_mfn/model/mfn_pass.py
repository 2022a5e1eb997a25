"""The record of one forward of the model: requests to the MFN layers, and what the layers leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .sparse_code import SparseCode
from .steering import LayerEdit


class Reconstruction(NamedTuple):
    """Inputs of the losses that shape features, from one MFN layer.

    By default their gradients reach the layer's own parameters and stop at its input. Of the five losses only the task
    loss trains the backbone (section 4.5).
    """

    residual: Tensor
    """h, (B, T, d)."""
    reconstructed: Tensor
    """h_hat, (B, T, d)."""
    code: SparseCode
    """z, (B, T, K), without interventions."""
    candidates: SparseCode | None = None
    """Largest pre-activations, the features of z first, (B, T, C)."""
    perturbed: SparseCode | None = None
    """z_tilde of the chosen tokens, (n, K)."""
    revived: Tensor | None = None
    """Reconstruction of the error h - h_hat by the rare features alone (auxiliary loss), (B, T, d)."""


@dataclass(frozen=True)
class ReconstructionRequest:
    """Further inputs of the feature losses that a training asks of one forward.

    They are computed inside the model's forward, where its weights are at hand even if FSDP spreads them.
    """

    stop_gradient: bool = True
    """Stop the losses' gradients at the layer's input."""
    candidates: int = 0
    """C, pre-activations per token, at least K; 0 for none."""
    perturb: Callable[[Tensor], Tensor] | None = None
    """Makes h_tilde from h, (n, d) -> (n, d)."""
    chosen: Tensor | None = None
    """(n,) tokens to perturb, as indices into the B T tokens; on any device."""
    revive: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer -> (R,) rare features that are to reconstruct the error; on any device."""
    revive_k: int = 0
    """Most rare features that are active on a token."""
    perturb_embeddings: Callable[[Tensor], Tensor] | None = None
    """Makes the model's input of the tokens' embeddings, (B, T, d) -> (B, T, d)."""
    reaches_all: bool = False
    """True if a loss of h_hat gives every weight of the layer a gradient, as the reconstruction loss does. At alpha = 0
    the output can then go around the layer."""


class MFNPass:
    """Requests to the MFN layers in one forward, and what the layers leave.

    Plain attributes, not a dataclass: FSDP hands each block a copy of a dataclass, and results would be lost in it.
    """

    def __init__(
        self,
        edits: Mapping[int, LayerEdit] | None = None,
        codes: dict[int, SparseCode] | None = None,
        reconstructions: dict[int, Reconstruction] | None = None,
        request: ReconstructionRequest | None = None,
    ) -> None:
        self.edits = edits or {}
        """Layer -> interventions on its code."""
        self.codes = codes
        """Layer -> code, filled by the layers; `None` if nobody asked for codes."""
        self.reconstructions = reconstructions
        """Layer -> reconstruction, likewise."""
        self.request = request or ReconstructionRequest()
        self.with_gradient = torch.is_grad_enabled()
        self.is_over = False
        """True after the forward: a block that gradient checkpointing runs again leaves nothing."""

    @property
    def collects(self) -> bool:
        """True if codes or reconstructions were asked for."""
        return self.codes is not None or self.reconstructions is not None

    def edit(self, layer: int, code: SparseCode) -> SparseCode:
        """Applies the interventions on a layer to its code: (B, T, K) -> (B, T, K + I)."""
        return self.edits[layer].apply(code) if layer in self.edits else code

    def leave(self, layer: int, code: SparseCode, reconstruction: Reconstruction | None) -> None:
        """Keeps what was asked for of a layer.

        Raises:
            ValueError: under reentrant gradient checkpointing, whose first run has no gradients.
        """
        if self.collects and self.with_gradient and not torch.is_grad_enabled():
            raise ValueError(
                "codes cannot be collected under reentrant gradient checkpointing, which would lose their gradients; "
                'enable it with {"use_reentrant": False}, which is the default'
            )
        if self.is_over:
            return
        if self.codes is not None:
            self.codes[layer] = code
        if self.reconstructions is not None and reconstruction is not None:
            self.reconstructions[layer] = reconstruction


__all__ = ["MFNPass", "Reconstruction", "ReconstructionRequest"]
