"""Records of one explanation: the target, the tokens, the features and the layers."""

from __future__ import annotations

from dataclasses import dataclass

from ...model.feature_names import format_feature


@dataclass(frozen=True)
class Target:
    """The predicted token, and the number that is explained."""

    token_id: int
    token: str
    logit: float
    probability: float
    against: str | None
    """What is taken off the logit: `"mean"`, the vocabulary's mean logit; `"token"`, another token's; or `None`."""
    against_id: int | None
    against_token: str | None
    value: float
    """logit - what it is held against."""


@dataclass(frozen=True)
class InputAttribution:
    """What raised a feature's pre-activation W_e x + b_e at one token (eq. 1 before its ReLU and TopK)."""

    by_token: list[float]
    """An attribution for each token read."""
    value: float
    """The pre-activation on this text."""
    baseline: float
    """The same where each token's embedding is the mean embedding of the vocabulary."""
    remainder: float
    """value - baseline - sum of by_token."""


@dataclass(frozen=True)
class Example:
    """A place in the training text where a feature fires."""

    tokens: list[str]
    activations: list[float]
    position: int
    """Of the token that the example is about: an index into `tokens`."""
    source: str | None
    """Where the text is from; `None` where the atlas' data did not say."""


@dataclass(frozen=True)
class AtlasEntry:
    """What an atlas has on a feature."""

    label: str | None
    firing_rate: float | None
    sources: dict[str, int]
    """Source -> tokens of the atlas' text from it on which the feature is active, the most first. Sources without a
    name, and those in which it never fires, are left out."""
    examples: list[Example]


@dataclass(frozen=True)
class FeatureAttribution:
    """One feature's part in the value."""

    layer: int
    index: int
    positions: list[int]
    """The tokens on which it is active."""
    activations: list[float]
    """There, after interventions."""
    attributions: list[float]
    """Activation times gradient, there."""
    ablation: float | None = None
    """Measured: how much the value falls when the feature is ablated on all tokens."""
    inputs: InputAttribution | None = None
    """What raised it at `position`."""
    atlas: AtlasEntry | None = None

    @property
    def name(self) -> str:
        """Such as `"L6/1234"`."""
        return format_feature(self.layer, self.index)

    @property
    def attribution(self) -> float:
        """The sum over tokens."""
        return sum(self.attributions)

    @property
    def position(self) -> int:
        """Where the attribution is largest in absolute value."""
        return self.positions[self._strongest]

    @property
    def activation(self) -> float:
        """The activation at `position`."""
        return self.activations[self._strongest]

    @property
    def _strongest(self) -> int:
        return max(range(len(self.positions)), key=lambda place: abs(self.attributions[place]))


@dataclass(frozen=True)
class LayerAttribution:
    """One layer's account of the value: value = baseline + sum of by_token + remainder."""

    layer: int
    active: int
    """Different features that are active on any token read."""
    by_token: list[float]
    """Attributions of all features on each token read."""
    baseline: float
    """Measured: the value with every feature of this layer ablated on all tokens. What goes round the features is in
    here: the decoder's bias, the token's mean and scale, (1 - alpha) h."""
    remainder: float
    """What the attributions miss, or have too much."""
    features: list[FeatureAttribution]
    """The strongest, by absolute attribution."""

    @property
    def attribution(self) -> float:
        """The sum over all features and tokens."""
        return sum(self.by_token)

    @property
    def others(self) -> float:
        """The sum over the features that are not listed."""
        return self.attribution - sum(feature.attribution for feature in self.features)


__all__ = [
    "AtlasEntry",
    "Example",
    "FeatureAttribution",
    "InputAttribution",
    "LayerAttribution",
    "Target",
]
