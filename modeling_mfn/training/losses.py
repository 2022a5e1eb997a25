"""The losses of section 4, each one equation without its lambda, averaged over tokens.

All losses work on the (index, value) pairs of a code. z is never made dense, and the covariance of eq. 7 is never
formed. A `mask` is nonzero where a token counts; it has the code's leading shape (...), and by default all tokens
count. Each loss is a scalar, in float32 at least.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.sparse_code import SparseCode

WINDOW = 0.5
"""Width of the window in which a pre-activation counts for the gradient of a firing rate, in mean active values of its
token. A quarter of a typical activation on either side of the threshold reaches the features that nearly fire."""
HALF_A_FIRING = 0.5
"""Firings at which the gradient of eq. 6 is taken for a feature without any: at 0 the gradient is infinite."""
LEAST_MEAN_SQUARE = 1e-12
"""Floor of the mean of |z|^2 that losses are divided by, so that a code without active features gives 0, not 0 / 0."""


def reconstruction_loss(h: Tensor, h_hat: Tensor, mask: Tensor | None = None, normalize: bool = True) -> Tensor:
    """Completeness, eq. 5: |h - h_hat|^2, averaged over tokens.

    Args:
        h: (..., d) residual stream.
        h_hat: (..., d) reconstruction of h.
        mask: (...).
        normalize: divide each token's error by |h - mean(h)|^2 over its d entries, a constant of the gradient. The
            loss is then a share of the token's variance, on one scale for every layer and model. `False` gives eq. 5
            itself, in squared units of the residual stream.
    """
    precision = torch.promote_types(h.dtype, torch.float32)
    h, h_hat = h.to(precision), h_hat.to(precision)
    error = (h - h_hat).square().sum(-1)
    if normalize:
        variance = (h - h.mean(-1, keepdim=True)).square().sum(-1).detach()
        error = error / variance.clamp_min(torch.finfo(precision).tiny)
    return token_mean(error, mask)


def rate_loss(code: SparseCode, rho: float, mask: Tensor | None = None, candidates: SparseCode | None = None) -> Tensor:
    """Sparsity, eq. 6: KL(p || rho) in nats, summed over features. p_i is the share of tokens on which i is active.

    p is the true firing rate. A count has no gradient, so a rectangle stands in for it. A pre-activation counts as
    raising p by 1 / w where it lies within w / 2 of the token's threshold, and by 0 elsewhere. The threshold is the
    least value that makes a feature active on the token; w is [`WINDOW`] times the token's mean active value.

    Args:
        code: (..., K).
        rho: target firing rate, between 0 and 1.
        mask: (...).
        candidates: (..., C) pre-activations that the rectangle sees, inactive features included:
            [`sparse_code.rank_features`]. By default the rectangle sees the code's own pairs: it can then lower a rate
            but not raise one from 0.

    Raises:
        ValueError: if `rho` is out of range.
    """
    if not 0 < rho < 1:
        raise ValueError(f"rho is {rho}; a firing rate lies between 0 and 1")
    code = _flat(code, mask)
    tokens = max(len(code.values), 1)
    rates = _per_feature(code, (code.values > 0).to(code.values)) / tokens
    seen = code if candidates is None else _flat(candidates, mask)
    chosen = seen.values[:, : code.values.shape[-1]].detach().relu()  # before their values were refined
    surrogate = _per_feature(seen, _slope(chosen, seen.values.detach()) * seen.values) / tokens
    return _bernoulli_kl(rates + (surrogate - surrogate.detach()), rho, HALF_A_FIRING / tokens)


def _slope(values: Tensor, pre_activations: Tensor) -> Tensor:
    """Stand-in for d [active] / d a: (N, K) values of a code and (N, C) pre-activations -> (N, C)."""
    w = WINDOW * values.sum(-1, keepdim=True) / (values > 0).sum(-1, keepdim=True).clamp_min(1)
    w = w.clamp_min(torch.finfo(values.dtype).tiny)
    distance = (pre_activations - values.amin(-1, keepdim=True)) / w
    return (distance.abs() <= 0.5) / w


def rate_divergence(rates: Tensor, rho: float) -> Tensor:
    """sum_i KL(Bernoulli(p_i) || Bernoulli(rho)) of firing rates (m,), without a gradient; exact at p = 0 and 1."""
    p = rates.detach().clamp(0, 1)
    value = torch.special.xlogy(p, p / rho) + torch.special.xlogy(1 - p, (1 - p) / (1 - rho))
    return value.sum()


def _bernoulli_kl(rates: Tensor, rho: float, least: float) -> Tensor:
    """Divergence of firing rates, with its gradient. At p = 0 and 1 that is infinite: that at `least` and at
    1 - `least` is taken instead."""
    inside = rates.clamp(least, 1 - least)
    gradient = (torch.log(inside / rho) - torch.log((1 - inside) / (1 - rho))).detach()
    return rate_divergence(rates, rho) + (gradient * (rates - rates.detach())).sum()


def competition_loss(code: SparseCode, mask: Tensor | None = None, normalize: bool = False) -> Tensor:
    """Competition, eq. 7: the sum over i != j of Cov(z)_ij^2, the covariance over tokens (divided by N).

    Exact. Only features that are active together have a second moment S_ij. With P these pairs, i < j, and mu = mean z,

        L = 2 sum_P [(S_ij - mu_i mu_j)^2 - (mu_i mu_j)^2] + (sum_i mu_i^2)^2 - sum_i mu_i^4.

    Memory and time follow N K^2, whatever m.

    Args:
        code: (..., K), indices distinct within a token.
        mask: (...).
        normalize: divide by the squared mean of |z|^2, a constant of the gradient. The loss is then on one scale for
            every layer and model. `False` gives eq. 7 itself, in units of z to the fourth.
    """
    code = _flat(code, mask)
    tokens, k = code.values.shape
    tokens = max(tokens, 1)
    # one row per feature in ascending order: a pair is then gathered from two rows
    indices, order = code.indices.sort(-1)
    rows, values = indices.T.contiguous(), code.values.gather(-1, order).T.contiguous()
    first, second = torch.triu_indices(k, k, offset=1, device=rows.device)
    pair = rows.index_select(0, first) * code.num_features + rows.index_select(0, second)
    if code.num_features**2 <= torch.iinfo(torch.int32).max:
        pair = pair.int()  # sorts faster
    pairs, place = pair.flatten().unique(return_inverse=True)
    products = (values.index_select(0, first) * values.index_select(0, second)).flatten()
    moment = products.new_zeros(len(pairs)).index_add(0, place, products) / tokens
    mean = _per_feature(code, code.values) / tokens
    of_means = mean[pairs // code.num_features] * mean[pairs % code.num_features]
    square = mean.square()
    loss = 2 * ((moment - of_means).square() - of_means.square()).sum() + square.sum().square() - square.square().sum()
    return loss / _mean_square(code).square() if normalize else loss


def stability_loss(
    code: SparseCode, perturbed: SparseCode, mask: Tensor | None = None, normalize: bool = False
) -> Tensor:
    """Stability, eq. 8: |z - z_tilde|^2, averaged over tokens.

    Args:
        code: z, (..., K), indices distinct within a token.
        perturbed: z_tilde, (..., K'), of the same tokens from a perturbed input.
        mask: (...).
        normalize: divide by the mean of |z|^2, a constant of the gradient. `False` gives eq. 8 itself.
    """
    code, perturbed = _flat(code, mask), _flat(perturbed, mask)
    same = code.indices.unsqueeze(-1) == perturbed.indices.unsqueeze(-2)
    partners = (same * perturbed.values.unsqueeze(-2)).sum(-1)
    alone = perturbed.values * ~same.any(-2)
    loss = ((code.values - partners).square().sum(-1) + alone.square().sum(-1)).sum() / max(len(code.values), 1)
    return loss / _mean_square(code) if normalize else loss


def distillation_loss(logits: Tensor, base_logits: Tensor, counted: Tensor) -> Tensor:
    """KL(base || model) of the next token's distribution, in nats, summed over the positions that count.

    Args:
        logits: (..., V) of the model.
        base_logits: (..., V) of the base model.
        counted: (...) nonzero where a position counts.
    """
    ours = F.log_softmax(logits[counted.bool()].float(), -1)
    theirs = F.log_softmax(base_logits[counted.bool()].float(), -1)
    return F.kl_div(ours, theirs, log_target=True, reduction="sum")


def token_mean(per_token: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of (...) over the tokens that count; 0 if none counts."""
    counts = torch.ones_like(per_token) if mask is None else mask.to(per_token)
    # where() instead of a product: padding may hold inf or nan
    return torch.where(counts > 0, per_token, 0).sum() / counts.sum().clamp_min(1)


def _flat(code: SparseCode, mask: Tensor | None) -> SparseCode:
    """The tokens that count, (N, K), with values in float32 at least."""
    code = code.tokens(mask)
    return code._replace(values=code.values.to(torch.promote_types(code.values.dtype, torch.float32)))


def _per_feature(code: SparseCode, amounts: Tensor) -> Tensor:
    """Sums of (N, K) amounts by feature, (m,)."""
    return amounts.new_zeros(code.num_features).index_add(0, code.indices.flatten(), amounts.flatten())


def _mean_square(code: SparseCode) -> Tensor:
    """Mean over tokens of |z|^2, without a gradient."""
    values = code.values.detach()
    return (values.square().sum() / max(len(values), 1)).clamp_min(LEAST_MEAN_SQUARE)


__all__ = [
    "competition_loss",
    "distillation_loss",
    "rate_divergence",
    "rate_loss",
    "reconstruction_loss",
    "stability_loss",
]
