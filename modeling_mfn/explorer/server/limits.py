"""Limits of what one request, and all requests together, may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_LABEL = 500
"""Characters of a label."""
MAX_PRESET_NAME = 100
"""Characters of a preset's name."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server. The defaults are for one person on their own machine."""

    text_tokens: int = 1024
    """Tokens of a text or prompt."""
    text_bytes: int = 2**14
    """Bytes of a text or prompt in UTF-8."""
    explained_tokens: int = 256
    """Tokens of a text that is explained. An explanation needs a backward pass, and one more per listed feature."""
    new_tokens: int = 512
    """Tokens of one generation."""
    interventions: int = 64
    """Features that one request steers."""
    features_per_token: int = 10
    """Active features that are told per token and layer."""
    explained_features: int = 20
    """Features that are explained per layer."""
    running: int = 2
    """Requests for which the model works at the same time."""
    waiting: int = 8
    """Requests that wait until one of these is done. Further ones are refused."""
    seconds: float = 120.0
    """Time of one request, without waiting."""
    body_bytes: int = 2**17
    """Bytes of a request's body."""
    body_seconds: float = 10.0
    """Time in which a request's body must arrive."""

    def for_model(self, config: Any) -> dict[str, int | float]:
        """Limits as a client is told them. A model may read fewer tokens than the server allows."""
        most = getattr(config.text_config, "max_position_embeddings", None) or self.text_tokens
        return {
            "text_tokens": min(self.text_tokens, most),
            "text_bytes": self.text_bytes,
            "explained_tokens": min(self.explained_tokens, most),
            "new_tokens": min(self.new_tokens, most),
            "interventions": self.interventions,
            "features_per_token": self.features_per_token,
            "explained_features": self.explained_features,
            "label": MAX_LABEL,
            "preset_name": MAX_PRESET_NAME,
            "running": self.running,
            "waiting": self.waiting,
            "seconds": self.seconds,
        }


PUBLIC = Limits(
    text_tokens=256,
    text_bytes=2**12,
    explained_tokens=64,
    new_tokens=64,
    interventions=16,
    features_per_token=5,
    explained_features=10,
    seconds=30.0,
    body_bytes=2**15,
)
"""Limits of a server that anybody may use."""

__all__ = ["MAX_LABEL", "MAX_PRESET_NAME", "PUBLIC", "Limits"]
