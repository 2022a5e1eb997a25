"""Loss of named features: a supervised term, which is not in the paper.

A named feature learns to fire on the tokens that the data marks with its concept, and on no others. Such features mean
their concepts by construction. What they tell about these concepts says nothing about features that were found without
labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.configuration_mfn import MFNConfig
from ..model.mfn_layer import MFNLayer
from ..model.mfn_pass import Reconstruction

CONCEPTS = "concepts"
"""Column of the data with each token's concept, (T,): its place in `named_features`, or -1 for none."""


class NamedFeatures:
    """Features that have a concept from the start.

    Args:
        names: feature of each concept, such as `["L2/0", "L2/1"]`.
        config: of the model.

    Raises:
        ValueError: if a feature does not exist, is pruned, or has two concepts.
    """

    def __init__(self, names: Sequence[str], config: MFNConfig) -> None:
        self.number = len(names)
        features = [config.check_feature(name) for name in names]
        if twice := [name for name, feature in zip(names, features, strict=True) if features.count(feature) > 1]:
            raise ValueError(f"named_features has {twice[0]} more than once; give each concept a feature of its own")
        self._of_layer = {
            layer: [(index, concept) for concept, (of, index) in enumerate(features) if of == layer]
            for layer in config.layers
        }

    def concepts_in(self, batch: Mapping[str, Any]) -> Tensor:
        """Returns the concepts (B, T) of a batch.

        Raises:
            ValueError: if the batch has none, or one that no feature has.
        """
        if batch.get(CONCEPTS) is None:
            raise ValueError(f"the data has no column {CONCEPTS!r}, which lambda_named needs; its columns: {[*batch]}")
        concepts: Tensor = batch[CONCEPTS]
        low, high = (int(end) for end in concepts.aminmax())
        if low < -1 or high >= self.number:
            wrong = low if low < -1 else high
            raise ValueError(f"{CONCEPTS} has {wrong}; concepts are 0 to {self.number - 1}, and -1 for none")
        return concepts

    def loss(self, layer: MFNLayer, item: Reconstruction, concepts: Tensor, mask: Tensor) -> Tensor:
        """Computes the loss of one layer's named features; 0 without any.

        With a the pre-activation of a feature and t the least active value of a token, the loss of a feature is the
        mean of

            log(1 + e^(t - a)) over tokens of its concept,   log(1 + e^a) over all other tokens,

        in equal parts, and the layer's loss is the mean over its named features. A feature whose concept is not in the
        batch has the second part alone.

        Args:
            layer: MFN layer.
            item: its reconstruction.
            concepts: (B, T), see [`CONCEPTS`].
            mask: (B, T), nonzero where a token counts.
        """
        own, h = self._of_layer[layer.layer_index], item.residual
        if not own:
            return h.new_zeros((), dtype=torch.float32)
        features, numbers = torch.tensor(own, device=h.device).T
        weights = layer.rows_of(features)
        x = layer.standardise(h).x
        active = F.linear(x, weights.encoder.values, weights.encoder_bias.values).float()  # (B, T, R)
        threshold = item.code.values.detach().float().amin(-1, keepdim=True).relu()
        counted = mask.to(h.device).bool().unsqueeze(-1)
        wanted = concepts.to(h.device).unsqueeze(-1) == numbers
        losses = [
            (F.softplus(per_token) * chosen).sum((0, 1)) / chosen.sum((0, 1)).clamp_min(1)
            for per_token, chosen in ((threshold - active, counted & wanted), (active, counted & ~wanted))
        ]
        return (sum(losses) / 2).mean()


__all__ = ["CONCEPTS", "NamedFeatures"]
