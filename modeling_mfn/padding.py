"""A model's inputs where windows are padded."""

from __future__ import annotations

from torch import Tensor


def padded_inputs(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """The inputs of a model for windows (B, T) that are padded on either side, for which a token's code and logits are
    those that it has without padding."""
    # GPT-2 counts padding as tokens where it is not told otherwise, and reads other position embeddings then
    position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


__all__ = ["padded_inputs"]
