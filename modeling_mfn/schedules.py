"""How alpha and k move over training steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearSchedule:
    """From `start` at step 0 to `end` at step `steps`, and `end` from there on. A pure function of the step, so that
    a resumed run goes on as if it had never stopped."""

    start: float
    end: float
    steps: int

    def at(self, step: int) -> float:
        """The value for training step `step`, counted from 0."""
        if step >= self.steps:
            return self.end
        return self.start + (self.end - self.start) * step / self.steps
