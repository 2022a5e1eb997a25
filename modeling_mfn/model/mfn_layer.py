"""The MFN layer: a residual vector in, the same vector as a sparse mixture of feature directions out."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_mfn import MFNConfig
from .feature_names import parse_feature
from .feature_rows import FeatureRows
from .feature_weights import FeatureDecoder, FeatureEncoder, FeatureWeights, WeightRows
from .mfn_pass import MFNPass, Reconstruction
from .offloading import in_memory
from .peft_copies import AdapterCopy
from .pursuit import pursue
from .sparse_code import (
    SparseCode,
    attach_encoder,
    decode,
    encode,
    in_transform,
    pass_to_input,
    rank_features,
    rectify,
)
from .twins import is_a

SMALLER = 2.0**-40
"""Factor of a residual stream whose squares are summed: the sum is finite up to a norm of 1e31 instead of 1e19. A
standard deviation below 1e-7, where it loses digits, is far below `MFNLayer.epsilon`."""
RESET_ENCODER_SCALE = 0.2
"""Norm of a reset feature's encoder row, as a share of the average row's. Bricken et al. (2023) use the same, so that
many features that start at once do not drown the others."""


LARGEST_ENTRY = 1e15
"""Largest entry of a steered residual stream: squares of its entries can be summed in float32."""


class Standardised(NamedTuple):
    """An encoder input, and what was taken out of the residual stream to make it."""

    x: Tensor
    """(..., d), in the encoder's precision."""
    mean: Tensor | None
    """(..., 1), over the d entries; `None` with `input_norm="none"`, where x is the residual itself."""
    std: Tensor | None
    """(..., 1), likewise."""

    def undo(self, x_hat: Tensor) -> Tensor:
        """Brings a mixture of directions (..., d) back to the scale of the residual stream."""
        return x_hat if self.mean is None or self.std is None else x_hat * self.std + self.mean

    def detach(self) -> Standardised:
        """Returns the same values without a gradient."""
        return Standardised(*(None if part is None else part.detach() for part in self))  # type: ignore[arg-type]


class MFNLayer(AdapterCopy):
    """The sparse layer of one block: z = TopK(ReLU(W_e x + b_e), K), h_hat = D z, h' = alpha h_hat + (1 - alpha) h.

    With `input_norm="layer"`, x is h standardised over its d entries, (h - mean) / (std + 1e-5), and h_hat is
    std (D z + b) + mean. With `input_norm="none"`, x is h itself.

    With `codes="update"`, the layer codes u = h - s in place of h, where s is the stream that the last MFN layer left.
    Then h_hat = s + u_hat, and the rest stays.

    With `coding_rounds` and `refine_steps`, the encoder chooses only some of the K features, and `pursuit.py` the rest
    and their values.
    """

    epsilon = 1e-5

    def __init__(self, config: MFNConfig, layer_index: int) -> None:
        super().__init__()
        self.config = config
        self.layer_index = layer_index
        self.rows = FeatureRows.of(config, layer_index)
        encoders, directions = (
            config.num_features - len(removed.get(str(layer_index), []))
            for removed in (config.removed_encoder_rows, config.removed_decoder_rows)
        )
        self.encoder = FeatureEncoder(config.hidden_size, encoders)
        self.decoder = FeatureDecoder(config.hidden_size, directions, config.decoder_bias)
        self.hook_in = nn.Identity()
        """Tap for hooks: exactly what the layer codes passes through it, h or u (B, T, d)."""
        self.was_trained = False

    def train(self, mode: bool = True) -> MFNLayer:
        """Sets the mode as torch does. A layer that was in training may have other features when it is saved."""
        self.was_trained |= mode
        return super().train(mode)

    def has_named_features(self) -> None:
        """Notes that the features have their name: they are as the last training left them."""
        self.was_trained = False

    def forward(self, h: Tensor, mfn_pass: MFNPass | None = None) -> Tensor:
        """Blends the residual stream with its reconstruction, eqs. 1 to 3: (B, T, d) -> (B, T, d)."""
        mfn_pass = mfn_pass or MFNPass()
        if self.alpha == 0 and not mfn_pass.collects and not torch.is_grad_enabled():
            if self._is_tapped:
                self.hook_in(self.coded_part(h, mfn_pass))
            return h
        u = self.hook_in(self.coded_part(h, mfn_pass))
        read = self.standardise(u)
        with in_memory(self.encoder, self.decoder):
            if mfn_pass.reconstructions is None:
                z, reconstruction = mfn_pass.edit(self.layer_index, self._encode(read.x)), None  # eq. 1
                u_hat = read.undo(self._mixture(z))  # eq. 2
            else:
                z, u_hat, reconstruction = self._reconstruct_for_losses(u, read, mfn_pass)
        mfn_pass.leave(self.layer_index, z, reconstruction)
        return self._blend(h, u_hat, mfn_pass)  # eq. 3

    @property
    def _is_tapped(self) -> bool:
        """True if a hook waits for what the layer codes."""
        return bool(self.hook_in._forward_hooks or self.hook_in._forward_pre_hooks)

    def coded_part(self, h: Tensor, mfn_pass: MFNPass) -> Tensor:
        """Returns what the layer codes of the residual stream (B, T, d): h, or u = h - s with `codes="update"`."""
        before = mfn_pass.stream_before(self.layer_index)
        return h if before is None else h - before.to(h.device)

    def output_of(self, code: SparseCode, h: Tensor, mfn_pass: MFNPass) -> Tensor:
        """Returns the layer's output h' (B, T, d) for another code (B, T, K) of the same input h (B, T, d)."""
        u_hat = self.reconstruct(code, self.standardise(self.coded_part(h, mfn_pass)))
        return self._blend(h, u_hat, mfn_pass)

    def _blend(self, h: Tensor, u_hat: Tensor, mfn_pass: MFNPass) -> Tensor:
        """h' = alpha h_hat + (1 - alpha) h, exact at both ends."""
        before = mfn_pass.stream_before(self.layer_index)
        h_hat = u_hat if before is None else before.to(h.device) + u_hat
        if self.layer_index in mfn_pass.edits:
            h_hat = _shortened(h_hat, h.dtype)
        return torch.lerp(h, h_hat.to(h.dtype), self.alpha)

    def standardise(self, h: Tensor) -> Standardised:
        """Returns the encoder's input for a residual stream (..., d), with the mean and std taken out of it, if any."""
        if self.config.input_norm == "none":
            return Standardised(h.to(self.encoder.weight.dtype), None, None)
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        mean = wide.mean(-1, keepdim=True)
        # A power of two changes no digit, and squares of large residuals stay finite.
        centred = torch.add(mean * -SMALLER, wide, alpha=SMALLER)
        # equals torch.std, in a fraction of its time
        std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(h.shape[-1] - 1) / SMALLER
        # exporters to ONNX drop the addition of a number as small as epsilon * SMALLER
        x = centred / ((std + self.epsilon) * SMALLER)
        return Standardised(x.to(self.encoder.weight.dtype), mean, std)

    def encode(self, h: Tensor) -> SparseCode:
        """Returns the code (..., K) of a residual stream (..., d), eq. 1."""
        with in_memory(self.encoder, self.decoder):
            return self._encode(self.standardise(h).x)

    def reconstruct(self, code: SparseCode, read: Standardised | None = None) -> Tensor:
        """Returns h_hat (..., d) of a code (..., K), eq. 2, on the scale of the residual that was read.

        Without `read`, return D z + b, on the scale of the encoder's input.
        """
        with in_memory(self.decoder):
            return self._mixture(code) if read is None else read.undo(self._mixture(code))

    def _encode(self, x: Tensor) -> SparseCode:
        """z of an encoder input: (..., d) -> (..., K)."""
        return self._complete(self._first_round(x), x)

    def _first_round(self, x: Tensor) -> SparseCode:
        """Features of x (..., d) that the encoder chooses, (..., C)."""
        return self._named(encode(x, self.encoder.weight, self.encoder.bias, self._chosen_by_encoder))

    @property
    def _chosen_by_encoder(self) -> int:
        """C, features of the first round: all K of eq. 1, less those of further rounds."""
        return self.k - (self._rounds - 1) * (self.k // self._rounds)

    @property
    def _rounds(self) -> int:
        """Rounds that choose at least one feature each."""
        return min(self.config.coding_rounds, self.k)

    def _complete(self, code: SparseCode, x: Tensor, chosen: Tensor | None = None) -> SparseCode:
        """Completes the code (..., C) of the first round: -> (..., K). `chosen` is as in [`pursue`]."""
        config = self.config
        if not config.codes_by_pursuit:
            return code
        target = x if self.decoder.bias is None else x - self.decoder.bias
        per_round = self.k // self._rounds
        return pursue(code, target, self.directions(), self._rounds, per_round, config.refine_steps, chosen)

    def _mixture(self, code: SparseCode) -> Tensor:
        """D z + b: (..., K) -> (..., d)."""
        x_hat = decode(self._located(code), self.decoder.weight)
        return x_hat if self.decoder.bias is None else x_hat + self.decoder.bias

    def _reconstruct_for_losses(
        self, h: Tensor, read: Standardised, mfn_pass: MFNPass
    ) -> tuple[SparseCode, Tensor, Reconstruction]:
        """Encodes and decodes once for two readers: the feature losses and the model.

        Gradients of the losses end at the layer's input. Gradients of the model go on through it, so the output gets
        its path to the input back, without decoding again.
        """
        request, weight, bias, count = mfn_pass.request, self.encoder.weight, self.encoder.bias, self._chosen_by_encoder
        seen = read.detach() if request.stop_gradient else read
        ranked = rank_features(seen.x, weight, bias, min(max(count, request.candidates), len(weight)))
        named = self._named(attach_encoder(ranked, seen.x, weight, bias))
        z = self._complete(rectify(named.first(count)), seen.x)
        x_hat = self._mixture(z)
        reconstruction = self._with_further_inputs(h, seen, z, x_hat, named, mfn_pass)
        through = z
        if request.stop_gradient and read.x.requires_grad:  # the same code, with a path to the input
            again = attach_encoder(ranked.first(count), read.x, weight, bias)
            through = self._complete(rectify(self._named(again)), read.x, z.indices)
        if self.layer_index in mfn_pass.edits:
            edited = mfn_pass.edit(self.layer_index, through)
            return edited, read.undo(self._mixture(edited)), reconstruction
        if self.alpha == 0 and request.reaches_all:
            return through, h, reconstruction  # a gradient of 0 needs no graph here; the loss has its own
        if through is z:
            return z, read.undo(x_hat), reconstruction
        if self.config.codes_by_pursuit or in_transform():
            return through, read.undo(self._mixture(through)), reconstruction
        x_hat = pass_to_input(x_hat, read.x, ranked.first(count), weight, self._located(z), self.decoder.weight)
        return through, read.undo(x_hat), reconstruction

    def _with_further_inputs(
        self, h: Tensor, seen: Standardised, z: SparseCode, x_hat: Tensor, named: SparseCode, mfn_pass: MFNPass
    ) -> Reconstruction:
        """The reconstruction with whatever else the feature losses asked for."""
        request = mfn_pass.request
        h = h.detach() if request.stop_gradient else h
        perturbed = revived = None
        if request.perturb is not None and request.chosen is not None:
            perturbed = self.encode(request.perturb(h.flatten(0, -2)[request.chosen.to(h.device)]))
        if self.layer_index in request.revive:
            revived = self._revive(seen.detach(), request.revive[self.layer_index].to(h.device), request.revive_k)
        candidates = named if request.candidates else None
        return Reconstruction(h, seen.undo(x_hat), z, candidates, perturbed, revived)

    def _revive(self, seen: Standardised, features: Tensor, k: int) -> Tensor:
        """Reconstructs the error by rare features (R,) alone, without the decoder's bias: -> (B, T, d).

        Gradients pass their ReLU as if it were the identity: behind a true one, a feature whose pre-activations are all
        negative would never learn. Without any, pre-activations far below 0, which rare features have on most tokens,
        would outweigh the error.
        """
        weight, bias, directions = (each.values for each in self.rows_of(features))
        ranked = attach_encoder(rank_features(seen.x, weight, bias, min(k, len(features))), seen.x, weight, bias)
        values = ranked.values + (ranked.values.relu() - ranked.values).detach()
        error = decode(ranked._replace(values=values), directions)
        return error if seen.std is None else error * seen.std

    @torch.no_grad()
    def input_and_error(self, item: Reconstruction) -> tuple[Tensor, Tensor]:
        """Returns the encoder's input x (..., d) and what the reconstruction lacks of it, x - x_hat."""
        x, _, std = self.standardise(item.residual)
        error = item.residual - item.reconstructed
        return x, error if std is None else error / (std + self.epsilon)

    def rows_of(self, features: Tensor) -> FeatureWeights:
        """Finds the weights of features (R,), none of which `compact` removed."""
        with in_memory(self.encoder, self.decoder):
            features = features.to(self.encoder.weight.device)
            encoder, decoder = (features, features) if self.rows is None else self.rows.find(features)
            return FeatureWeights(
                WeightRows(self.encoder.weight, encoder),
                WeightRows(self.encoder.bias, encoder),
                WeightRows(self.decoder.weight, decoder),
            )

    def directions(self) -> Tensor:
        """Returns the decoder's rows by feature, (m, d); 0 for features that `compact` removed."""
        if self.rows is None or self.rows.decoder_rows is None:
            return self.decoder.weight
        return self.decoder.weight[self.rows.decoder_rows].masked_fill(self.rows.pruned.unsqueeze(-1), 0)

    @torch.no_grad()
    def normalise_directions(self) -> None:
        """Brings the decoder's directions back to unit norm, or to the norm in `config.direction_norms`."""
        self.decoder.weight.copy_(self.expected_directions())

    def expected_directions(self) -> Tensor:
        """Returns the decoder's rows at unit norm, or at the norm in `config.direction_norms`: (rows, d), float32."""
        named = {parse_feature(name): norm for name, norm in self.config.direction_norms.items()}
        norms = {index: norm for (layer, index), norm in named.items() if layer == self.layer_index}
        rows = self.rows_of(torch.tensor(list(norms), dtype=torch.long)).decoder.rows.tolist() if norms else []
        return self.decoder.at_norms(dict(zip(rows, norms.values(), strict=True)))

    def _named(self, pairs: SparseCode) -> SparseCode:
        """Pairs by row of the encoder -> by feature; pruned features get the value 0."""
        return pairs if self.rows is None else self.rows.name(pairs)

    def _located(self, code: SparseCode) -> SparseCode:
        """Pairs by feature -> by row of the decoder."""
        return code if self.rows is None else self.rows.locate(code)

    @torch.no_grad()
    def initialise(self, directions: Tensor | None = None) -> None:
        """Sets random unit directions, or the given ones (m, d), encoders tied to them, and biases of 0.

        Parameters that came from a checkpoint keep their values.
        """
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
        """Gives features (R,) new directions (R, d) of unit norm, and short encoder rows along them.

        The encoder's bias takes the data's mean out, as `calibrate` does.
        """
        length = RESET_ENCODER_SCALE * self.encoder.weight.norm(dim=-1).mean()
        directions = directions.to(length.device)
        encoder, bias, decoder = self.rows_of(features)
        decoder.parameter[decoder.rows] = directions.to(decoder.parameter)
        encoder.parameter[encoder.rows] = (directions * length).to(encoder.parameter)
        bias.parameter[bias.rows] = 0
        if self.decoder.bias is not None:
            bias.parameter[bias.rows] = -encoder.values @ self.decoder.bias

    @torch.no_grad()
    def calibrate(self, h: Tensor) -> None:
        """Fits fresh directions to tokens h (N, d).

        The decoder's bias becomes the mean of the encoder's input, and the encoder's bias takes this mean out. The
        encoder is then scaled for the least squared error, as overlapping features would add up to too much or too
        little.
        """
        x = self.standardise(h).x
        centre = x.mean(0)
        self.encoder.bias.copy_(-self.encoder.weight @ centre)
        if self.decoder.bias is not None:
            self.decoder.bias.copy_(centre)
        mixture = decode(self._located(self._first_round(x)), self.decoder.weight).float()
        wanted = x.float() if self.decoder.bias is None else x.float() - centre
        scale = (wanted * mixture).sum() / mixture.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        if scale > 0:
            self.encoder.weight.mul_(scale)
            self.encoder.bias.mul_(scale)


def _shortened(h: Tensor, dtype: torch.dtype) -> Tensor:
    """Shortens steered residual streams (..., d) that are too long for a precision. Their direction stays."""
    # half of float16's range, as later blocks add to the stream
    limit = torch.finfo(dtype).max / 2 if dtype == torch.float16 else LARGEST_ENTRY
    most = torch.finfo(h.dtype).max
    h = h.clamp(-most, most)  # no infinite entries
    return h * (limit / h.abs().amax(-1, keepdim=True).clamp_min(1)).clamp_max(1)


def mfn_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of all MFN layers by name, shared ones under each of their names.

    PEFT keeps the original of a layer that it copied; originals are left out.
    """
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in model.named_modules(remove_duplicate=False)
        if is_a(module, MFNLayer) and not path.endswith("original_module")
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


__all__ = ["MFNLayer", "Standardised", "mfn_parameters"]
