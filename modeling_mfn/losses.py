"""The losses that shape features, each one equation of section 4 without its lambda, averaged over tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def reconstruction_loss(h: Tensor, h_hat: Tensor, mask: Tensor | None = None, normalize: bool = True) -> Tensor:
    """Completeness, eq. 5: |h - h_hat|^2, averaged over tokens.

    Args:
        h: (..., d) residual stream.
        h_hat: (..., d) its reconstruction.
        mask: (...) nonzero where a token counts; all do by default.
        normalize: divide each token's error by |h - mean(h)|^2 over its d entries, a constant of the gradient. The
            loss is then a share of the residual's variance, the same scale for every layer and model. `False` is
            eq. 5 itself, in squared units of the residual stream.

    Returns:
        A scalar, in float32 at least.
    """
    precision = torch.promote_types(h.dtype, torch.float32)
    h, h_hat = h.to(precision), h_hat.to(precision)
    error = (h - h_hat).square().sum(-1)
    if normalize:
        variance = (h - h.mean(-1, keepdim=True)).square().sum(-1).detach()
        error = error / variance.clamp_min(torch.finfo(precision).tiny)
    return token_mean(error, mask)


def token_mean(per_token: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of (...) over the tokens that count; 0 where none does."""
    if mask is None:
        return per_token.mean()
    counts = mask.to(per_token)
    # where() rather than a product: padding may hold inf or nan
    return torch.where(counts > 0, per_token, 0).sum() / counts.sum().clamp_min(1)
