"""Features of an atlas for a terminal: which ones to show, and a table of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ...utils.display import for_terminal

if TYPE_CHECKING:
    from .atlas import FeatureAtlas
    from .records import Example

MAX_FIRING_RATE, MIN_FIRINGS = 0.01, 16
"""A feature is worth showing if it fires on at most this share of tokens, and on at least this many tokens."""


def interesting_features(atlas: FeatureAtlas, count: int = 12) -> list[str]:
    """Names of features that fire rarely but strongly, the strongest first.

    Strength is the mean activation divided by its mean over the features of the layer. Where no feature fires rarely
    enough and often enough (`MAX_FIRING_RATE`, `MIN_FIRINGS`), all features are ranked.
    """
    frame = atlas.to_pandas()
    scale = frame.groupby("layer")["mean_activation"].transform("mean")
    frame = frame.assign(strength=frame["mean_activation"] / scale)
    rare = frame[(frame["firing_rate"] <= MAX_FIRING_RATE) & (frame["firing_count"] >= MIN_FIRINGS)]
    return list((rare if len(rare) else frame).nlargest(count, "strength")["name"])


def atlas_table(atlas: FeatureAtlas, names: list[str]) -> Table:
    """Table of features: firing rate, mean activation, promoted tokens, and the strongest example."""
    table = Table("feature", "fires on", "mean", "promotes", "strongest on")
    for name in names:
        record = atlas[name]
        promoted = Text(" ").join(for_terminal(entry["token"], 16) for entry in record.promoted[:4])
        heading = Text(name) if record.label is None else Text.assemble(name, " ", for_terminal(record.label, 24))
        mean = "" if record.mean_activation is None else f"{record.mean_activation:.2f}"
        example = in_context(record.examples[0]) if record.examples else Text("")
        table.add_row(heading, f"{record.firing_rate:.3%}", mean, promoted, example)
    return table


def in_context(example: Example, around: int = 6) -> Text:
    """Text of an example: the active token in bold, with up to `around` tokens before it and half as many after it."""
    first = max(0, example.offset - around)
    pieces = [
        for_terminal(token, 24, style="bold reverse" if at == example.offset else "")
        for at, token in enumerate(example.tokens[first : example.offset + around // 2 + 1], first)
    ]
    return Text.assemble(*pieces)


__all__ = ["atlas_table", "in_context", "interesting_features"]
