"""A text read through its features: what `FeatureAtlas.top` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from ...utils.display import for_terminal


@dataclass(frozen=True)
class ActiveFeature:
    """A feature on one token of a text.

    Effects are in logits, on the feature's direct path to the LM head: the activation times the feature's direction,
    through the final norm and the LM head. The final norm divides by this token's own denominator; effects in the atlas
    are averages over tokens. What later blocks make of the feature comes on top.
    """

    feature: str
    """Name of the feature, `L6/1234`."""
    label: str | None
    """Text of the label to show."""
    activation: float
    relative: float | None
    """Activation divided by the largest one in the atlas; `None` if the atlas never saw the feature active."""
    effect: float
    """Effect on the next token that the model finds likeliest."""
    promotes: str | None
    """Token whose logit the feature raises most, from the atlas."""
    promotes_effect: float | None
    """Effect on the token in `promotes`."""


@dataclass(frozen=True)
class ReadToken:
    """A token of the text with the features that are active on it."""

    position: int
    token_id: int
    token: str
    next_token: str
    """Next token that the model finds likeliest."""
    features: list[ActiveFeature]
    """Active features, the largest relative activation first."""


class TextReading(list[ReadToken]):
    """Tokens of a text with their features; rich prints them as a table."""

    def to_records(self) -> list[dict[str, Any]]:
        """Tokens as dictionaries that JSON can hold."""
        return [asdict(token) for token in self]

    def __rich__(self) -> Table:
        table = Table("token", "feature", "label", "activation", "of max", "next token", "promotes")
        for token in self:
            for place, active in enumerate(token.features):
                promotes = for_terminal(active.promotes or "", 16)
                if active.promotes_effect is not None:
                    promotes.append(f" {active.promotes_effect:+.2f}")
                table.add_row(
                    for_terminal(token.token if place == 0 else "", 24),
                    active.feature,
                    for_terminal(active.label or "", 32),
                    f"{active.activation:.3g}",
                    "" if active.relative is None else f"{active.relative:.0%}",
                    for_terminal(token.next_token, 16).append(f" {active.effect:+.2f}"),
                    promotes,
                    end_section=place == len(token.features) - 1,
                )
        return table


__all__ = ["ActiveFeature", "ReadToken", "TextReading"]
