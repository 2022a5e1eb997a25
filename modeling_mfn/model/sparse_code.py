"""The sparse code z of a token as (index, value) pairs, and eqs. 1 and 2 on such pairs.

z is never made dense on the way. Decoding gathers K rows of the decoder, and the backward of both equations adds
each token's K rank-one terms feature by feature: its cost follows K, not m, and it never forms the (N K, d)
contributions. Gradients are those of the dense equations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 8


class SparseCode(NamedTuple):
    """At most K active features a token.

    A pair whose value is 0 stands for nothing: where fewer than K pre-activations are positive, the rest of the pairs
    are such. Without steering, indices are distinct within a token and values are >= 0.
    """

    indices: Tensor
    """(..., K) int64, feature indices in [0, num_features)."""
    values: Tensor
    """(..., K), activations of these features."""
    num_features: int
    """m, the length of the dense code."""

    def first(self, count: int) -> SparseCode:
        """The first pairs of each token: (..., K) -> (..., count)."""
        return self._replace(indices=self.indices[..., :count], values=self.values[..., :count])

    def tokens(self, mask: Tensor | None = None) -> SparseCode:
        """The tokens that count, all by default: (..., K) and a mask (...) -> (N, K)."""
        indices, values = self.indices.flatten(0, -2), self.values.flatten(0, -2)
        if mask is not None:
            counted = mask.flatten().bool().to(values.device)
            indices, values = indices[counted], values[counted]
        return self._replace(indices=indices, values=values)

    def to_dense(self) -> Tensor:
        """z of eq. 1, (..., m). Values of a repeated index add up."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.num_features)
        return dense.scatter_add(-1, self.indices, self.values)


def encode(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> SparseCode:
    """Eq. 1: z = TopK(ReLU(W_e x + b_e), K).

    Args:
        x: (..., d) encoder input.
        weight: (m, d) W_e.
        bias: (m,) b_e.
        k: K, pairs a token.

    Returns:
        Code of shape (..., K), the strongest feature of a token first.
    """
    return rectify(attach_encoder(rank_features(x, weight, bias, k), x, weight, bias))


@torch.no_grad()
def rank_features(x: Tensor, weight: Tensor, bias: Tensor, count: int) -> SparseCode:
    """The `count` features with the largest pre-activations W_e x + b_e, and these, negative ones too: (..., count),
    largest first, without gradients. Under autocast the product runs, and the choice is made, in lower precision."""
    values, indices = _largest(F.linear(x, weight, bias), count)
    return SparseCode(indices, values.to(weight.dtype), weight.shape[0])


def attach_encoder(ranked: SparseCode, x: Tensor, weight: Tensor, bias: Tensor) -> SparseCode:
    """The same pre-activations, now functions of `x`, `weight` and `bias` that made them, without encoding again."""
    return ranked._replace(values=_ChosenPreActivations.apply(x, weight, bias, ranked.values.detach(), ranked.indices))


def rectify(ranked: SparseCode) -> SparseCode:
    """The code that pre-activations (..., K) make: their ReLU."""
    return ranked._replace(values=ranked.values.relu())


def decode(code: SparseCode, weight: Tensor) -> Tensor:
    """Eq. 2: D z, as the sum of K weighted rows.

    Args:
        code: (..., K).
        weight: (m, d) the feature directions as rows, so that row f is column f of the paper's D.

    Returns:
        (..., d).
    """
    indices, values = code.indices.flatten(0, -2), code.values.flatten(0, -2)
    rows = F.embedding_bag(indices, weight.detach(), per_sample_weights=values, mode="sum")
    rows = _WeightedRows.apply(rows, weight, values.detach(), indices)
    return rows.unflatten(0, code.indices.shape[:-1])


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`values.topk(count)` over the last dimension; on CPUs in up to half its time. Of groups of eight, those with the
    `count` largest maxima have all that is wanted: each of these maxima is at least as large as all in the others."""
    groups, left_over = divmod(values.shape[-1], GROUP)
    if left_over or groups < 3 * count or values.device.type != "cpu":
        return values.topk(count, dim=-1)
    grouped = values.unflatten(-1, (GROUP, groups))  # each a column, so that maxima are taken of whole rows
    columns = _largest(grouped.amax(-2), count)[1]
    inside = columns.unsqueeze(-2).expand(*columns.shape[:-1], GROUP, count)
    largest, places = grouped.gather(-1, inside).flatten(-2).topk(count, dim=-1)
    return largest, columns.gather(-1, places % count) + places // count * groups


def _sum_by_feature(coefficients: Tensor, indices: Tensor, rows: Tensor, num_features: int) -> Tensor:
    """sum over tokens n of coefficients[n, j] * rows[n], gathered at feature indices[n, j]: (N, K), (N, K), (N, d)
    -> (m, d). Pairs are sorted by feature, so that each feature is one bag of tokens."""
    features, order = indices.flatten().int().sort(stable=True)
    tokens = order // indices.shape[1]
    first_pair = torch.searchsorted(features, torch.arange(num_features, device=features.device, dtype=torch.int))
    return F.embedding_bag(
        tokens, rows, first_pair, mode="sum", per_sample_weights=coefficients.flatten()[order].to(rows.dtype)
    )


class _ChosenPreActivations(torch.autograd.Function):
    """W_e x + b_e at the chosen features, whose values are known already: forward hands them on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, indices)
        return values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, indices = ctx.saved_tensors
        need_x, need_weight, need_bias, _, _ = ctx.needs_input_grad
        indices, gradient = indices.flatten(0, -2), gradient.flatten(0, -2)
        grad_x = grad_weight = grad_bias = None
        if need_x:
            grad_x = F.embedding_bag(indices, weight, per_sample_weights=gradient.to(weight.dtype), mode="sum")
            grad_x = grad_x.view(x.shape).to(x.dtype)
        if need_weight:
            rows = x.flatten(0, -2).to(weight.dtype)
            grad_weight = _sum_by_feature(gradient, indices, rows, weight.shape[0])
        if need_bias:
            grad_bias = gradient.new_zeros(weight.shape[0]).index_add_(0, indices.flatten(), gradient.flatten())
        return grad_x, grad_weight, grad_bias, None, None


class _WeightedRows(torch.autograd.Function):
    """Adds the gradient of `weight` to sums of its rows that were made from the detached weight. The gradient of the
    values is embedding_bag's own; that of the weight, which it would form from (N K, d) terms, is ours."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices)
        ctx.num_features = weight.shape[0]
        return sums.view_as(sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, indices = ctx.saved_tensors
        gradient = gradient.contiguous()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = _sum_by_feature(values, indices, gradient, ctx.num_features)
        return gradient, grad_weight, None, None


__all__ = ["SparseCode"]
