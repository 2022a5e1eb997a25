"""Records of an atlas: a feature, and a place in the text where it is active."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .labels import Label


class ExampleLimits(NamedTuple):
    """Limits on the examples of one feature, set when an atlas is built."""

    top: int = 16
    """Examples with the largest activations, at most one per window."""
    stratum: int = 4
    """Random examples from each octave of activations."""
    before: int = 24
    """Tokens of context before the token that the example is about."""
    after: int = 7
    """Tokens of context after it."""

    @property
    def context(self) -> int:
        """C, tokens per example."""
        return self.before + 1 + self.after


@dataclass(frozen=True)
class Example:
    """A place in the text where a feature is active; fields as in `examples.parquet`."""

    kind: str
    """`top` for one of the largest activations, `stratum` for a random one from an octave of activations."""
    stratum: float | None
    """Lower end of the octave; `None` for `top`."""
    rank: int
    """Place among the feature's examples of this kind, from 0."""
    activation: float
    window: int
    """Number of the window of text, in the order of the data, from 0."""
    position: int
    """Place of the token in its window, from 0."""
    source: str | None
    """Source of the window's text; `None` if the data has no column `source`."""
    offset: int
    """Place of the token in the three lists below."""
    token_ids: list[int]
    tokens: list[str]
    """Raw text: escape it wherever it is rendered."""
    activations: list[float]
    """The feature's activation on each of these tokens; 0 on tokens that are not counted."""

    @property
    def token(self) -> str:
        """Text of the token that the feature is active on."""
        return self.tokens[self.offset]


@dataclass(frozen=True)
class FeatureRecord:
    """Everything an atlas has about one feature; fields as in `features.parquet`, with labels and examples."""

    layer: int
    index: int
    name: str
    """Name of the feature, `L6/1234`."""
    status: str
    """`alive` if the feature is active on a counted token, `dead` if on none, `pruned` if it is out of the model."""
    firing_count: int
    """Counted tokens on which the feature is active."""
    source_counts: list[int]
    """Firing count per source, in the order of `data.sources` in `atlas.json`."""
    firing_rate: float
    """Share of counted tokens on which the feature is active."""
    mean_activation: float | None
    """Mean over the tokens on which the feature is active; `None` if there are none."""
    max_activation: float | None
    histogram: list[int]
    """Number of activations in each bin of `histogram_edges` in `atlas.json`."""
    promoted: list[dict[str, Any]]
    """Next tokens that the feature makes likelier, the most first: `token_id`, `token` and `effect` in logits."""
    suppressed: list[dict[str, Any]]
    """Next tokens that the feature makes less likely, the most first: `token_id`, `token` and `effect` in logits."""
    nearest: list[dict[str, Any]]
    """Features of the same layer with the most similar direction: `index` and `cosine`."""
    co_active: list[dict[str, Any]]
    """Features of the same layer that are active on the same tokens: `index`, `jaccard` and `count`."""
    labels: list[Label]
    """Labels, the one to show first."""
    examples: list[Example]
    """Examples of kind `top`, the largest activation first, then examples of the strata."""

    @property
    def label(self) -> str | None:
        """Text of the label to show."""
        return self.labels[0].label if self.labels else None


__all__ = ["Example", "ExampleLimits", "FeatureRecord"]
