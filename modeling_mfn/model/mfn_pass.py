"""The record of one forward of the model: requests to the MFN layers, and what the layers leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .sparse_code import SparseCode
from .steering import LayerEdit

EMBEDDINGS = -1
"""Number of the embeddings in `MFNPass.streams`, below every block."""
NON_REENTRANT = (
    'pass gradient_checkpointing_kwargs={"use_reentrant": False}, to PEFT\'s prepare_model_for_kbit_training, too'
)


class Reconstruction(NamedTuple):
    """Inputs of the losses that shape features, from one MFN layer.

    By default their gradients reach the layer's own parameters and stop at its input. Of the five losses only the task
    loss trains the backbone (section 4.5).
    """

    residual: Tensor
    """Vector that the layer codes, (B, T, d): the stream h, or the update u with `codes="update"`."""
    reconstructed: Tensor
    """h_hat or u_hat, (B, T, d)."""
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
        streams: dict[int, Tensor] | None = None,
    ) -> None:
        self.edits = edits or {}
        """Layer -> interventions on its code."""
        self.codes = codes
        """Layer -> code, filled by the layers; `None` if nobody asked for codes."""
        self.reconstructions = reconstructions
        """Layer -> reconstruction, likewise."""
        self.request = request or ReconstructionRequest()
        self.streams = streams
        """With `codes="update"`: layer -> blended stream (B, T, d) that it left, and `EMBEDDINGS` -> input of block 0.
        By layer, so that a block that gradient checkpointing runs again finds the same stream."""
        self.position_ids: Tensor | None = None
        """Positions (1 or B, T) of the tokens, with `codes="update"`."""
        self.with_gradient = torch.is_grad_enabled()
        self.is_over = False
        """True after the forward: a block that gradient checkpointing runs again leaves nothing."""

    @property
    def collects(self) -> bool:
        """True if codes or reconstructions were asked for."""
        return self.codes is not None or self.reconstructions is not None

    def leave_stream(self, layer: int, stream: Tensor) -> None:
        """Keeps the blended stream (B, T, d) of an MFN layer for the next one, with `codes="update"`."""
        if self.streams is None or self.is_over:
            return
        if not self.with_gradient:  # no block runs again
            for passed in sorted(self.streams)[:-1]:
                del self.streams[passed]
        self.streams[layer] = stream

    def stream_before(self, layer: int) -> Tensor | None:
        """Returns the stream (B, T, d) that the last MFN layer left, or the embeddings before the first one.

        `None` with `codes="stream"`.

        Raises:
            ValueError: under reentrant gradient checkpointing, which would lose the gradient of this stream.
        """
        if self.streams is None:
            return None
        if self.with_gradient and not torch.is_grad_enabled():
            raise ValueError(f'codes="update" cannot train under reentrant gradient checkpointing; {NON_REENTRANT}')
        return self.streams[max(left for left in self.streams if left < layer)]

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
                + NON_REENTRANT
            )
        if self.is_over:
            return
        if self.codes is not None:
            self.codes[layer] = code
        if self.reconstructions is not None and reconstruction is not None:
            self.reconstructions[layer] = reconstruction


__all__ = ["MFNPass", "Reconstruction", "ReconstructionRequest"]
