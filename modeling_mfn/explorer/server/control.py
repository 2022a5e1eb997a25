"""Random features to compare with: as frequent as a given one, and otherwise unrelated."""

from __future__ import annotations

import random

import numpy as np

from ...features.atlas import FeatureAtlas
from ...model.configuration_mfn import MFNConfig
from ...model.feature_names import format_feature, parse_feature

CANDIDATES = 20
"""Features with the nearest firing rates, among which chance decides."""


def control_feature(atlas: FeatureAtlas, config: MFNConfig, feature: str, seed: int) -> dict[str, str | float]:
    """Chooses another feature of the same layer with a nearly equal firing rate.

    Args:
        atlas: Atlas with the firing rates.
        config: Config of the model. Its pruned features are left out.
        feature: Name of a feature, `L6/1234`.
        seed: Number that decides; the same number chooses the same feature.

    Raises:
        ValueError: If there is no such feature, it never fires, or no other feature of its layer does.
    """
    rate = atlas.row(feature)["firing_rate"]
    if not rate:
        raise ValueError(f"{feature} never fires in the atlas, so no feature fires equally often")
    layer, index = parse_feature(feature)
    columns = [atlas.features[name].to_numpy() for name in ("layer", "index", "firing_rate")]
    layers, indices, rates = columns
    pruned = list(config.pruned_features.get(str(layer), ()))
    others = np.flatnonzero((layers == layer) & (rates > 0) & (indices != index) & ~np.isin(indices, pruned))
    if not len(others):
        raise ValueError(f"no other feature of layer {layer} fires in the atlas")
    distances = np.abs(np.log(rates[others] / rate))
    nearest = others[np.argsort(distances, kind="stable")[:CANDIDATES]]
    chosen = random.Random(f"{feature} {seed}").choice(nearest.tolist())
    return {"feature": format_feature(layer, int(indices[chosen])), "firing_rate": float(rates[chosen])}


__all__ = ["control_feature"]
