"""Reconstruction error of MFN layers by window, from which explained variance and its bootstrap follow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm

from ...data.windows import Windows, input_batches
from ...model.modes import evaluating

if TYPE_CHECKING:
    from ...model.mfn_for_causal_lm import MFNForCausalLM


@torch.no_grad()
def reconstruction_errors(
    model: MFNForCausalLM, windows: Windows, batch_size: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Measures the squared error |x - x_hat|^2 of encoder inputs x, and their squared distance from the mean of x.

    The explained variance of a layer is 1 - errors.sum(0) / distances.sum(0). With `input_norm="layer"`, x is
    standardised token by token, so that no token outweighs the others. The model runs at its own alpha.

    Returns:
        Errors (N, L) and distances (N, L), summed over the tokens of each window, by MFN layer.
    """
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
    sums = np.concatenate(found)  # (N, L, d + 3)
    totals, (squares, errors, tokens) = sums[..., :-3], np.moveaxis(sums[..., -3:], -1, 0)
    centre = totals.sum(0) / tokens.sum(0)[:, None]
    distances = squares - 2 * (totals * centre).sum(-1) + tokens * np.square(centre).sum(-1)
    return errors, distances


__all__ = ["reconstruction_errors"]
