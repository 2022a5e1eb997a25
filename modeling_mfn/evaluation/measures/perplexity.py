"""Next-token losses and perplexity of a causal LM on windows of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ...data.windows import Windows, input_batches
from ...model.modeling_mfn import MFNForCausalLM
from ...model.modes import evaluating

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from ...model.modeling_mfn import MFNForCausalLM


@torch.no_grad()
def next_token_losses(model: Any, windows: Windows, batch_size: int = 4, description: str = "loss") -> np.ndarray:
    """Cross entropy of each next token in nats, (rows, T - 1) float32; NaN where it or the token before is padding.

    Args:
        model: any causal LM of transformers. It is in evaluation mode meanwhile.
        windows: rows of equal length T with `input_ids`, and `attention_mask` where they are padded.
        batch_size: windows a forward.
        description: shown beside the progress bar.
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
    """The mean of `next_token_losses` in each window, (rows,) float64: what a bootstrap over windows resamples.
    `ValueError` for a window with nothing to predict."""
    losses = next_token_losses(model, windows, batch_size, description)
    if empty := np.flatnonzero(np.isnan(losses).all(1)).tolist():
        raise ValueError(f"window {empty[0]} has no token to predict; leave out windows of fewer than two tokens")
    return np.asarray(np.nanmean(losses, axis=1, dtype=np.float64))


def perplexity(model: Any, windows: Windows, batch_size: int = 4, description: str = "perplexity") -> float:
    """exp of the mean of `next_token_losses` over all windows, T - 1 predictions each where nothing is padding."""
    return math.exp(np.nanmean(next_token_losses(model, windows, batch_size, description), dtype=np.float64))


def perplexity_rows(
    model: MFNForCausalLM, base: PreTrainedModel | None, held_out: Mapping[str, Dataset]
) -> list[dict[str, Any]]:
    """Perplexities of the base model, where it is given, and of the MFN model at alpha 0 and at its own alpha: a row of
    `evaluation.json` for each text. `held_out`: what the text is -> windows of it, of equal length."""
    alpha = model.config.alpha
    rows = []
    for name, windows in held_out.items():
        length = len(windows[0]["input_ids"])
        figures = {} if base is None else {"base": perplexity(base, windows)}
        for blend in dict.fromkeys((0.0, alpha)):  # the model's own comes last, and stays
            model.set_blend(blend)
            figures[f"alpha_{blend:g}"] = perplexity(model, windows)
        data = f"{name}, {len(windows)} windows of {length} tokens"
        rows.append(
            {"data": data, "tokens": len(windows) * length}
            | {figure: round(value, 3) for figure, value in figures.items()}
        )
    return rows


@torch.no_grad()
def reconstruction_errors(
    model: MFNForCausalLM, windows: Windows, batch_size: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors of what the encoders read, x - x_hat, summed over each of N windows, and its squared distances
    from the mean over all windows: (N, L) each, by MFN layer. 1 - errors.sum(0) / distances.sum(0) is the explained
    variance of the layers. With `input_norm="layer"`, x is standardised token by token, so that no token outweighs the
    others. The model runs at its own alpha."""
    found = []
    with evaluating(model):
        for batch in tqdm(input_batches(windows, batch_size), "reconstruction", unit="batch", leave=False):
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[..., None].double()
            items = model.model(**inputs, output_reconstructions=True, use_cache=False).reconstructions
            of_layers = []
            for number, layer in model.mfn_layers.items():
                x, error = (part * mask for part in layer.input_and_error(items[number]))
                squares = [part.square().sum((1, 2)) for part in (x, error)]
                of_layers.append(torch.cat([x.sum(1), torch.stack([*squares, mask.sum((1, 2))], 1)], 1))
            found.append(torch.stack(of_layers, 1).cpu().numpy())
    sums = np.concatenate(found)
    totals, (squares, errors, tokens) = sums[..., :-3], np.moveaxis(sums[..., -3:], -1, 0)
    centre = totals.sum(0) / tokens.sum(0)[:, None]
    distances = squares - 2 * (totals * centre).sum(-1) + tokens * np.square(centre).sum(-1)
    return errors, distances


__all__ = [
    "next_token_losses",
    "perplexity",
    "perplexity_rows",
    "reconstruction_errors",
    "window_losses",
]
