"""An explanation as tables for the terminal. Text of prompts, atlases and labels is shown, never rendered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ...utils.display import visible, visible_token
from .explanation import Explanation
from .records import FeatureAttribution, Target

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


DRIVERS = 3
"""Tokens shown beside a feature, of those that raised it."""


def explanation_tables(explanation: Explanation) -> Group:
    """What is predicted, each layer's account, the strongest features of all layers, and where these come from."""
    read = "".join(visible(token, 24) for token in explanation.tokens[-12:])
    lines = [f"after: {read}", f"predicted: {describe(explanation.target)}"]
    correlation = explanation.ablation_correlation
    if correlation is not None:
        checked = sum(feature.ablation is not None for feature in explanation.features)
        lines.append(f"attribution and measured ablation of {checked} features: r = {correlation:.2f}")
    shown = [feature for feature in explanation.features if feature.ablation is not None or feature.inputs is not None]
    tables = _layers(explanation), _features(shown, explanation.tokens), _origins(shown, explanation.tokens)
    return Group(*map(Text, lines), *tables)


def describe(target: Target) -> str:
    """Such as `"␣queen", logit 3.20 above the mean, probability 0.41`."""
    contrast = {
        None: f"logit {target.value:.2f}",
        "mean": f"logit {target.value:.2f} above the mean",
        "token": f"logit {target.value:.2f} above that of {visible_token(target.against_token or '')}",
    }[target.against]
    return f"{visible_token(target.token)}, {contrast}, probability {target.probability:.2g}"


def _layers(explanation: Explanation) -> Table:
    table = Table("layer", "active", "features", "baseline", "remainder", "listed features", "others")
    for layer in explanation.layers:
        table.add_row(
            f"L{layer.layer}",
            str(layer.active),
            *(f"{number:+.3f}" for number in (layer.attribution, layer.baseline, layer.remainder)),
            f"{layer.attribution - layer.others:+.3f}",
            f"{layer.others:+.3f}",
        )
    table.caption = "features + baseline + remainder = the value, in each layer by itself"
    return table


def _features(features: list[FeatureAttribution], tokens: list[str]) -> Table:
    table = Table()
    for name in ("feature", "attribution", "ablation", "on", "activation"):
        table.add_column(name, no_wrap=True)
    with_label = any(feature.atlas and feature.atlas.label for feature in features)
    if with_label:
        table.add_column("label")
    for feature in features:
        label = feature.atlas and feature.atlas.label
        table.add_row(
            feature.name,
            f"{feature.attribution:+.3f}",
            "" if feature.ablation is None else f"{feature.ablation:+.3f}",
            Text(f"{visible_token(tokens[feature.position])} ({feature.position})"),
            f"{feature.activation:.2f}",
            *([Text(visible(label or "", 40))] if with_label else []),
        )
    return table


def _origins(features: list[FeatureAttribution], tokens: list[str]) -> Table:
    """By itself, since there is no room for it beside the figures on a narrow terminal."""
    with_atlas = any(feature.atlas for feature in features)
    table = Table()
    table.add_column("feature", no_wrap=True)
    table.add_column("raised by")
    if with_atlas:
        table.add_column("fires in")
    for feature in features:
        sources = [Text(_sources(feature))] if with_atlas else []
        table.add_row(feature.name, Text(_raised_by(feature, tokens)), *sources)
    return table


def _raised_by(feature: FeatureAttribution, tokens: list[str]) -> str:
    if feature.inputs is None:
        return ""
    shares = feature.inputs.by_token
    strongest = sorted(range(len(shares)), key=lambda place: -abs(shares[place]))[:DRIVERS]
    return ", ".join(f"{visible_token(tokens[place], 12)} {shares[place]:+.2f}" for place in strongest if shares[place])


def _sources(feature: FeatureAttribution) -> str:
    sources = feature.atlas.sources if feature.atlas else {}
    return ", ".join(f"{visible(source, 24)} {count}" for source, count in list(sources.items())[:DRIVERS])


__all__ = [
    "describe",
    "draw",
    "explanation_tables",
]
