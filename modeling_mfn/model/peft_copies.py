"""What PEFT's `modules_to_save` makes of an MFN layer: a copy that follows its model, and takes alpha and k along."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_mfn import MFNConfig, check_alpha, check_k

SETTINGS = "_extra_state"
"""torch's own name for what is saved beside a module's weights: sharded state dicts look for no tensor of the module
behind it."""


class AdapterCopy(nn.Module):
    """Of an MFN layer. In a model's own state dict there is nothing of alpha and k, which are in its config; but a
    folder of PEFT's holds weights alone."""

    config: MFNConfig

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterCopy:
        if not memo:  # this layer alone and not its model, whose config it goes on to read
            memo[id(self.config)] = self.config
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # PEFT asks the layer by itself which names it has, and the model for their values
        if not prefix or ".modules_to_save." in prefix:
            text = json.dumps({"alpha": self.config.alpha, "k": self.config.k})
            # as bytes, which no cast rounds and every device can hold
            destination[prefix + SETTINGS] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        settings = state_dict.pop(prefix + SETTINGS, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if settings is not None:
            given = json.loads(bytes(settings.tolist()))
            check_k(given["k"], self.config.num_features, self.config.most_removed)
            self.config.alpha, self.config.k = check_alpha(given["alpha"]), given["k"]


__all__ = ["AdapterCopy"]
