"""The losses of section 4, each one equation without its lambda, averaged over tokens, as functions of codes.

z is never made dense, and the covariance of eq. 7 never formed: everything works on the (index, value) pairs. A `mask`,
nonzero where a token counts, has the code's leading shape (...); all tokens count by default. Results are scalars, in
float32 at least.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.sparse_code import SparseCode

RateEstimator = Literal["rectangle", "zmass", "sigmoid"]


def reconstruction_loss(h: Tensor, h_hat: Tensor, mask: Tensor | None = None, normalize: bool = True) -> Tensor:
    """Completeness, eq. 5: |h - h_hat|^2, averaged over tokens.

    Args:
        h: (..., d) residual stream.
        h_hat: (..., d) its reconstruction.
        mask: (...).
        normalize: divide each token's error by |h - mean(h)|^2 over its d entries, a constant of the gradient. The
            loss is then a share of the residual's variance, the same scale for every layer and model. `False` is
            eq. 5 itself, in squared units of the residual stream.
    """
    precision = torch.promote_types(h.dtype, torch.float32)
    h, h_hat = h.to(precision), h_hat.to(precision)
    error = (h - h_hat).square().sum(-1)
    if normalize:
        variance = (h - h.mean(-1, keepdim=True)).square().sum(-1).detach()
        error = error / variance.clamp_min(torch.finfo(precision).tiny)
    return token_mean(error, mask)


def rate_loss(
    code: SparseCode,
    rho: float,
    mask: Tensor | None = None,
    estimator: RateEstimator = "rectangle",
    width: float = 0.5,
    candidates: SparseCode | None = None,
) -> Tensor:
    """Sparsity, eq. 6: KL(p || rho), in nats, summed over features; p_i is the share of tokens on which i is active.

    A count has no gradient, so one stands in for it:

    - `"rectangle"`: p is the true rate; a pre-activation a counts as raising it by 1 / w where it lies within w / 2 of
      the token's threshold, the least that makes a feature active there, and by 0 elsewhere.
    - `"sigmoid"`: the same with the sigmoid's slope, sigma'((a - threshold) / w) / w.
    - `"zmass"`: p_i is the mean over tokens of the feature's share of the code, times the token's active features; its
      gradient is exact.

    Args:
        code: (..., K).
        rho: target firing rate, in (0, 1).
        mask: (...).
        estimator: one of the three.
        width: w in units of the token's mean active value.
        candidates: (..., C) the pre-activations that the first two estimators see, those of inactive features too:
            [`sparse_code.rank_features`]. By default the code's own pairs, which can lower a rate but not raise
            one from nothing.

    Raises:
        ValueError: if `rho` is out of range or the estimator unknown.
    """
    if not 0 < rho < 1:
        raise ValueError(f"rho is {rho}; a firing rate lies between 0 and 1")
    code = _flat(code, mask)
    tokens = max(len(code.values), 1)
    active = code.values > 0
    if estimator == "zmass":
        mass = code.values / code.values.sum(-1, keepdim=True).clamp_min(torch.finfo(code.values.dtype).tiny)
        rates = _per_feature(code, mass * active.sum(-1, keepdim=True)) / tokens
        least = torch.finfo(rates.dtype).tiny
    elif estimator in ("rectangle", "sigmoid"):
        rates = _per_feature(code, active.to(code.values)) / tokens
        seen = code if candidates is None else _flat(candidates, mask)
        slope = _slope(code.values.detach(), seen.values.detach(), width, estimator)
        surrogate = _per_feature(seen, slope * seen.values) / tokens
        rates = rates + (surrogate - surrogate.detach())
        least = 0.5 / tokens
    else:
        raise ValueError(f"estimator is {estimator!r}; it must be one of rectangle, zmass, sigmoid")
    return _bernoulli_kl(rates, rho, least, 1 - 0.5 / tokens)


def _slope(values: Tensor, pre_activations: Tensor, width: float, estimator: str) -> Tensor:
    """Stand-in for d [active] / d a: (N, K) values of a code and (N, C) pre-activations -> (N, C)."""
    tiny = torch.finfo(values.dtype).tiny
    w = width * values.sum(-1, keepdim=True) / (values > 0).sum(-1, keepdim=True).clamp_min(1)
    w = w.clamp_min(tiny)
    distance = (pre_activations - values.amin(-1, keepdim=True)) / w
    if estimator == "rectangle":
        return (distance.abs() <= 0.5) / w
    return distance.sigmoid() * (-distance).sigmoid() / w


def _bernoulli_kl(rates: Tensor, rho: float, least: float, most: float) -> Tensor:
    """sum_i KL(Bernoulli(p_i) || Bernoulli(rho)). The value is exact at p = 0 and 1; the gradient, infinite there, is
    that at `least` and at `most`."""
    inside = rates.clamp(least, most)
    gradient = (torch.log(inside / rho) - torch.log((1 - inside) / (1 - rho))).detach()
    p = rates.detach().clamp(0, 1)
    value = torch.special.xlogy(p, p / rho) + torch.special.xlogy(1 - p, (1 - p) / (1 - rho))
    return value.sum() + (gradient * (rates - rates.detach())).sum()


def competition_loss(code: SparseCode, mask: Tensor | None = None, normalize: bool = False) -> Tensor:
    """Competition, eq. 7: the sum over i != j of Cov(z)_ij^2, the covariance over tokens (divided by N).

    Exact. Only features that are active together have a second moment S_ij, so that with P these pairs, i < j, and
    mu = mean z,

        L = 2 sum_P [(S_ij - mu_i mu_j)^2 - (mu_i mu_j)^2] + (sum_i mu_i^2)^2 - sum_i mu_i^4.

    Memory and time follow N K^2, whatever m.

    Args:
        code: (..., K), indices distinct within a token.
        mask: (...).
        normalize: divide by the mean of |z|^2, squared and a constant of the gradient: one scale for every layer and
            model. `False` is eq. 7 itself, in units of z to the fourth.
    """
    code = _flat(code, mask)
    tokens, k = code.values.shape
    tokens = max(tokens, 1)
    # features in order, a row each, so that rows are all that pairs have to be gathered from
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
        normalize: divide by the mean of |z|^2, a constant of the gradient. `False` is eq. 8 itself.
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
    """Mean of (...) over the tokens that count; 0 where none does."""
    if mask is None:
        return per_token.mean()
    counts = mask.to(per_token)
    # where() rather than a product: padding may hold inf or nan
    return torch.where(counts > 0, per_token, 0).sum() / counts.sum().clamp_min(1)


def _flat(code: SparseCode, mask: Tensor | None) -> SparseCode:
    """The tokens that count, (N, K), values in float32 at least."""
    code = code.tokens(mask)
    return code._replace(values=code.values.to(torch.promote_types(code.values.dtype, torch.float32)))


def _per_feature(code: SparseCode, amounts: Tensor) -> Tensor:
    """Sums of (N, K) amounts by feature, (m,)."""
    return amounts.new_zeros(code.num_features).index_add(0, code.indices.flatten(), amounts.flatten())


def _mean_square(code: SparseCode) -> Tensor:
    """Mean over tokens of |z|^2, without a gradient."""
    values = code.values.detach()
    return (values.square().sum() / max(len(values), 1)).clamp_min(1e-12)
