"""Several processes that train on a share of the batch each: codes of the whole batch, weights spread by FSDP."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..model.mfn_block import MFNBlock
from ..model.mfn_pass import Reconstruction
from ..model.sparse_code import SparseCode
from ..model.twins import is_a
from .arguments import MFNTrainingArguments


def check_distribution(args: MFNTrainingArguments, sharded: bool, deepspeed: bool) -> None:
    """Checks that arguments of a training fit the way in which its processes share weights and steps.

    Args:
        args: of the training.
        sharded: True under FSDP.
        deepspeed: True under DeepSpeed.

    Raises:
        ValueError: if an argument asks for something that is not possible there.
    """
    if args.reinit_dead_every and sharded:
        raise ValueError("reinit_dead_every is not available under FSDP, where no process has whole weights")
    for name in ("trainable_features", "named_features"):
        if getattr(args, name) and (sharded or deepspeed):
            raise ValueError(f"{name} is not available under FSDP and DeepSpeed, which spread weights")
    if args.skip_nonfinite_steps and deepspeed:
        raise ValueError(
            f"skip_nonfinite_steps is {args.skip_nonfinite_steps}; under DeepSpeed, whose backward moves the weights, "
            "it must be 0"
        )


def gather_code(code: SparseCode, mask: Tensor | None = None) -> SparseCode:
    """Gathers the code of all processes' tokens that count: (..., K) and a mask (...) -> (N, K), in the order of ranks.

    A loss of this code is the same in every process. The gradient of a process is its own tokens' part, times the
    number of processes. Data parallelism averages gradients over processes, which gives the loss's gradient.
    """
    code, state = code.tokens(mask), PartialState()
    if state.num_processes == 1:
        return code
    own = code.values + (state.num_processes - 1) * (code.values - code.values.detach())
    counts = gather(torch.tensor([len(own)], device=own.device)).tolist()
    indices, values = (
        [rows[:count] for rows, count in zip(gather(padded).chunk(len(counts)), counts, strict=True)]
        for padded in pad_across_processes((code.indices, code.values.detach()))
    )
    values[state.process_index] = own
    return code._replace(indices=torch.cat(indices), values=torch.cat(values))


def unshard_for_gradients(model: nn.Module, reconstructions: Mapping[int, Reconstruction]) -> None:
    """Under FSDP2, gathers a block's weights when a gradient arrives at its layer's reconstruction.

    FSDP frees the weights after the forward. On its own it gathers them again for a gradient of the block's output
    alone.
    """
    from torch.distributed.fsdp import FSDPModule

    for block in model.modules():
        if isinstance(block, FSDPModule) and is_a(block, MFNBlock):
            for tensor in tree_leaves(reconstructions[block.mfn.layer_index]):
                if torch.is_tensor(tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda gradient, block=block: block.unshard())


__all__ = ["check_distribution", "gather_code", "unshard_for_gradients"]
