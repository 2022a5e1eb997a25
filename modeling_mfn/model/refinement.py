"""Refined values: the features that TopK chose, with values nearer to the best ones for the same features.

The encoder chooses features and gives their values in one product. For the features of one token, least squares would
give other values. A few steps of steepest descent towards those cost two gathers each, and nothing of size m.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .sparse_code import SparseCode, decode, project


def refine(code: SparseCode, x: Tensor, directions: Tensor, steps: int) -> SparseCode:
    """Moves the values of active features towards the least-squares fit of x by their directions.

    Each step lowers |x - D z|^2 along its steepest slope on the active features, as far as it goes down:

        g = D_S^T (x - D z),   z <- z + |g|^2 / |D g|^2 g

    A value that ends below 0 becomes 0. Gradients pass through all steps.

    Args:
        code: (..., K), its indices rows of `directions`.
        x: (..., d), the vector that the code stands for.
        directions: D, (m, d), a feature per row.
        steps: number of steps; 0 returns the code.

    Returns:
        Code (..., K) with the same indices. Inactive pairs keep the value 0.
    """
    active, values = code.values > 0, code.values
    error = x - decode(code, directions)
    for _ in range(steps):
        slopes = code._replace(values=project(error, code.indices, directions) * active)
        move = decode(slopes, directions)
        length = (_square(slopes.values) / _square(move)).to(values.dtype)
        values, error = values + length * slopes.values, error - length * move
    return code._replace(values=values.relu())


def _square(vectors: Tensor) -> Tensor:
    """Squared lengths (..., 1) of vectors, above 0, in float32 at least."""
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return wide.square().sum(-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)


__all__ = ["refine"]
