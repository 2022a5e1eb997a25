"""The code beyond eq. 1: features chosen in several rounds, and values refined after each.

In eq. 1 the encoder chooses all K features and gives their values in one product. Features that overlap then explain
the same part of the input twice, and another part stays unexplained. Matching pursuit (Mallat and Zhang 1993) chooses
features by what the others leave. Here each round takes several features at once, at the cost of one product with all
directions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .sparse_code import SparseCode, decode, largest, project


def pursue(
    code: SparseCode,
    x: Tensor,
    directions: Tensor,
    rounds: int,
    per_round: int,
    steps: int,
    chosen: Tensor | None = None,
) -> SparseCode:
    """Refines the values of a code, and adds features in further rounds.

    Args:
        code: (..., C), the features of the first round. Its indices are rows of `directions`.
        x: (..., d), the vector that the code stands for.
        directions: D, (m, d), a feature per row.
        rounds: number of rounds, that of the code included.
        per_round: features that each further round adds.
        steps: steps of [`refine`] after each round.
        chosen: indices (..., C + (rounds - 1) per_round) of an earlier result. The rounds then take its features,
            without the products of all directions.

    Returns:
        Code (..., C + (rounds - 1) per_round). Its first pairs have the indices of `code`.
    """
    error = x - decode(code, directions)
    code = refine(code, error, directions, steps)
    for _ in range(rounds - 1):
        if steps:
            error = x - decode(code, directions)  # the values have moved
        have = code.indices.shape[-1]
        if chosen is None:
            features = best(error, code, directions, per_round)
        else:
            features = chosen[..., have : have + per_round].contiguous()
        added = code._replace(indices=features, values=project(error, features, directions).relu().to(code.values))
        error = error - decode(added, directions)
        code = refine(joined(code, added), error, directions, steps)
    return code


@torch.no_grad()
def best(error: Tensor, code: SparseCode, directions: Tensor, count: int) -> Tensor:
    """Finds the features whose directions have the largest products with what a code leaves of its input.

    Args:
        error: x - D z, (..., d).
        code: z, (..., C). Its own features are left out.
        directions: D, (m, d).
        count: number of features to find.

    Returns:
        Indices (..., count), the largest product first.
    """
    products = F.linear(error, directions)
    return largest(products.scatter_(-1, code.indices, -torch.inf), count)[1]


def joined(first: SparseCode, second: SparseCode) -> SparseCode:
    """Puts two codes of the same tokens together, (..., C) and (..., count) -> (..., C + count)."""
    indices, values = torch.cat([first.indices, second.indices], -1), torch.cat([first.values, second.values], -1)
    return first._replace(indices=indices, values=values)


def refine(code: SparseCode, error: Tensor, directions: Tensor, steps: int) -> SparseCode:
    """Moves the values of active features towards the least-squares fit of x by their directions.

    Each step lowers |x - D z|^2 along its steepest slope on the active features, as far as it goes down:

        g = D_S^T (x - D z),   z <- z + |g|^2 / |D g|^2 g

    A value that ends below 0 becomes 0. Gradients pass through all steps. A step costs two gathers, and nothing of
    size m.

    Args:
        code: z, (..., K), its indices rows of `directions`.
        error: x - D z, (..., d), what the code leaves of the vector x that it stands for.
        directions: D, (m, d), a feature per row.
        steps: number of steps; 0 returns the code.

    Returns:
        Code (..., K) with the same indices. Inactive pairs keep the value 0.
    """
    if steps == 0:
        return code
    active, values = code.values > 0, code.values
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


__all__ = ["best", "joined", "pursue", "refine"]
