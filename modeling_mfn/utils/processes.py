"""Several processes: their number, sums over them, and tensors sent to all of them.

Each function follows the process group of `torch.distributed` that exists when it is called. Without one there is a
single process. `accelerate.PartialState` would instead keep what it found at first use, or make a group.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sums a tensor over all processes, without a gradient. The given tensor stays as it is."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """Overwrites a tensor with that of process 0, in place, and returns it."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


__all__ = ["all_reduce_sum", "broadcast", "process_index", "world_size"]
