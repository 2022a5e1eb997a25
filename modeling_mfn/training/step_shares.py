"""Shares of a batch in its optimizer step: with them, several batches and processes have the losses of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor

from ..model.masks import tokens_that_count
from .arguments import MFNTrainingArguments

OF_ALL_PROCESSES = ("rate", "comp")
"""Losses of the whole batch, which every process computes alike."""
INPUTS = {"attention_mask", "input_ids", "inputs_embeds"}
"""Inputs of a model that say how many tokens it reads."""


class StepShares:
    """Shares of batches in an optimizer step.

    Gradients are averaged over processes. The Trainer also divides a loss by the number of batches if it does not know
    the number of items.
    """

    def __init__(self, accelerator: Accelerator, args: MFNTrainingArguments) -> None:
        self._processes = accelerator.num_processes
        self._counts_all_items = args.average_tokens_across_devices
        self.tokens: Tensor | float | None = 1
        """Real tokens of the step in all processes, at least 1; `None` if unknown."""
        self._batches = 1

    def begin_step(self, batches: Sequence[Any], device: torch.device) -> Tensor | None:
        """Returns the number of real tokens in the batches of all processes, and keeps it.

        `None` if the batches are no inputs of the model, such as prompts that are yet to be completed.
        """
        self._batches = max(len(batches), 1)
        self.tokens = None
        if not all(isinstance(batch, Mapping) and INPUTS & batch.keys() for batch in batches):
            return None
        tokens = torch.tensor(float(sum(int(tokens_that_count(batch).sum()) for batch in batches)), device=device)
        tokens = reduce(tokens, "sum")
        self.tokens = tokens.clamp_min(1)
        return tokens

    @property
    def processes(self) -> int:
        """Number of processes whose items the Trainer's number of items counts."""
        return self._processes if self._counts_all_items else 1

    def of_tokens(self, mask: Tensor, divisor: int) -> Tensor:
        """Returns the weight of a batch's means over tokens. All batches weigh the same if their tokens are unknown.

        Args:
            mask: (B, T), nonzero where a token counts.
            divisor: number by which the Trainer divides the loss.
        """
        if self.tokens is None:
            return torch.tensor(divisor / self._batches, device=mask.device)
        return mask.sum() / self.tokens * self._processes * divisor


def predicted_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Returns a mask (B, T - 1) of the tokens that a loss of the next token is a mean over."""
    labels = batch.get("labels")
    counted: Tensor = tokens_that_count(batch).bool() if labels is None else labels != -100
    return counted[:, 1:]


def means_over_layers(layers: Mapping[int, Mapping[str, Tensor]], share: Tensor) -> dict[str, Tensor]:
    """Returns means of losses over layers, times the batch's share of the step."""
    # a loss of all processes' tokens is equal in each process, whatever its own share
    mean_share = reduce(share, "mean")
    return {
        name: torch.stack([losses[name] for losses in layers.values()]).mean()
        * (mean_share if name in OF_ALL_PROCESSES else share)
        for name in next(iter(layers.values()))
    }


__all__ = ["StepShares", "means_over_layers", "predicted_tokens"]
