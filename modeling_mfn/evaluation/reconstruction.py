"""Models at another alpha, and how well their MFN layers reconstruct what they read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from tqdm.auto import tqdm

from ..atlas.harvest import evaluating
from ..modeling_mfn import MFNForCausalLM
from .activations import Windows, batches


@contextmanager
def at_alpha(model: MFNForCausalLM, alpha: float) -> Iterator[None]:
    """The model at an alpha, 1 for reading features alone, and as it was afterwards."""
    before = model.config.alpha
    model.set_blend(alpha)
    try:
        yield
    finally:
        model.set_blend(before)


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
        for batch in tqdm(batches(windows, batch_size), "reconstruction", unit="batch", leave=False):
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


__all__ = ["at_alpha", "reconstruction_errors"]
