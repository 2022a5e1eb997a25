"""Objective of section 4 for one batch: the inputs that the feature losses need, and the losses made from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.configuration_mfn import MFNConfig
from ..model.mfn_pass import Reconstruction, ReconstructionRequest
from ..model.sparse_code import SparseCode
from .arguments import OF_THE_MODEL, MFNTrainingArguments
from .distributed import gather_code, unshard_for_gradients
from .losses import competition_loss, rate_loss, reconstruction_loss, stability_loss

CANDIDATES_PER_K = 2
"""Pre-activations per token that the rate loss sees, in k: features that nearly fire, at the cost of a sparse backward.
"""


@dataclass(frozen=True)
class Perturbation:
    """Makes h_tilde from h (..., d), for eq. 8."""

    kind: str
    """`"noise"`: Gaussian, of `strength` times the vector's RMS. `"dropout"`: entries are 0 with that probability."""
    strength: float

    def __call__(self, h: Tensor) -> Tensor:
        if self.kind == "dropout":
            return F.dropout(h, self.strength)
        return h + torch.randn_like(h) * self.strength * h.square().mean(-1, keepdim=True).sqrt()


class FeatureObjective:
    """Feature losses of one batch, chosen by the arguments."""

    def __init__(self, args: MFNTrainingArguments, config: MFNConfig) -> None:
        self.args = args
        self.config = config
        self.perturbation: Callable[[Tensor], Tensor] = Perturbation(
            args.stability_perturbation, args.stability_strength
        )

    @property
    def rho(self) -> float:
        """Target firing rate."""
        return self.args.rho if self.args.rho is not None else self.config.k / self.config.num_features

    def weight(self, part: str) -> float:
        """Weight of a part of the objective in the whole loss; parts of layers are means over layers."""
        return self.args.weight(part) * (1 if part in OF_THE_MODEL else len(self.config.layers))

    @property
    def aux_k(self) -> int:
        """Active features of the auxiliary loss."""
        return self.args.aux_k if self.args.aux_k is not None else max(1, self.config.hidden_size // 2)

    @property
    def candidates(self) -> int:
        """Pre-activations per token that the rate loss sees; 0 for the code alone, where no one threshold decides."""
        if self.config.coding_rounds > 1:
            return 0
        return min(CANDIDATES_PER_K * self.config.k, self.config.num_features)

    def request(self, mask: Tensor, revive: Mapping[int, Tensor]) -> ReconstructionRequest:
        """Asks the model's forward for the inputs of the losses.

        Args:
            mask: (B, T), nonzero where a token counts.
            revive: layer -> rare features (R,), for the auxiliary loss.
        """
        args, chosen = self.args, None
        perturbs = args.lambda_stab and args.stability_pass == "layer"
        if perturbs:
            chosen = choose(mask.flatten().nonzero().flatten(), args.stability_fraction)
        return ReconstructionRequest(
            stop_gradient=args.stop_gradient,
            candidates=self.candidates if args.lambda_rate else 0,
            perturb=self.perturbation if perturbs else None,
            chosen=chosen,
            revive=revive,
            revive_k=self.aux_k,
            reaches_all=bool(args.lambda_recon),
        )

    def losses(
        self, item: Reconstruction, mask: Tensor, request: ReconstructionRequest, variation: float = 1.0
    ) -> dict[str, Tensor]:
        """Computes the losses of one MFN layer, without their lambdas.

        Losses are token means over this process's batch; rate and competition are those of all processes' batch.

        Args:
            item: reconstruction that the request brought.
            mask: (B, T), nonzero where a token counts.
            request: of [`FeatureObjective.request`].
            variation: share of the residual stream that differs between tokens. The rest takes no feature, so the
                reconstruction loss is divided by this share.
        """
        args, parts = self.args, {}
        mask = mask.to(item.residual.device)
        if args.lambda_recon:
            error = reconstruction_loss(item.residual, item.reconstructed, mask, args.normalize_losses)
            parts["recon"] = error / variation if args.normalize_losses else error
        if args.lambda_rate or args.lambda_comp:
            code = gather_code(item.code, mask)
        if args.lambda_rate:
            candidates = None if item.candidates is None else gather_code(item.candidates, mask)
            parts["rate"] = rate_loss(code, self.rho, candidates=candidates)
        if args.lambda_comp:
            parts["comp"] = competition_loss(code, normalize=args.normalize_losses)
        if args.lambda_stab and item.perturbed is not None and request.chosen is not None:
            chosen = tokens_of(item.code, request.chosen)
            parts["stab"] = stability_loss(chosen, item.perturbed, normalize=args.normalize_losses)
        if args.weight("aux"):
            parts["aux"] = self._auxiliary(item, mask)
        return parts

    def second_pass(
        self, model: nn.Module, inputs: Mapping[str, Any], clean: Mapping[int, Reconstruction], mask: Tensor
    ) -> dict[int, Tensor]:
        """Computes the stability loss by section 4.4's training note: some rows run again from perturbed embeddings.

        Args:
            model: of the first pass.
            inputs: of the first pass.
            clean: layer -> reconstruction of the first pass.
            mask: (B, T), nonzero where a token counts.

        Returns:
            Layer -> loss.
        """
        rows = choose(torch.arange(len(mask), device=mask.device), self.args.stability_fraction)
        again = {
            name: value[rows] if torch.is_tensor(value) and value.shape[:1] == mask.shape[:1] else value
            for name, value in inputs.items()
            if name != "labels"
        }
        request = ReconstructionRequest(
            self.args.stop_gradient, perturb_embeddings=self.perturbation, reaches_all=bool(self.args.lambda_recon)
        )
        perturbed = model(**again, reconstruction_request=request, logits_to_keep=1).reconstructions
        unshard_for_gradients(model, perturbed)
        losses = {}
        for layer, item in clean.items():
            chosen = rows.to(item.code.values.device)
            code = item.code._replace(indices=item.code.indices[chosen], values=item.code.values[chosen])
            loss = stability_loss(code, perturbed[layer].code, mask[rows], self.args.normalize_losses)
            losses[layer] = loss.to(mask.device)
        return losses

    def _auxiliary(self, item: Reconstruction, mask: Tensor) -> Tensor:
        """Share of the error that the rare features leave; 0 without rare features."""
        if item.revived is None:
            return item.residual.new_zeros((), dtype=torch.float32)
        error = (item.residual - item.reconstructed).detach()
        return reconstruction_loss(error, item.revived, mask)


def choose(tokens: Tensor, share: float) -> Tensor:
    """Draws a share of tokens (N,) at random, at least one."""
    count = max(1, round(share * len(tokens)))
    return tokens[torch.randperm(len(tokens), device=tokens.device)[:count]]


def tokens_of(code: SparseCode, chosen: Tensor) -> SparseCode:
    """Picks the code (n, K) of tokens; `chosen` (n,) indexes the flattened leading shape."""
    chosen = chosen.to(code.indices.device)
    return code._replace(indices=code.indices.flatten(0, -2)[chosen], values=code.values.flatten(0, -2)[chosen])


__all__ = ["FeatureObjective", "Perturbation", "choose", "tokens_of"]
