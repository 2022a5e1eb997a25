"""The processes of `accelerate launch`."""

from __future__ import annotations

import torch
from accelerate import PartialState


def join_processes() -> PartialState:
    """Joins the processes of `accelerate launch` and returns the state that all of accelerate shares.

    On a machine without an accelerator, accelerate joins processes only if it is told that they run on CPUs.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


__all__ = ["join_processes"]
