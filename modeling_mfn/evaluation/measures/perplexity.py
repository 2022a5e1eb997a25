"""Next-token losses of a causal LM on windows of tokens: by token, by window, and as perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ...data.windows import Windows, input_batches
from ...model.modes import evaluating

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from ...model.mfn_for_causal_lm import MFNForCausalLM


@torch.no_grad()
def next_token_losses(model: Any, windows: Windows, batch_size: int = 4, description: str = "loss") -> np.ndarray:
    """(rows, T - 1) float32, cross entropy of each next token in nats.

    NaN where the token or the one before it is padding.

    Args:
        model: any causal LM of transformers. It runs in evaluation mode.
        windows: rows of equal length T with `input_ids`, and `attention_mask` where they are padded.
        batch_size: windows per forward.
        description: label of the progress bar.

    Raises:
        ValueError: if there is no window.
    """
    found = []
    rows = len(windows) if isinstance(windows, Sized) else None
    with evaluating(model), tqdm(total=rows, desc=description, unit="window", leave=False) as progress:
        for batch in input_batches(windows, batch_size):
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
            if mask is not None:
                losses = losses.masked_fill(~(mask[:, 1:].bool() & mask[:, :-1].bool()), torch.nan)
            found.append(losses.cpu().numpy())
            progress.update(len(tokens))
    if not found:
        raise ValueError("windows have no row; a loss needs some")
    return np.concatenate(found)


def window_losses(model: Any, windows: Windows, batch_size: int = 4, description: str = "loss") -> np.ndarray:
    """(rows,) float64, mean loss of each window, for a bootstrap over windows.

    The arguments are those of [`next_token_losses`].

    Raises:
        ValueError: if there is no window, or one has no token to predict.
    """
    losses = next_token_losses(model, windows, batch_size, description)
    if empty := np.flatnonzero(np.isnan(losses).all(1)).tolist():
        raise ValueError(f"window {empty[0]} has no token to predict; leave out windows of fewer than two tokens")
    return np.asarray(np.nanmean(losses, axis=1, dtype=np.float64))


def perplexity(model: Any, windows: Windows, batch_size: int = 4, description: str = "perplexity") -> float:
    """Exponential of the mean loss over all next tokens of all windows.

    The arguments are those of [`next_token_losses`].
    """
    return math.exp(np.nanmean(next_token_losses(model, windows, batch_size, description), dtype=np.float64))


def perplexity_rows(
    model: MFNForCausalLM, base: PreTrainedModel | None, held_out: Mapping[str, Dataset]
) -> list[dict[str, Any]]:
    """Measures the rows of `evaluation.json`: perplexity of the base model, at alpha 0 and at the model's own alpha.

    Args:
        model: MFN model.
        base: its base model. Without it, that column is left out.
        held_out: name of a text -> its windows, of equal length.
    """
    alpha = model.config.alpha
    rows = []
    for name, windows in held_out.items():
        length = len(windows[0]["input_ids"])
        measured = {} if base is None else {"base": perplexity(base, windows)}
        for blend in dict.fromkeys((0.0, alpha)):  # the model's own alpha comes last and stays
            model.set_blend(blend)
            measured[f"alpha_{blend:g}"] = perplexity(model, windows)
        data = f"{name}, {len(windows)} windows of {length} tokens"
        rounded = {column: round(value, 3) for column, value in measured.items()}
        rows.append({"data": data, "tokens": len(windows) * length} | rounded)
    return rows


__all__ = ["next_token_losses", "perplexity", "perplexity_rows", "window_losses"]
