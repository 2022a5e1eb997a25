"""Weights that a model can compute with: neither NaN nor infinite, nor so large that their norm is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SUMMABLE_BYTES = 2
"""Bytes of the narrowest floating-point numbers that norms are taken of; packed weights of fewer bits are left out."""


@torch.no_grad()
def non_finite_weight(model: nn.Module) -> str | None:
    """Returns the name of the first parameter whose norm is not finite in float32, or `None`.

    Every process of a sharded model must call it.
    """
    return next((name for name, each in model.named_parameters() if not has_finite_norm(each)), None)


def has_finite_norm(weight: Tensor) -> bool:
    """Returns True if the norm of a tensor is finite in float32; also for tensors that hold no numbers, or packed ones.

    Every process of a sharded tensor must call it.
    """
    if weight.is_meta or is_packed(weight):
        return True
    norm = torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    return bool(whole(norm).isfinite())


def is_packed(weight: Tensor) -> bool:
    """Returns True for a weight that quantisation has packed, by its type of numbers or a tensor class of its own."""
    plain = type(weight.data) is Tensor or is_sharded(weight)
    return not plain or not weight.is_floating_point() or weight.dtype.itemsize < SUMMABLE_BYTES


def is_sharded(weight: Tensor) -> bool:
    """Returns True for a weight that FSDP2 or tensor parallelism has spread over processes."""
    return hasattr(weight, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor that FSDP2 may have spread over processes as one tensor."""
    full: Tensor = getattr(tensor, "full_tensor", lambda: tensor)()
    return full


__all__ = ["has_finite_norm", "is_packed", "is_sharded", "non_finite_weight", "whole"]
