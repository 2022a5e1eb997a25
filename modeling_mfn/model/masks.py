"""Attention masks of a batch, read as the tokens that count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def tokens_that_count(batch: Mapping[str, Any]) -> Tensor:
    """Returns a mask (B, T) of a batch for the model, nonzero where a token counts.

    A mask (B, T) says so itself. With a mask (B, 1, T, T), as packed rows may have, a token counts if it may attend to
    itself. Without a mask all tokens count.
    """
    mask: Tensor | None = batch.get("attention_mask")
    if mask is None:
        tokens = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"][..., 0]
        return torch.ones(tokens.shape, dtype=torch.long, device=tokens.device)
    if mask.ndim == 2:
        return mask
    itself = mask[:, 0].diagonal(dim1=-2, dim2=-1)
    # numbers are added to the scores of the attention: 0 lets a token through
    return itself == 0 if itself.is_floating_point() else itself.bool()


__all__ = ["tokens_that_count"]
