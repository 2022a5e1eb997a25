"""Weights of an MFN layer's features: encoder, decoder, and the rows in them that belong to some features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class WeightRows(NamedTuple):
    """Rows of one parameter."""

    parameter: nn.Parameter
    rows: Tensor
    """(R,) int64."""

    @property
    def values(self) -> Tensor:
        """The rows' values, (R, ...)."""
        return self.parameter[self.rows]


class FeatureWeights(NamedTuple):
    """Places of R features' weights."""

    encoder: WeightRows
    encoder_bias: WeightRows
    decoder: WeightRows


class FeatureEncoder(nn.Module):
    """Encoder of eq. 1: W_e (m, d) and b_e (m,)."""

    def __init__(self, hidden_size: int, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_features, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_features))


class FeatureDecoder(nn.Module):
    """Decoder of eq. 2: D (m, d), a feature's direction per row, and an optional constant (d,).

    Directions have unit norm unless `bake` gave them another one.
    """

    def __init__(self, hidden_size: int, num_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_features, hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size)) if bias else None

    @torch.no_grad()
    def at_norms(self, norms: Mapping[int, float] | None = None) -> Tensor:
        """Returns every direction at unit norm, or at the norm that `norms` has for its row: (m, d), float32."""
        rows = nn.functional.normalize(self.weight.float(), dim=-1)
        if norms:
            from torch.distributed.tensor import DTensor, distribute_tensor

            lengths = torch.ones(len(rows), 1, device=rows.device)
            lengths[list(norms), 0] = torch.tensor(list(norms.values()), device=rows.device)
            if isinstance(rows, DTensor):
                lengths = distribute_tensor(lengths, rows.device_mesh, rows.placements)
            rows = rows * lengths
        return rows

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Takes the part out of the gradient that would only change a direction's length."""
        if self.weight.grad is not None:
            along = (self.weight.grad * self.weight).sum(-1, keepdim=True)
            self.weight.grad -= along * self.weight


__all__ = ["FeatureDecoder", "FeatureEncoder", "FeatureWeights", "WeightRows"]
