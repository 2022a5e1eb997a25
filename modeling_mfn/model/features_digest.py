"""Name of a model's features: the digest of the weights as the last training left them. Casts and edits keep it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

import torch
from torch import Tensor, nn

from .weights_digest import digest_of_model

if TYPE_CHECKING:
    from .configuration_mfn import MFNConfig
    from .mfn_layer import MFNLayer

P = ParamSpec("P")

SAMPLED = 64
"""Entries of a parameter that are compared with earlier ones."""


class Noted(NamedTuple):
    """State of a parameter when its model's features had their name."""

    version: int
    """Number of changes in place that torch has counted; fused optimizers are not counted."""
    shape: torch.Size
    entries: Tensor
    """Some entries, in float64. A cast of the parameter rounds them alike."""

    @classmethod
    def of(cls, parameter: nn.Parameter) -> Noted | None:
        """Notes a parameter; `None` if its numbers are not in memory, or spread over processes."""
        values = parameter.detach()
        if type(values) is not Tensor or values.is_meta:
            return None
        step = max(values.numel() // SAMPLED, 1)
        return cls(parameter._version, values.shape, values.flatten()[::step].double().cpu())

    def has_changed(self, parameter: nn.Parameter) -> bool:
        """Returns True if something else than a cast has changed the parameter since."""
        if parameter.shape != self.shape:  # an edit, or a vocabulary of another size
            return False
        if parameter._version != self.version:
            return True
        now = Noted.of(parameter)
        return now is not None and not torch.equal(self.entries.to(parameter.dtype).double(), now.entries)


class FeaturesDigest:
    """Base class of MFN models that know whether their features are still those that the config names."""

    if TYPE_CHECKING:
        config: MFNConfig

        @property
        def mfn_layers(self) -> dict[int, MFNLayer]: ...

    _noted: dict[str, Noted] = {}  # replaced as a whole

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        """Restores a copied or pickled model, whose parameters are counted anew."""
        super().__setstate__(state)  # type: ignore[misc]
        parameters = dict(self.named_parameters())
        self._noted = {
            name: noted._replace(version=parameters[name]._version)
            for name, noted in self._noted.items()
            if name in parameters
        }

    @property
    def features_digest(self: Any) -> str | None:
        """Name of the features as they are now. A save or an atlas gives the first name, and before they have none.

        Training is told by `model.train()`, by changes in place that torch counts, and by some entries of each weight.
        Features that were trained, and are not all in memory, have no name.
        """
        if self.config.features_digest is None or not self._was_trained():
            return self.config.features_digest
        return self._name_by(digest_of_model(self))

    def name_features(self: Any, weights: str | None) -> None:
        """Writes the name of the features into the config.

        Args:
            weights: Digest of the weights as they are now.
        """
        self.config.features_digest = self._name_by(weights)
        self.config.weights_digest = weights
        for layer in self.mfn_layers.values():
            layer.has_named_features()
        self.note_features()

    def note_features(self: Any) -> None:
        """Notes the weights that the name in the config belongs to."""
        noted = {name: Noted.of(parameter) for name, parameter in self.named_parameters()}
        self._noted = {name: each for name, each in noted.items() if each is not None}

    def _name_by(self, weights: str | None) -> str | None:
        """Returns the name of features whose weights have a digest: the older name, if they are not trained since."""
        as_saved = weights is not None and weights == self.config.weights_digest
        kept = self.config.features_digest if as_saved or not self._was_trained() else None
        return kept or weights

    def _was_trained(self: Any) -> bool:
        """Returns True if a training may have changed the features since they were named."""
        return any(layer.training or layer.was_trained for layer in self.mfn_layers.values()) or any(
            self._noted[name].has_changed(parameter)
            for name, parameter in self.named_parameters()
            if name in self._noted
        )


def keeps_features(edit: Callable[P, None]) -> Callable[P, None]:
    """Makes a method of a model an edit that leaves the features their name."""

    @wraps(edit)
    def edited(*args: P.args, **kwargs: P.kwargs) -> None:
        model: Any = args[0]
        was_trained = model._was_trained()
        edit(*args, **kwargs)
        if not was_trained:
            model.note_features()

    return edited


def name_features_of(model: Any) -> str | None:
    """Returns the name of a model's features. Features that a training has changed since the last save get a new one.

    Returns:
        The name; `None` for a model whose own code is of an earlier version, or whose weights are not in memory.
    """
    if not hasattr(model, "name_features"):
        return None
    if model.config.features_digest is None or model._was_trained():
        model.name_features(digest_of_model(model))
    return model.config.features_digest


__all__ = ["FeaturesDigest", "keeps_features", "name_features_of"]
