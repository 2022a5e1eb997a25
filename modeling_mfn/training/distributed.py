"""Several processes that train on a share of the batch each: codes of all of it, weights that are spread over them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..model.families import MFNBlock
from ..model.mfn_pass import Reconstruction
from ..model.sparse_code import SparseCode
from ..utils.processes import world_size


def gather_code(code: SparseCode, mask: Tensor | None = None) -> SparseCode:
    """The code of all processes' tokens that count, (N, K), in the order of ranks.

    A loss of this code is the same in every process. Each takes its own tokens' part of the gradient, times the number
    of processes, since data parallelism averages gradients over processes: the result is the loss's gradient.
    """
    code = code.tokens(mask)
    processes = world_size()
    if processes == 1:
        return code
    own = code.values + (processes - 1) * (code.values - code.values.detach())
    values, indices = _gather_rows(code.values.detach()), _gather_rows(code.indices)
    values[dist.get_rank()] = own
    return code._replace(indices=torch.cat(indices), values=torch.cat(values))


def _gather_rows(rows: Tensor) -> list[Tensor]:
    """(N_r, ...) of each process, whose numbers of rows may differ."""
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    longest = int(torch.stack(counts).max())
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return [part[: int(number)] for part, number in zip(gathered, counts, strict=True)]


def unshard_for_gradients(model: nn.Module, reconstructions: Mapping[int, Reconstruction]) -> None:
    """Under FSDP2, has a block's weights at hand when a gradient arrives at its layer's reconstruction. FSDP frees them
    after the forward, and gathers them again for the gradient of the block's output alone."""
    from torch.distributed.fsdp import FSDPModule

    for block in model.modules():
        if isinstance(block, FSDPModule) and isinstance(block, MFNBlock):
            for tensor in tree_leaves(reconstructions[block.mfn.layer_index]):
                if torch.is_tensor(tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda gradient, block=block: block.unshard())
