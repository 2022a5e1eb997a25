"""How alpha and k move over training steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["linear", "cosine", "stepped"]


@dataclass(frozen=True)
class Schedule:
    """`start` until step `begin`, then towards `end` for `steps` steps, and `end` from there on. A pure function of the
    step, so that a resumed run goes on as if it had never stopped."""

    start: float
    end: float
    steps: int
    begin: int = 0
    shape: Shape = "linear"
    """`"cosine"` leaves and arrives slowly; `"stepped"` moves in `stairs` equal jumps, the last one to `end`."""
    stairs: int = 8

    def at(self, step: int) -> float:
        """The value for training step `step`, counted from 0."""
        if step >= self.begin + self.steps:
            return self.end
        share = max(0, step - self.begin) / max(self.steps, 1)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        elif self.shape == "stepped":
            share = math.floor(share * self.stairs) / self.stairs
        return self.start + (self.end - self.start) * share


def resolve_steps(amount: float, total_steps: int) -> float:
    """Steps, not rounded, from a share of the training (at most 1) or from a number of them (above 1)."""
    return amount * total_steps if amount <= 1 else amount
