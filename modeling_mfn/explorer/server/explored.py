"""The model of a server with what belongs to it, and the checks of texts and interventions from clients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.tokens import checked_text
from ...features.atlas import FeatureAtlas
from ...model.checks import shown
from ...model.mfn_for_causal_lm import MFNForCausalLM
from ...model.modes import unsteered
from .jobs import Job
from .limits import Limits
from .requests import Written
from .turns import Turns


@dataclass
class Explored:
    """A model, its tokenizer and its atlas, as a server has them."""

    model: MFNForCausalLM
    tokenizer: Any
    atlas: FeatureAtlas
    limits: Limits = field(default_factory=Limits)
    folder: Path | None = None
    """Folder of the model in which presets and labels are saved; `None` if nobody may save."""
    removed: set[str] = field(default_factory=set)
    """Features whose human label was removed since the server began."""
    turns: Turns = field(default_factory=Turns)

    @contextmanager
    def running(self, job: Job) -> Iterator[None]:
        """Waits for a turn at the model.

        The model then runs without the preset that is active by default. So "plain" is plain, and a preset that a
        client asks for does not act on top of another one.
        """
        with self.turns.turn():
            job.check()
            with unsteered(self.model):
                yield

    def token_ids(self, text: str, most: int, name: str = "text") -> Tensor:
        """Tokens (1, T) of a text, on the model's device; `ValueError` if there are none or too many."""
        size = len(checked_text(name, text).encode())
        if size > self.limits.text_bytes:
            raise ValueError(f"the {name} has {size} bytes; this server reads {self.limits.text_bytes} at most")
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        if not ids.numel():
            raise ValueError(f"the {name} has no tokens")
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        most = most if limit is None else min(most, limit)
        if ids.shape[1] > most:
            raise ValueError(f"the {name} has {ids.shape[1]} tokens; this server reads {most} at most")
        on_device: Tensor = ids.to(self.model.device)
        return on_device

    def place(self, position: int, ids: Tensor) -> int:
        """Returns a position counted from 0; `ValueError` if the text has no such token."""
        count = ids.shape[1]
        if not -count <= position < count:
            raise ValueError(
                f"position is {shown(position)}; the text has {count} tokens, counted from 0, or from -1 backwards"
            )
        return position % count

    def steering(self, interventions: Written, positions: str = "all") -> Any:
        """Returns the context of `model.steer` for interventions; `ValueError` if the model cannot have them."""
        if len(interventions) > self.limits.interventions:
            raise ValueError(
                f"interventions are {len(interventions)}; this server steers {self.limits.interventions} features at "
                "most"
            )
        return self.model.steer(interventions, positions)  # type: ignore[arg-type]


def finite(logits: Tensor) -> Tensor:
    """Returns logits in float32; `ValueError` if interventions made them infinite."""
    if not torch.isfinite(logits).all():
        raise ValueError("the model's logits are not finite with these interventions; choose smaller values")
    return logits.float()


__all__ = ["Explored", "finite"]
