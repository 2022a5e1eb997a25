"""Copies of an MFN layer that PEFT's `modules_to_save` makes: they follow their model and save its alpha and k."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_mfn import MFNConfig, check_alpha, check_k

SETTINGS = "_extra_state"
"""State-dict key of alpha and k. It is torch's own name for extra state, so sharded state dicts do not look for a
tensor of the module behind it."""


class AdapterCopy(nn.Module):
    """Base class of the MFN layer that lets PEFT copy and save it.

    A model keeps alpha and k in its config, not in its state dict. A PEFT folder has no such config, so the copied
    layer saves both among its weights, and loading sets them in the model's config.
    """

    config: MFNConfig

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterCopy:
        if not memo:  # the layer alone is copied, not its model: the copy goes on reading the model's config
            memo[id(self.config)] = self.config
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # PEFT asks the layer alone for its names, and the model for their values
        if not prefix or ".modules_to_save." in prefix:
            text = json.dumps({"alpha": self.config.alpha, "k": self.config.k})
            # bytes: no cast rounds them, and every device can hold them
            destination[prefix + SETTINGS] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        settings = state_dict.pop(prefix + SETTINGS, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if settings is not None:
            given = json.loads(bytes(settings.tolist()))
            check_k(given["k"], self.config.num_features, self.config.most_removed)
            self.config.alpha, self.config.k = check_alpha(given["alpha"]), given["k"]


__all__ = ["AdapterCopy"]
