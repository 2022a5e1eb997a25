"""The sparse code z of a token as (index, value) pairs, and eqs. 1 and 2 on such pairs.

z is never made dense. Decoding gathers K rows of the decoder. The backward of both equations adds each token's K
rank-one terms feature by feature: its cost follows K, not m, and it never forms the (N K, d) terms. Gradients are those
of the dense equations. So are second derivatives: three functions are the derivatives of one sum
c[n, j] (x[n] . W[i[n, j]]) by its three factors, and the backward of each is made of the other two. Transforms of
torch.func get the dense equations themselves.
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
    if in_transform():
        return ranked._replace(values=F.linear(x, weight, bias).gather(-1, ranked.indices).to(weight.dtype))
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
    if in_transform():
        return code._replace(num_features=len(weight)).to_dense() @ weight
    if torch.onnx.is_in_onnx_export():  # ONNX would sum the rows of a token in a loop
        return (code.values.unsqueeze(-2) @ weight[code.indices]).squeeze(-2)
    return _WeightedRows.apply(code.values, weight, code.indices)


def project(x: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """Projects on chosen rows: weight[indices] . x, without forming the rows.

    Args:
        x: (..., d).
        indices: (..., K) int64, rows of `weight`.
        weight: (m, d).

    Returns:
        (..., K).
    """
    if in_transform():
        return F.linear(x, weight).gather(-1, indices)
    if torch.onnx.is_in_onnx_export():  # ONNX has no counterpart of `_dot_rows`
        return (weight[indices] @ x.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        values = _dot_rows(x, indices, weight)
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
        The mixture, unchanged. Parameters get their gradients through the mixture itself, so second derivatives would
        lack a part and are an error.
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


class _ChosenPreActivations(torch.autograd.Function):
    """W_e x + b_e at the chosen features. Their values are known already, and forward hands them on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, indices)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, indices = ctx.saved_tensors
        need_x, need_weight, need_bias, _, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if need_x:
            grad_x = _WeightedRows.apply(gradient.to(weight.dtype), weight, indices).to(x.dtype)
        if need_weight:
            grad_weight = _SumsByFeature.apply(gradient, x.to(weight.dtype), indices, weight.shape[0])
        if need_bias:
            zeros = gradient.new_zeros(weight.shape[0])
            grad_bias = zeros.index_add(0, indices.flatten(), gradient.flatten())
        return grad_x, grad_weight, grad_bias, None, None


class _WeightedRows(torch.autograd.Function):
    """Sums of weighted rows: embedding_bag, whose own backward would form (N K, d) terms for the weight."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(values, weight, indices)
        flat = values.flatten(0, -2)
        sums = F.embedding_bag(indices.flatten(0, -2), weight, per_sample_weights=flat, mode="sum")
        return sums.unflatten(0, indices.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, indices = ctx.saved_tensors
        need_values, need_weight, _ = ctx.needs_input_grad
        grad_values = grad_weight = None
        if need_values:
            grad_values = project(gradient, indices, weight)
        if need_weight:
            grad_weight = _SumsByFeature.apply(values, gradient, indices, weight.shape[0])
        return grad_values, grad_weight, None


class _SumsByFeature(torch.autograd.Function):
    """Sums of coefficients[..., j] * rows at feature indices[..., j]: (..., K), (..., d), (..., K) -> (m, d)."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, rows: Tensor, indices: Tensor, num_features: int) -> Tensor:
        ctx.save_for_backward(coefficients, rows, indices)
        # pairs are sorted by feature, so that each feature is one bag of tokens
        features, order = indices.flatten().int().sort(stable=True)
        tokens = order // indices.shape[-1]
        first_pair = torch.searchsorted(features, torch.arange(num_features, device=features.device, dtype=torch.int))
        flat = rows.flatten(0, -2).contiguous()
        weights = coefficients.flatten()[order].to(rows.dtype)
        return F.embedding_bag(tokens, flat, first_pair, mode="sum", per_sample_weights=weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, rows, indices = ctx.saved_tensors
        need_coefficients, need_rows, _, _ = ctx.needs_input_grad
        grad_coefficients = grad_rows = None
        if need_coefficients:
            grad_coefficients = project(rows, indices, gradient).to(coefficients.dtype)
        if need_rows:
            grad_rows = _WeightedRows.apply(coefficients.to(rows.dtype), gradient, indices)
        return grad_coefficients, grad_rows, None, None


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
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("output_reconstructions has no second derivatives; call the model without it for these")
        encoder_rows, encoder, decoder_rows, active, directions = ctx.saved_tensors
        by_value = project(gradient, decoder_rows, directions) * active
        by_input = _WeightedRows.apply(by_value, encoder, encoder_rows)
        return gradient, by_input, None, None, None, None, None


def in_transform() -> bool:
    """Returns True inside of a transform of torch.func, which cannot look into a function with its own backward."""
    return torch._C._are_functorch_transforms_active()


def _dot_rows(vectors: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """vectors . weight[indices[..., j]]: (..., d), (..., K), (m, d) -> (..., K), without forming (N K, d) rows.

    This is embedding_bag's derivative with respect to its weights per sample.
    """
    vectors, pairs, k = vectors.flatten(0, -2).contiguous(), indices.flatten().contiguous(), indices.shape[-1]
    # shapes, as len() would fix the number of tokens in an exported model
    starts = torch.arange(0, pairs.shape[0], k, device=pairs.device)
    token_of_pair = torch.arange(vectors.shape[0], device=pairs.device).repeat_interleave(k)
    mode_sum = 0
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        vectors, weight, pairs, starts, token_of_pair, mode_sum
    ).view(indices.shape)


__all__ = ["SparseCode"]
