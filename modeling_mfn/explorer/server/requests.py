"""Requests as clients send them. What is not described here is refused."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .limits import MAX_LABEL

Written = dict[str, dict[str, Any]]
"""Interventions as JSON: feature -> kind, value and condition, as presets have them. The model checks them."""


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Control(_Request):
    """Interventions to compare with, such as the same ones on random features."""

    interventions: Written


class ReadRequest(_Request):
    """Text whose active features are asked for."""

    text: str
    k: int = Field(3, ge=1)


class PredictRequest(_Request):
    """Place in a text whose next token is asked for, with and without interventions."""

    text: str
    position: int = -1
    interventions: Written = Field(default_factory=dict)


class GenerateRequest(_Request):
    """Prompt to continue, with and without interventions."""

    prompt: str
    interventions: Written = Field(default_factory=dict)
    positions: Literal["all", "prompt", "generated"] = "all"
    max_new_tokens: int | None = Field(None, ge=1)
    """Tokens to generate; by default a few."""
    sample: bool = False
    temperature: float = Field(1.0, ge=0.01, le=10)
    seed: int = Field(0, ge=0, lt=2**53)
    control: Control | None = None


class PerplexityRequest(_Request):
    """Text whose perplexity is asked for, with and without interventions."""

    text: str
    interventions: Written = Field(default_factory=dict)
    control: Control | None = None


class ExplainRequest(_Request):
    """Prediction that is to be explained."""

    text: str
    position: int = -1
    token: str | None = None
    against: str | None = "mean"
    top: int = Field(10, ge=1)
    method: Literal["gradient", "integrated"] = "gradient"


class PresetRequest(_Request):
    """Interventions to save under a name."""

    interventions: Written
    positions: Literal["all", "prompt", "generated"] = "all"


class LabelRequest(_Request):
    """A person's label of a feature."""

    label: str = Field(min_length=1, max_length=MAX_LABEL)


__all__ = [
    "Control",
    "ExplainRequest",
    "GenerateRequest",
    "LabelRequest",
    "PerplexityRequest",
    "PredictRequest",
    "PresetRequest",
    "ReadRequest",
    "Written",
]
