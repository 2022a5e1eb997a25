"""The MFN layer: one token's residual vector in, the same vector as a sparse mixture of feature directions out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_mfn import MFNConfig
from .interventions import CodeEdit
from .sparse_code import SparseCode, attach_encoder, decode, encode


class Reconstruction(NamedTuple):
    """What the losses that shape features are computed from. Their gradients reach the MFN layer's own parameters and
    stop at its input: of the five losses only the task loss trains the backbone (section 4.5)."""

    residual: Tensor
    """h, (B, T, d), detached."""
    reconstructed: Tensor
    """h_hat, (B, T, d)."""
    code: SparseCode
    """z, (B, T, K)."""


@dataclass
class MFNPass:
    """Rides along one forward of the model to its MFN layers: brings interventions, takes codes back."""

    edits: dict[int, CodeEdit]
    codes: dict[int, SparseCode] | None
    reconstructions: dict[int, Reconstruction] | None
    with_gradient: bool = field(default_factory=torch.is_grad_enabled)
    collecting: bool = True

    def collect(self, layer: MFNLayer, h: Tensor, x: Tensor, code: SparseCode) -> None:
        """Takes what was asked for. A block that runs again for gradient checkpointing, once the forward is over,
        computes the same but leaves nothing."""
        if self.codes is None and self.reconstructions is None:
            return
        if self.with_gradient and not torch.is_grad_enabled():
            raise ValueError(
                "codes cannot be collected under reentrant gradient checkpointing, which would lose their gradients; "
                'enable it with {"use_reentrant": False}, which is the default'
            )
        if self.reconstructions is not None:
            reconstruction = layer.reconstruct_locally(h, x, code)
            if self.collecting:
                self.reconstructions[layer.layer_index] = reconstruction
        if self.codes is not None and self.collecting:
            self.codes[layer.layer_index] = code


class FeatureEncoder(nn.Module):
    """W_e (m, d) and b_e (m,) of eq. 1."""

    def __init__(self, hidden_size: int, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_features, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_features))


class FeatureDecoder(nn.Module):
    """D of eq. 2, a feature's direction a row: (m, d), unit norm; and the constant (d,) that it may have."""

    def __init__(self, hidden_size: int, num_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_features, hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size)) if bias else None

    @torch.no_grad()
    def normalise_rows(self) -> None:
        """Brings every direction back to unit norm."""
        self.weight.copy_(nn.functional.normalize(self.weight.float(), dim=-1))

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Takes out of the gradient what would only change a direction's length."""
        if self.weight.grad is not None:
            along = (self.weight.grad * self.weight).sum(-1, keepdim=True)
            self.weight.grad -= along * self.weight


class MFNLayer(nn.Module):
    """The sparse layer of one block: z = TopK(ReLU(W_e x + b_e), K), h_hat = D z, h' = alpha h_hat + (1 - alpha) h.

    With `input_norm="layer"`, x is h standardised over its d entries, (h - mean) / (std + 1e-5), and h_hat is
    std (D z + b) + mean; with `"none"`, x is h itself.
    """

    epsilon = 1e-5

    def __init__(self, config: MFNConfig, layer_index: int) -> None:
        super().__init__()
        self.config = config
        self.layer_index = layer_index
        self.encoder = FeatureEncoder(config.hidden_size, config.num_features)
        self.decoder = FeatureDecoder(config.hidden_size, config.num_features, config.decoder_bias)

    def forward(self, h: Tensor, mfn_pass: MFNPass | None = None) -> Tensor:
        """(B, T, d) residual stream -> (B, T, d) blended one."""
        x, mean, std = self.standardise(h)
        code = encode(x, self.encoder.weight, self.encoder.bias, self.config.k)
        if mfn_pass is not None:
            if self.layer_index in mfn_pass.edits:
                code = mfn_pass.edits[self.layer_index].apply(code)
            mfn_pass.collect(self, h, x, code)
        h_hat = self.reconstruct(code, mean, std).to(h.dtype)
        if self.config.alpha == 0 and mfn_pass is not None and mfn_pass.reconstructions is not None:
            h_hat = h_hat.detach()  # blocks above need no graph for a gradient of 0; the losses have their own path
        return torch.lerp(h, h_hat, self.config.alpha)  # exact at both ends

    def standardise(self, h: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x (..., d) in the encoder's precision, and mean and std (..., 1) that were taken out of it, if any."""
        if self.config.input_norm == "none":
            return h.to(self.encoder.weight.dtype), None, None
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        std, mean = torch.std_mean(wide, dim=-1, keepdim=True)
        x = (wide - mean) / (std + self.epsilon)
        return x.to(self.encoder.weight.dtype), mean, std

    def reconstruct(self, code: SparseCode, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
        """h_hat (..., d) of a code (..., K)."""
        x_hat = decode(code, self.decoder.weight)
        if self.decoder.bias is not None:
            x_hat = x_hat + self.decoder.bias
        return x_hat if mean is None or std is None else x_hat * std + mean

    def reconstruct_locally(self, h: Tensor, x: Tensor, code: SparseCode) -> Reconstruction:
        """The reconstruction as the feature losses see it: gradients stop at this layer's input."""
        h = h.detach()
        _, mean, std = self.standardise(h)
        code = attach_encoder(code, x.detach(), self.encoder.weight, self.encoder.bias)
        return Reconstruction(h, self.reconstruct(code, mean, std), code)

    @torch.no_grad()
    def initialise(self, directions: Tensor | None = None) -> None:
        """Random unit decoder rows, or the given ones (m, d), the encoder tied to them, biases 0. Leaves parameters
        alone that came from a checkpoint."""
        if directions is None:
            rows = torch.randn_like(self.decoder.weight, dtype=torch.float32)
            init.copy_(self.decoder.weight, nn.functional.normalize(rows, dim=-1).to(rows))
            directions = self.decoder.weight
        else:
            init.copy_(self.decoder.weight, directions)
        init.copy_(self.encoder.weight, directions)
        init.zeros_(self.encoder.bias)
        if self.decoder.bias is not None:
            init.zeros_(self.decoder.bias)

    @torch.no_grad()
    def initialise_biases(self, h: Tensor) -> None:
        """Centres the code on data: the decoder's bias becomes the mean of the encoder's input over tokens h (N, d),
        and the encoder's bias takes this mean out before the features look."""
        centre = self.standardise(h)[0].mean(0)
        self.encoder.bias.copy_(-self.encoder.weight @ centre)
        if self.decoder.bias is not None:
            self.decoder.bias.copy_(centre)


__all__ = ["MFNLayer", "MFNPass", "Reconstruction"]
