"""The MFN layer: one token's residual vector in, the same vector as a sparse mixture of feature directions out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_mfn import MFNConfig
from .feature_names import parse_feature
from .feature_rows import FeatureRows
from .peft_copies import AdapterCopy
from .sparse_code import SparseCode, attach_encoder, decode, encode, rank_features, rectify
from .steering import LayerEdit


class Reconstruction(NamedTuple):
    """What the losses that shape features are computed from. By default their gradients reach the MFN layer's own
    parameters and stop at its input: of the five losses only the task loss trains the backbone (section 4.5)."""

    residual: Tensor
    """h, (B, T, d)."""
    reconstructed: Tensor
    """h_hat, (B, T, d)."""
    code: SparseCode
    """z, (B, T, K)."""
    candidates: SparseCode | None = None
    """The largest pre-activations, those of z first, (B, T, C)."""
    perturbed: SparseCode | None = None
    """z_tilde of the chosen tokens, (n, K)."""
    revived: Tensor | None = None
    """What features that need it make of the error h - h_hat, (B, T, d)."""


@dataclass(frozen=True)
class ReconstructionRequest:
    """What `output_reconstructions` shall bring beside h, h_hat and z: the further inputs of the feature losses, which
    are computed inside the model's forward, where its weights are at hand however they are sharded."""

    stop_gradient: bool = True
    """Whether the losses' gradients end at the layer's input."""
    candidates: int = 0
    """C, pre-activations a token, at least K; 0 for none."""
    perturb: Callable[[Tensor], Tensor] | None = None
    """Makes h_tilde of h, (n, d) -> (n, d)."""
    chosen: Tensor | None = None
    """(n,) tokens to perturb, as indices into B T of them; on any device, as are the features below."""
    revive: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer -> (R,) features that are to reconstruct the error."""
    revive_k: int = 0
    """The most of them that are active on a token."""
    perturb_embeddings: Callable[[Tensor], Tensor] | None = None
    """Makes the embeddings that the whole model runs on of the tokens' own, (B, T, d) -> (B, T, d)."""
    reaches_all: bool = False
    """Whether a loss made of h_hat will give every weight of the layer a gradient, as the reconstruction loss does. At
    alpha 0 the model's output, whose gradient is 0 there, then need not."""


class MFNPass:
    """Rides along one forward of the model to its MFN layers: brings interventions, takes codes back. No dataclass:
    FSDP hands each block a copy of those."""

    def __init__(
        self,
        edits: dict[int, LayerEdit],
        codes: dict[int, SparseCode] | None = None,
        reconstructions: dict[int, Reconstruction] | None = None,
        request: ReconstructionRequest | None = None,
    ) -> None:
        self.edits = edits
        self.codes = codes
        self.reconstructions = reconstructions
        self.request = request or ReconstructionRequest()
        self.with_gradient = torch.is_grad_enabled()
        self.collecting = True

    @property
    def collects(self) -> bool:
        """Whether anything was asked for."""
        return self.codes is not None or self.reconstructions is not None

    def collect(self, layer: MFNLayer, h: Tensor, x: Tensor, ranked: SparseCode, code: SparseCode) -> None:
        """Takes what was asked for. A block that runs again for gradient checkpointing, once the forward is over,
        computes the same but leaves nothing."""
        if not self.collects:
            return
        if self.with_gradient and not torch.is_grad_enabled():
            raise ValueError(
                "codes cannot be collected under reentrant gradient checkpointing, which would lose their gradients; "
                'enable it with {"use_reentrant": False}, which is the default'
            )
        if self.reconstructions is not None:
            reconstruction = layer.reconstruct_locally(h, x, ranked, self.request)
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
    """D of eq. 2, a feature's direction a row: (m, d), of unit norm unless `bake` gave it another; and the constant
    (d,) that it may have."""

    def __init__(self, hidden_size: int, num_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_features, hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size)) if bias else None

    @torch.no_grad()
    def normalise_rows(self, norms: Mapping[int, float] | None = None) -> None:
        """Brings every direction back to unit norm, or to the one that `norms` has for it."""
        rows = nn.functional.normalize(self.weight.float(), dim=-1)
        if norms:
            from torch.distributed.tensor import DTensor, distribute_tensor

            lengths = torch.ones(len(rows), 1, device=rows.device)
            lengths[list(norms), 0] = torch.tensor(list(norms.values()), device=rows.device)
            if isinstance(rows, DTensor):
                lengths = distribute_tensor(lengths, rows.device_mesh, rows.placements)
            rows = rows * lengths
        self.weight.copy_(rows)

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Takes out of the gradient what would only change a direction's length."""
        if self.weight.grad is not None:
            along = (self.weight.grad * self.weight).sum(-1, keepdim=True)
            self.weight.grad -= along * self.weight


class MFNLayer(AdapterCopy):
    """The sparse layer of one block: z = TopK(ReLU(W_e x + b_e), K), h_hat = D z, h' = alpha h_hat + (1 - alpha) h.

    With `input_norm="layer"`, x is h standardised over its d entries, (h - mean) / (std + 1e-5), and h_hat is
    std (D z + b) + mean; with `"none"`, x is h itself.
    """

    epsilon = 1e-5

    def __init__(self, config: MFNConfig, layer_index: int) -> None:
        super().__init__()
        self.config = config
        self.layer_index = layer_index
        self.rows = FeatureRows.of(config, layer_index)
        removed = [
            rows.get(str(layer_index), []) for rows in (config.removed_encoder_rows, config.removed_decoder_rows)
        ]
        encoders, directions = (config.num_features - len(rows) for rows in removed)
        self.encoder = FeatureEncoder(config.hidden_size, encoders)
        self.decoder = FeatureDecoder(config.hidden_size, directions, config.decoder_bias)

    def forward(self, h: Tensor, mfn_pass: MFNPass | None = None) -> Tensor:
        """(B, T, d) residual stream -> (B, T, d) blended one."""
        collects = mfn_pass is not None and mfn_pass.collects
        if self.config.alpha == 0 and not collects and not torch.is_grad_enabled():
            return h
        x, mean, std = self.standardise(h)
        weight, bias, k = self.encoder.weight, self.encoder.bias, self.config.k
        wanted = k if mfn_pass is None else max(k, mfn_pass.request.candidates)
        ranked = rank_features(x, weight, bias, min(wanted, len(weight)))
        code = rectify(self._named(attach_encoder(ranked.first(k), x, weight, bias)))
        if mfn_pass is not None:
            if self.layer_index in mfn_pass.edits:
                code = mfn_pass.edits[self.layer_index].apply(code)
            mfn_pass.collect(self, h, x, ranked, code)
        h_hat = self.reconstruct(code, mean, std).to(h.dtype)
        if self.config.alpha == 0 and mfn_pass is not None and mfn_pass.request.reaches_all:
            h_hat = h_hat.detach()  # blocks above need no graph for a gradient of 0; the loss has its own path
        return torch.lerp(h, h_hat, self.config.alpha)  # exact at both ends

    def normalise_directions(self) -> None:
        """Brings the decoder's directions back to unit norm, or to that of `config.direction_norms`."""
        named = {parse_feature(name): norm for name, norm in self.config.direction_norms.items()}
        norms = {index: norm for (at, index), norm in named.items() if at == self.layer_index}
        rows = self.rows_of(torch.tensor(list(norms), dtype=torch.long))[2][1].tolist() if norms else []
        self.decoder.normalise_rows(dict(zip(rows, norms.values(), strict=True)))

    def standardise(self, h: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x (..., d) in the encoder's precision, and mean and std (..., 1) that were taken out of it, if any."""
        if self.config.input_norm == "none":
            return h.to(self.encoder.weight.dtype), None, None
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        mean = wide.mean(-1, keepdim=True)
        centred = wide - mean
        # as std_mean has it, which takes several times as long
        std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(h.shape[-1] - 1)
        x = centred / (std + self.epsilon)
        return x.to(self.encoder.weight.dtype), mean, std

    def reconstruct(self, code: SparseCode, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
        """h_hat (..., d) of a code (..., K)."""
        x_hat = self._mixture(code)
        if self.decoder.bias is not None:
            x_hat = x_hat + self.decoder.bias
        return x_hat if mean is None or std is None else x_hat * std + mean

    def reconstruct_locally(
        self, h: Tensor, x: Tensor, ranked: SparseCode, request: ReconstructionRequest
    ) -> Reconstruction:
        """The reconstruction as the feature losses see it: gradients stop at this layer's input, unless asked to go
        on."""
        if request.stop_gradient:
            h, x = h.detach(), x.detach()
        _, mean, std = self.standardise(h)
        ranked = self._named(attach_encoder(ranked, x, self.encoder.weight, self.encoder.bias))
        code = rectify(ranked.first(self.config.k))
        h_hat = self.reconstruct(code, mean, std)
        perturbed = revived = None
        if request.perturb is not None and request.chosen is not None:
            perturbed = self.encode(request.perturb(h.flatten(0, -2)[request.chosen.to(h.device)]))
        if self.layer_index in request.revive:
            features = request.revive[self.layer_index].to(h.device)
            revived = self._revive(x.detach(), std, features, request.revive_k)
        return Reconstruction(h, h_hat, code, ranked if request.candidates else None, perturbed, revived)

    @torch.no_grad()
    def input_and_error(self, item: Reconstruction) -> tuple[Tensor, Tensor]:
        """What the encoder read, x (..., d), and what a reconstruction lacks of it, x - x_hat, without a gradient."""
        x, _, std = self.standardise(item.residual)
        error = item.residual - item.reconstructed
        return x, error if std is None else error / (std + self.epsilon)

    def encode(self, h: Tensor) -> SparseCode:
        """The code (..., K) of a residual stream (..., d)."""
        return self._named(encode(self.standardise(h)[0], self.encoder.weight, self.encoder.bias, self.config.k))

    def rows_of(self, features: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Where the weights of features (R,) are, none of which `compact` removed: encoder weight, encoder bias and
        decoder weight, each with R rows of it."""
        features = features.to(self.encoder.weight.device)
        encoder, decoder = (features, features) if self.rows is None else self.rows.find(features)
        return [(self.encoder.weight, encoder), (self.encoder.bias, encoder), (self.decoder.weight, decoder)]

    def directions(self) -> Tensor:
        """The decoder's rows by feature, (m, d); 0 for those that `compact` removed."""
        if self.rows is None or self.rows.decoder_rows is None:
            return self.decoder.weight
        return self.decoder.weight[self.rows.decoder_rows].masked_fill(self.rows.pruned.unsqueeze(-1), 0)

    def _named(self, pairs: SparseCode) -> SparseCode:
        """Pairs by row of the encoder, by feature; pruned ones are 0."""
        return pairs if self.rows is None else self.rows.name(pairs)

    def _mixture(self, code: SparseCode) -> Tensor:
        """D z (..., d)."""
        return decode(code if self.rows is None else self.rows.locate(code), self.decoder.weight)

    def _revive(self, x: Tensor, std: Tensor | None, features: Tensor, k: int) -> Tensor:
        """(B, T, d) from the given features (R,) alone, without the decoder's bias. Their ReLU lets gradients through:
        behind it, a feature whose pre-activations are all negative would never learn. Without it, those that are
        very negative, as a rare feature's are on most tokens, would outweigh the error itself."""
        weight, bias, directions = (parameter[rows] for parameter, rows in self.rows_of(features))
        ranked = attach_encoder(rank_features(x, weight, bias, min(k, len(features))), x, weight, bias)
        values = ranked.values + (ranked.values.relu() - ranked.values).detach()
        error = decode(ranked._replace(values=values), directions)
        return error if std is None else error * std.detach()

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
        init.copy_(self.encoder.weight, directions if self.rows is None else self.rows.tie(directions))
        init.zeros_(self.encoder.bias)
        if self.decoder.bias is not None:
            init.zeros_(self.decoder.bias)

    @torch.no_grad()
    def reset_features(self, features: Tensor, directions: Tensor) -> None:
        """Gives features (R,) new directions (R, d) of unit norm: the decoder's rows, and the encoder's a fifth as long
        as its average row (as Bricken et al. 2023 do, so that many that start at once do not drown the others), with no
        bias but for the data's mean."""
        length = 0.2 * self.encoder.weight.norm(dim=-1).mean()
        directions = directions.to(length.device)
        (weight, read), (bias, _), (written, to) = self.rows_of(features)
        written[to] = directions.to(written)
        weight[read] = (directions * length).to(weight)
        bias[read] = 0
        if self.decoder.bias is not None:
            bias[read] = -weight[read] @ self.decoder.bias

    @torch.no_grad()
    def calibrate(self, h: Tensor) -> None:
        """Fits fresh directions to data, tokens h (N, d). The decoder's bias becomes the mean of the encoder's input,
        and the encoder's bias takes this mean out before the features look. The encoder is then scaled so that the
        reconstruction has least squared error: features that overlap would add up to too much or too little."""
        x = self.standardise(h)[0]
        centre = x.mean(0)
        self.encoder.bias.copy_(-self.encoder.weight @ centre)
        if self.decoder.bias is not None:
            self.decoder.bias.copy_(centre)
        mixture = self._mixture(self.encode(h)).float()
        wanted = x.float() if self.decoder.bias is None else x.float() - centre
        scale = (wanted * mixture).sum() / mixture.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        if scale > 0:
            self.encoder.weight.mul_(scale)
            self.encoder.bias.mul_(scale)


__all__ = ["MFNLayer", "MFNPass", "Reconstruction", "ReconstructionRequest"]
