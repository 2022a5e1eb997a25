"""Copies of an MFN layer that PEFT's `modules_to_save` makes: each has an alpha and a k of its own, and saves them."""

from __future__ import annotations

import copy
import json
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .configuration_mfn import MFNConfig
from .setting_checks import check_alpha, check_k

SETTINGS = "_extra_state"
"""State-dict key of alpha and k. It is torch's own name for extra state, so sharded state dicts do not look for a
tensor of the module behind it."""


class Settings(NamedTuple):
    """Alpha and k, which an adapter brings with its MFN layers."""

    alpha: float
    k: int


class AdapterCopy(nn.Module):
    """Base class of the MFN layer that lets PEFT copy and save it.

    A model keeps alpha and k in its config, not in its state dict. PEFT copies a layer for each adapter, keeps the
    original for the model without adapters, and calls one of them. So from then on each of them has its own alpha and
    k. A PEFT folder has no config of the model, so a copied layer saves both among its weights.

    `merge_and_unload` keeps the copy. `unload` brings the original back: PEFT asks a copied layer for that as it asks
    its own layers, by `merge`, `base_layer` and `get_base_layer`.
    """

    config: MFNConfig
    own: Settings | None = None
    """Alpha and k of this layer; `None` where those of the config hold."""
    any_own: ClassVar[bool] = False
    """True once any layer of this process has its own."""

    def __init__(self) -> None:
        super().__init__()
        self._original: list[AdapterCopy] = []
        """Layer that this one was copied from. In a list, as it is no part of this layer."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; `ValueError` for an adapter around encoder or decoder, which would be passed by."""
        replaced = self.__dict__.get("_modules", {}).get(name)
        if replaced is not None and isinstance(value, nn.Module) and type(value) is not type(replaced):
            raise ValueError(
                f"the {name} of an MFN layer cannot have a {type(value).__name__}: its weights are read without its "
                'forward, and directions need unit norm. Train MFN layers as a whole, with modules_to_save=["mfn"]'
            )
        super().__setattr__(name, value)

    @property
    def alpha(self) -> float:
        """Blend of eq. 3."""
        return self.config.alpha if self.own is None else self.own.alpha

    @property
    def k(self) -> int:
        """K of eq. 1."""
        return self.config.k if self.own is None else self.own.k

    def take(self, alpha: float, k: int) -> None:
        """Gives the layer its own alpha and k."""
        self.own = Settings(alpha, k)
        AdapterCopy.any_own = True

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterCopy:
        alone = not memo
        if alone:  # without its model: the copy goes on reading the model's config
            memo[id(self.config)] = self.config
            self.take(self.alpha, self.k)
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        if alone:
            copied._original = [self]
        return copied

    @property
    def base_layer(self) -> AdapterCopy:
        """Layer that this one was copied from."""
        if not self._original:
            raise AttributeError("base_layer")
        return self._original[0]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts this layer in the place of the one that it was copied from."""
        self._original = []

    def get_base_layer(self) -> AdapterCopy:
        """Returns the layer that stays when PEFT unloads its adapters."""
        return self._original[0] if self._original else self

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # PEFT asks the layer alone for its names, and the model for their values
        if not prefix or ".modules_to_save." in prefix:
            text = json.dumps({"alpha": self.alpha, "k": self.k})
            # bytes: no cast rounds them, and every device can hold them
            destination[prefix + SETTINGS] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Sets alpha and k that an adapter brings."""
        try:
            given = json.loads(bytes(state.to(torch.uint8).tolist()))
            alpha, k = given["alpha"], given["k"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"alpha and k of the adapter are damaged: {error!r}") from error
        check_k(k, self.config.num_features, self.config.most_removed)
        self.take(check_alpha(alpha), k)
        self.was_trained = True  # the adapter's features are not the model's
        self.config.alpha, self.config.k = self.alpha, self.k

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *further: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *further)
        if prefix + SETTINGS in missing_keys:  # a model has them in its config
            missing_keys.remove(prefix + SETTINGS)


def show_settings(config: MFNConfig, layers: list[Any]) -> None:
    """Makes a model's config show alpha and k of the layers in force.

    Args:
        config: config of the model.
        layers: its MFN layers, or PEFT's wrappers around them, which pass attributes on to the layer in force.
    """
    for layer in layers:
        if layer.own is not None:
            config.alpha, config.k = layer.own
            if isinstance(layer, AdapterCopy):  # no adapter wraps it any longer
                layer.own = None


__all__ = ["AdapterCopy", "show_settings"]
