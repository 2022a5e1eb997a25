"""Perplexity of a causal LM on windows of tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm


@torch.no_grad()
def perplexity(model: Any, windows: Dataset, batch_size: int = 4, description: str = "perplexity") -> float:
    """exp of the mean next-token cross entropy (natural log) over all windows, T - 1 predictions each.

    Args:
        model: any causal LM of transformers.
        windows: a data set with `input_ids`, (T,) a row.
        batch_size: windows a forward.
        description: shown beside the progress bar.
    """
    model.eval()
    total, count = 0.0, 0
    for start in tqdm(range(0, len(windows), batch_size), description, leave=False):
        tokens = torch.tensor(windows[start : start + batch_size]["input_ids"], device=model.device)
        logits = model(input_ids=tokens).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        total, count = total + loss.item(), count + tokens[:, 1:].numel()
    return math.exp(total / count)
