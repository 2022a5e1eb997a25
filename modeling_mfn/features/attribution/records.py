"""Records of an explanation: the target, and the parts that layers, features and input tokens have in it."""

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
    """Number subtracted from the logit: `"mean"` for the vocabulary's mean logit, `"token"` for the logit of another
    token, or `None`."""
    against_id: int | None
    """Id of the other token, with `"token"`."""
    against_token: str | None
    """Text of the other token, with `"token"`."""
    value: float
    """The logit minus the number in `against`."""


@dataclass(frozen=True)
class InputAttribution:
    """Parts that the embeddings of the tokens read have in a number.

    The number is a feature's pre-activation W_e x + b_e (eq. 1 before its ReLU and TopK), or the explained value. With
    `coding_rounds` above 1 or `refine_steps` above 0 it is the feature's activation in place of a pre-activation.
    """

    by_token: list[float]
    """Attribution of each token read."""
    value: float
    """The number on this text."""
    baseline: float
    """The number if every token has the mean embedding of the vocabulary."""
    remainder: float
    """Rest of the value: value - baseline - sum of by_token."""


@dataclass(frozen=True)
class ExampleText:
    """A piece of the training text in which a feature is active, taken from the atlas."""

    tokens: list[str]
    activations: list[float]
    position: int
    """Index into `tokens` of the token that the example is about."""
    source: str | None
    """Source of the text; `None` if the atlas' data did not name it."""


@dataclass(frozen=True)
class AtlasEntry:
    """Facts that an atlas has about a feature."""

    label: str | None
    firing_rate: float | None
    sources: dict[str, int]
    """Source -> tokens of this source in the atlas' text on which the feature is active, the most first. Sources
    without a name, and sources in which the feature never fires, are left out."""
    examples: list[ExampleText]


@dataclass(frozen=True)
class FeatureAttribution:
    """One feature's part in the value."""

    layer: int
    index: int
    positions: list[int]
    """Tokens on which the feature is active."""
    activations: list[float]
    """Activation at each of these positions, after interventions."""
    attributions: list[float]
    """Activation times gradient at each of these positions."""
    ablation: float | None = None
    """Measured fall of the value when the feature is ablated on all tokens."""
    inputs: InputAttribution | None = None
    """Parts of the tokens read in the feature's pre-activation at `position`."""
    atlas: AtlasEntry | None = None

    @property
    def name(self) -> str:
        """Name of the feature, `L6/1234`."""
        return format_feature(self.layer, self.index)

    @property
    def attribution(self) -> float:
        """Sum of the attributions over tokens."""
        return sum(self.attributions)

    @property
    def position(self) -> int:
        """Token with the attribution of largest absolute value."""
        return self.positions[self._strongest]

    @property
    def activation(self) -> float:
        """Activation at `position`."""
        return self.activations[self._strongest]

    @property
    def _strongest(self) -> int:
        return max(range(len(self.positions)), key=lambda place: abs(self.attributions[place]))


@dataclass(frozen=True)
class LayerAttribution:
    """One layer's account of the value: value = baseline + sum of by_token + remainder."""

    layer: int
    active: int
    """Number of different features that are active on any token read."""
    by_token: list[float]
    """Attribution of all features on each token read."""
    baseline: float
    """Measured value with every feature of this layer ablated on all tokens. It contains everything that bypasses the
    features: the decoder's bias, the token's mean and scale, and (1 - alpha) h."""
    remainder: float
    """Rest of the value: value - baseline - sum of by_token. It is not 0, because the value is not linear in z."""
    features: list[FeatureAttribution]
    """Features with the largest absolute attributions."""

    @property
    def attribution(self) -> float:
        """Sum of the attributions over all features and tokens."""
        return sum(self.by_token)

    @property
    def others(self) -> float:
        """Sum of the attributions of all features that are not listed."""
        return self.attribution - sum(feature.attribution for feature in self.features)


__all__ = ["AtlasEntry", "ExampleText", "FeatureAttribution", "InputAttribution", "LayerAttribution", "Target"]
