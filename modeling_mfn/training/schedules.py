"""Schedules of alpha and k over the optimizer steps of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """Stays at `start` until step `begin`, moves to `end` within `steps` steps, and stays there.

    A schedule is a pure function of the step, so a resumed run has the values of an uninterrupted one.
    """

    start: float
    end: float
    steps: int
    begin: int = 0
    shape: Shape = "linear"
    """`"cosine"` leaves and arrives slowly."""

    def at(self, step: int) -> float:
        """Value at optimizer step `step`, counted from 0."""
        if step >= self.begin + self.steps:
            return self.end
        share = max(0, step - self.begin) / max(self.steps, 1)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share


def resolve_steps(amount: float, total_steps: int) -> float:
    """Steps, not rounded, of an amount of training: a share of `total_steps` up to 1, a number of steps above 1."""
    return amount * total_steps if amount <= 1 else amount


__all__ = ["Schedule", "Shape", "resolve_steps"]
