"""The sparse code z of a token as (index, value) pairs, and eqs. 1 and 2 on such pairs.

z is never made dense. Decoding gathers K rows of the decoder. The backward of both equations adds each token's K
rank-one terms feature by feature: its cost follows K, not m, and it never forms the (N K, d) terms. Gradients are those
of the dense equations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP_SIZE = 8
"""Values per group of `largest`."""


class SparseCode(NamedTuple):
    """At most K active features per token.

    A pair with value 0 stands for nothing. It fills the places of a token that has fewer than K positive
    pre-activations. Without steering, indices are distinct within a token and values are >= 0.
    """

    indices: Tensor
    """(..., K) int64, feature indices in [0, num_features)."""
    values: Tensor
    """(..., K), activations of the features."""
    num_features: int
    """m, the length of the dense code."""

    def first(self, count: int) -> SparseCode:
        """Keeps the first pairs of each token: (..., K) -> (..., count)."""
        return self._replace(indices=self.indices[..., :count], values=self.values[..., :count])

    def tokens(self, mask: Tensor | None = None) -> SparseCode:
        """Flattens to tokens, only those that a mask (...) counts if there is one: (..., K) -> (N, K)."""
        indices, values = self.indices.flatten(0, -2), self.values.flatten(0, -2)
        if mask is not None:
            counted = mask.flatten().bool().to(values.device)
            indices, values = indices[counted], values[counted]
        return self._replace(indices=indices, values=values)

    def to_dense(self) -> Tensor:
        """Returns the dense z of eq. 1, (..., m). Values of a repeated index add up."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.num_features)
        return dense.scatter_add(-1, self.indices, self.values)


def encode(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> SparseCode:
    """Encodes, eq. 1: z = TopK(ReLU(W_e x + b_e), K).

    Args:
        x: (..., d) encoder input.
        weight: (m, d) W_e.
        bias: (m,) b_e.
        k: K, pairs per token.

    Returns:
        Code of shape (..., K), each token's strongest feature first.
    """
    return rectify(attach_encoder(rank_features(x, weight, bias, k), x, weight, bias))


@torch.no_grad()
def rank_features(x: Tensor, weight: Tensor, bias: Tensor, count: int) -> SparseCode:
    """Finds the `count` largest pre-activations W_e x + b_e of each token, negative ones too, without a gradient.

    Pairs (..., count) come largest first. Under autocast, product and choice have its lower precision.
    """
    values, indices = largest(F.linear(x, weight, bias), count)
    return SparseCode(indices, values.to(weight.dtype), weight.shape[0])


def attach_encoder(ranked: SparseCode, x: Tensor, weight: Tensor, bias: Tensor) -> SparseCode:
    """Gives ranked pre-activations their gradients for `x`, `weight` and `bias`, without encoding again."""
    return ranked._replace(values=_ChosenPreActivations.apply(x, weight, bias, ranked.values.detach(), ranked.indices))


def rectify(ranked: SparseCode) -> SparseCode:
    """Makes a code of pre-activations (..., K): their ReLU."""
    return ranked._replace(values=ranked.values.relu())


def decode(code: SparseCode, weight: Tensor) -> Tensor:
    """Decodes, eq. 2: D z, as a sum of K weighted rows.

    Args:
        code: (..., K).
        weight: (m, d) feature directions as rows; row f is column f of the paper's D.

    Returns:
        (..., d).
    """
    indices, values = code.indices.flatten(0, -2), code.values.flatten(0, -2)
    rows = F.embedding_bag(indices, weight.detach(), per_sample_weights=values, mode="sum")
    rows = _WeightedRows.apply(rows, weight, values.detach(), indices)
    return rows.unflatten(0, code.indices.shape[:-1])


def project(x: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """Projects on chosen rows: weight[indices] . x, without forming the rows.

    Args:
        x: (..., d).
        indices: (..., K) int64, rows of `weight`.
        weight: (m, d).

    Returns:
        (..., K).
    """
    flat = indices.flatten(0, -2)
    with torch.no_grad():
        values = _dot_rows(x.flatten(0, -2).contiguous(), flat, weight).view(indices.shape)
    return _ChosenPreActivations.apply(x, weight, weight.new_zeros(()), values, indices)


def pass_to_input(
    mixture: Tensor, x: Tensor, encoded: SparseCode, encoder: Tensor, decoded: SparseCode, directions: Tensor
) -> Tensor:
    """Gives a mixture D z the gradient for x that it has by eqs. 1 and 2, without encoding or decoding again.

    Args:
        mixture: (..., d), decoded from a code whose gradient stops at x.
        x: (..., d) encoder input.
        encoded: (..., K) the code's pairs by row of `encoder`.
        encoder: W_e, a feature per row.
        decoded: (..., K) the same pairs by row of `directions`.
        directions: D, a feature per row.

    Returns:
        The mixture, unchanged. Parameters get their gradients through the mixture itself.
    """
    return _ThroughInput.apply(mixture, x, encoded.indices, encoder, decoded.indices, decoded.values > 0, directions)


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns `values.topk(count)` over the last dimension, (..., count), on CPUs in as little as half of its time.

    The groups with the `count` largest maxima hold all that is wanted: no value of another group exceeds these maxima.
    """
    groups, left_over = divmod(values.shape[-1], GROUP_SIZE)
    if left_over or groups < 3 * count or values.device.type != "cpu":
        return values.topk(count, dim=-1)
    grouped = values.unflatten(-1, (GROUP_SIZE, groups))  # a group is a column, so that maxima are of whole rows
    columns = largest(grouped.amax(-2), count)[1]
    inside = columns.unsqueeze(-2).expand(*columns.shape[:-1], GROUP_SIZE, count)
    found, places = grouped.gather(-1, inside).flatten(-2).topk(count, dim=-1)
    return found, columns.gather(-1, places % count) + places // count * groups


def _sum_by_feature(coefficients: Tensor, indices: Tensor, rows: Tensor, num_features: int) -> Tensor:
    """Adds coefficients[n, j] * rows[n] up at feature indices[n, j]: (N, K), (N, K), (N, d) -> (m, d).

    Pairs are sorted by feature, so that each feature is one bag of tokens.
    """
    features, order = indices.flatten().int().sort(stable=True)
    tokens = order // indices.shape[1]
    first_pair = torch.searchsorted(features, torch.arange(num_features, device=features.device, dtype=torch.int))
    return F.embedding_bag(
        tokens, rows, first_pair, mode="sum", per_sample_weights=coefficients.flatten()[order].to(rows.dtype)
    )


class _ChosenPreActivations(torch.autograd.Function):
    """W_e x + b_e at the chosen features. Their values are known already, and forward hands them on."""

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
    """Sums of weighted rows, with a sparse gradient for the weight.

    embedding_bag gives the gradient of the values; for the weight it would form (N K, d) terms.
    """

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


class _ThroughInput(torch.autograd.Function):
    """A mixture of directions, handed on; backward also sends its gradient through decoder and encoder to x."""

    @staticmethod
    def forward(
        ctx: Any,
        mixture: Tensor,
        x: Tensor,
        encoder_rows: Tensor,
        encoder: Tensor,
        decoder_rows: Tensor,
        active: Tensor,
        directions: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(encoder_rows, encoder, decoder_rows, active, directions)
        return mixture.view_as(mixture)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        encoder_rows, encoder, decoder_rows, active, directions = ctx.saved_tensors
        by_value = _dot_rows(gradient.flatten(0, -2).contiguous(), decoder_rows.flatten(0, -2), directions)
        by_value = by_value * active.flatten(0, -2)
        by_input = F.embedding_bag(encoder_rows.flatten(0, -2), encoder, per_sample_weights=by_value, mode="sum")
        return gradient, by_input.view(gradient.shape), None, None, None, None, None


def _dot_rows(vectors: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """vectors[n] . weight[indices[n, j]]: (N, d), (N, K), (m, d) -> (N, K), without forming the (N K, d) rows.

    This is embedding_bag's derivative with respect to its weights per sample.
    """
    tokens, k = indices.shape
    starts = torch.arange(0, tokens * k, k, device=indices.device)
    token_of_pair = torch.arange(tokens, device=indices.device).repeat_interleave(k)
    mode_sum = 0
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        vectors, weight, indices.flatten(), starts, token_of_pair, mode_sum
    ).view(tokens, k)


__all__ = ["SparseCode"]
