"""An explanation as a figure: where and in which layer features moved the logit, and which did."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..display import visible, visible_token
from .explanation import Explanation
from .tables import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_TOKENS, MOST_FEATURES = 40, 15
"""Columns and bars that can be read. Earlier tokens share one column."""


def draw(explanation: Explanation) -> Figure:
    """The figure, on no backend of its own: it is saved or shown by whoever asked for it. Labels are no mathtext."""
    from matplotlib.figure import Figure

    columns = min(len(explanation.tokens), MOST_TOKENS)
    rows = max(len(explanation.layers), MOST_FEATURES)
    figure = Figure(figsize=(6 + 0.25 * columns, 2.5 + 0.25 * rows), layout="constrained")
    figure.suptitle(describe(explanation.target), parse_math=False)
    heat, bars = figure.subplots(1, 2, width_ratios=[1 + 0.25 * columns, 4])
    _draw_heat(heat, explanation)
    _draw_bars(bars, explanation)
    return figure


def _draw_heat(axes: Axes, explanation: Explanation) -> None:
    values = np.array([layer.by_token for layer in explanation.layers])
    labels = [visible_token(token, 14) for token in explanation.tokens]
    early = values.shape[1] - (MOST_TOKENS - 1)
    if early > 1:
        values = np.concatenate([values[:, :early].sum(1, keepdims=True), values[:, early:]], axis=1)
        labels = [f"({early} earlier)", *labels[early:]]
    bound = np.abs(values).max() or 1.0
    image = axes.imshow(values, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto", origin="lower")
    axes.set_xticks(range(len(labels)), labels, rotation=90, parse_math=False)
    axes.set_yticks(range(len(explanation.layers)), [f"L{layer.layer}" for layer in explanation.layers])
    axes.set_title("attribution of all features, by token")
    axes.figure.colorbar(image, ax=axes, label="logits")


def _draw_bars(axes: Axes, explanation: Explanation) -> None:
    features = explanation.features[:MOST_FEATURES]
    labels = [f"{f.name} {visible(f.atlas.label, 24) if f.atlas and f.atlas.label else ''}".strip() for f in features]
    attributions = [feature.attribution for feature in features]
    axes.barh(range(len(features)), attributions, color=["#b2182b" if a > 0 else "#2166ac" for a in attributions])
    checked = [(f.ablation, place) for place, f in enumerate(features) if f.ablation is not None]
    if checked:
        axes.plot(*zip(*checked, strict=True), "|", color="black", markersize=10, label="measured by ablation")
        axes.legend(loc="lower right", fontsize="small")
    axes.set_yticks(range(len(features)), labels, parse_math=False)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_title("strongest features")
    axes.set_xlabel("attribution, in logits")


__all__ = ["draw"]
