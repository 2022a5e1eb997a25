"""Averages of loss parts, of which some are there in only a part of the steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .distributed import all_reduce_sum


class Averages:
    """Weighted averages over processes, each over what brought it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        """Name -> the sum of the parts and that of their weights, (2,)."""

    def add(self, parts: Mapping[str, Tensor], factor: float, weight: float) -> None:
        """Adds scalars times `factor` to the sums, and `weight` to what these are divided by."""
        for name, part in parts.items():
            part = part.detach().float()
            self._sums[name] = self._sums.get(name, 0.0) + torch.stack([part * factor, torch.full_like(part, weight)])

    def take(self) -> dict[str, float]:
        """The averages; sums start again from 0."""
        if not self._sums:
            return {}
        device = next(iter(self._sums.values())).device
        sums = all_reduce_sum(torch.stack([both.to(device) for both in self._sums.values()]))
        averages = dict(zip(self._sums, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
        self._sums = {}
        return averages
