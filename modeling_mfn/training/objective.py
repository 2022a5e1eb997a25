"""Section 4's objective for one batch: which inputs the feature losses need, and the losses made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.configuration_mfn import MFNConfig
from ..model.mfn_pass import Reconstruction, ReconstructionRequest
from ..model.sparse_code import SparseCode
from .arguments import MFNTrainingArguments
from .distributed import gather_code
from .losses import competition_loss, rate_loss, reconstruction_loss, stability_loss


@dataclass(frozen=True)
class Perturbation:
    """Makes h_tilde of h (..., d), for eq. 8."""

    kind: str
    """`"noise"`: Gaussian, of `strength` times the vector's RMS. `"dropout"`: entries are 0 with that probability."""
    strength: float

    def __call__(self, h: Tensor) -> Tensor:
        if self.kind == "dropout":
            return F.dropout(h, self.strength)
        return h + torch.randn_like(h) * self.strength * h.square().mean(-1, keepdim=True).sqrt()


class FeatureObjective:
    """The losses of one MFN layer, as the arguments say."""

    def __init__(self, args: MFNTrainingArguments, config: MFNConfig) -> None:
        self.args = args
        self.config = config
        self.perturbation = Perturbation(args.stability_perturbation, args.stability_strength)

    @property
    def rho(self) -> float:
        """The target firing rate."""
        return self.args.rho if self.args.rho is not None else self.config.k / self.config.num_features

    @property
    def aux_k(self) -> int:
        """Active features of the auxiliary reconstruction."""
        return self.args.aux_k if self.args.aux_k is not None else max(1, self.config.hidden_size // 2)

    def request(self, mask: Tensor, revive: Mapping[int, Tensor]) -> ReconstructionRequest:
        """What the model's forward shall compute, for tokens of which `mask` (B, T) says whether they count."""
        candidates = min(2 * self.config.k, self.config.num_features) if self.args.lambda_rate else 0
        perturb = chosen = None
        if self.args.lambda_stab and self.args.stability_pass == "layer":
            perturb, chosen = (
                self.perturbation,
                choose(mask.flatten().nonzero().flatten(), self.args.stability_fraction),
            )
        return ReconstructionRequest(
            self.args.stop_gradient, candidates, perturb, chosen, revive, self.aux_k,
            reaches_all=bool(self.args.lambda_recon),
        )  # fmt: skip

    def second_request(self) -> ReconstructionRequest:
        """What the second forward of `stability_pass="model"` shall compute."""
        stop, reaches_all = self.args.stop_gradient, bool(self.args.lambda_recon)
        return ReconstructionRequest(stop, perturb_embeddings=self.perturbation, reaches_all=reaches_all)

    def losses(
        self, item: Reconstruction, mask: Tensor, request: ReconstructionRequest, variation: float = 1.0
    ) -> dict[str, Tensor]:
        """Each part without its lambda: token means over this process's batch; rate and competition over the batch of
        all processes. `variation` is the share of the residual stream that is not the same in every token, which takes
        no feature: the reconstruction loss is normalised by what is left."""
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
            parts["stab"] = self.stability(chosen, item.perturbed)
        if args.weight("aux"):
            parts["aux"] = self._auxiliary(item, mask)
        return parts

    def stability(self, code: SparseCode, perturbed: SparseCode, mask: Tensor | None = None) -> Tensor:
        """Eq. 8 of the same tokens' clean and perturbed codes."""
        return stability_loss(code, perturbed, mask, self.args.normalize_losses)

    def _auxiliary(self, item: Reconstruction, mask: Tensor) -> Tensor:
        """How much of the error the features under the floor leave, as a share of it; 0 where there are none."""
        if item.revived is None:
            return item.residual.new_zeros((), dtype=torch.float32)
        error = (item.residual - item.reconstructed).detach()
        return reconstruction_loss(error, item.revived, mask)


def tokens_that_count(batch: Mapping[str, Any]) -> Tensor:
    """(B, T), nonzero where a token of the model's inputs counts."""
    if batch.get("attention_mask") is not None:
        return batch["attention_mask"]
    tokens = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"][..., 0]
    return torch.ones(tokens.shape, dtype=torch.long, device=tokens.device)


def choose(tokens: Tensor, share: float) -> Tensor:
    """A random share of tokens (N,), at least one."""
    count = max(1, round(share * len(tokens)))
    return tokens[torch.randperm(len(tokens), device=tokens.device)[:count]]


def tokens_of(code: SparseCode, chosen: Tensor) -> SparseCode:
    """The code (n, K) of tokens that are given by their indices into the flattened leading shape."""
    chosen = chosen.to(code.indices.device)
    return code._replace(indices=code.indices.flatten(0, -2)[chosen], values=code.values.flatten(0, -2)[chosen])
