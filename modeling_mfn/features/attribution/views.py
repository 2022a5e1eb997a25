"""Views of an explanation: tables for the terminal, and a figure.

Text of prompts, atlases and labels is shown literally. Nothing in it becomes markup or mathtext.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ...utils.display import visible, visible_token
from ...utils.extras import needs
from .records import FeatureAttribution, InputAttribution, LayerAttribution, Target

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOKENS_BEFORE = 12
"""Tokens shown before the predicted one."""
DRIVERS = 3
"""Input tokens, and sources, shown per feature."""
MAX_COLUMNS, MAX_BARS = 40, 15
"""Tokens and features that fit into the figure. Earlier tokens share one column."""
RAISES, LOWERS = "#b2182b", "#2166ac"
"""Colours of bars, those at the ends of the colour map RdBu_r."""


def explanation_tables(
    target: Target,
    tokens: Sequence[str],
    layers: Sequence[LayerAttribution],
    features: Sequence[FeatureAttribution],
    ablation_correlation: float | None,
    embeddings: InputAttribution | None = None,
) -> Group:
    """Shows the prediction, each layer's account, the strongest features, and where these features come from.

    Args:
        target: The predicted token and its value.
        tokens: Tokens that were read.
        layers: Account of each layer.
        features: Listed features of all layers, the strongest first.
        ablation_correlation: Correlation between attributions and measured ablations, if it is known.
        embeddings: Account of the value by the tokens' embeddings, if there is one.
    """
    read = "".join(visible(token, 24) for token in tokens[-TOKENS_BEFORE:])
    lines = [f"after: {read}", f"predicted: {describe_target(target)}"]
    if ablation_correlation is not None:
        checked = sum(feature.ablation is not None for feature in features)
        lines.append(f"attribution and measured ablation of {checked} features: r = {ablation_correlation:.2f}")
    shown = [feature for feature in features if feature.ablation is not None or feature.inputs is not None]
    accounts = _account_table(layers, embeddings)
    return Group(*map(Text, lines), accounts, _strongest_table(shown, tokens), _origin_table(shown, tokens))


def draw(
    target: Target,
    tokens: Sequence[str],
    layers: Sequence[LayerAttribution],
    features: Sequence[FeatureAttribution],
) -> Figure:
    """Draws attributions by token and layer, and the strongest features next to their ablations.

    The figure belongs to no backend: the caller saves or shows it. The arguments are those of `explanation_tables`.
    """
    with needs("evaluate"):
        from matplotlib.figure import Figure

    columns, rows = min(len(tokens), MAX_COLUMNS), max(len(layers), MAX_BARS)
    figure = Figure(figsize=(6 + 0.25 * columns, 2.5 + 0.25 * rows), layout="constrained")
    figure.suptitle(describe_target(target), parse_math=False)
    heat, bars = figure.subplots(1, 2, width_ratios=[1 + 0.25 * columns, 4])
    _draw_heat(heat, tokens, layers)
    _draw_bars(bars, features[:MAX_BARS])
    return figure


def describe_target(target: Target) -> str:
    """Describes the prediction in one line, such as `␣queen, logit 3.20 above the mean, probability 0.41`."""
    contrast = {
        None: f"logit {target.value:.2f}",
        "mean": f"logit {target.value:.2f} above the mean",
        "token": f"logit {target.value:.2f} above that of {visible_token(target.against_token or '')}",
    }[target.against]
    return f"{visible_token(target.token)}, {contrast}, probability {target.probability:.2g}"


def _account_table(layers: Sequence[LayerAttribution], embeddings: InputAttribution | None) -> Table:
    table = Table("layer", "active", "features", "baseline", "remainder", "listed features", "others")
    if embeddings is not None:
        numbers = (sum(embeddings.by_token), embeddings.baseline, embeddings.remainder)
        table.add_row("embeddings", str(len(embeddings.by_token)), *(f"{number:+.3f}" for number in numbers), "", "")
    for layer in layers:
        table.add_row(
            f"L{layer.layer}",
            str(layer.active),
            *(f"{number:+.3f}" for number in (layer.attribution, layer.baseline, layer.remainder)),
            f"{layer.attribution - layer.others:+.3f}",
            f"{layer.others:+.3f}",
        )
    table.caption = "features + baseline + remainder = the value, in each layer on its own"
    return table


def _strongest_table(features: Sequence[FeatureAttribution], tokens: Sequence[str]) -> Table:
    table = Table()
    for name in ("feature", "attribution", "ablation", "on", "activation"):
        table.add_column(name, no_wrap=True)
    with_label = any(_label(feature) for feature in features)
    if with_label:
        table.add_column("label")
    for feature in features:
        table.add_row(
            feature.name,
            f"{feature.attribution:+.3f}",
            "" if feature.ablation is None else f"{feature.ablation:+.3f}",
            Text(f"{visible_token(tokens[feature.position])} ({feature.position})"),
            f"{feature.activation:.2f}",
            *([Text(visible(_label(feature), 40))] if with_label else []),
        )
    return table


def _origin_table(features: Sequence[FeatureAttribution], tokens: Sequence[str]) -> Table:
    """Input tokens that raised each feature, and sources in which it fires; a narrow terminal needs a second table."""
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


def _raised_by(feature: FeatureAttribution, tokens: Sequence[str]) -> str:
    if feature.inputs is None:
        return ""
    shares = feature.inputs.by_token
    strongest = sorted(range(len(shares)), key=lambda place: -abs(shares[place]))[:DRIVERS]
    return ", ".join(f"{visible_token(tokens[place], 12)} {shares[place]:+.2f}" for place in strongest if shares[place])


def _sources(feature: FeatureAttribution) -> str:
    sources = feature.atlas.sources if feature.atlas else {}
    return ", ".join(f"{visible(source, 24)} {count}" for source, count in list(sources.items())[:DRIVERS])


def _label(feature: FeatureAttribution) -> str:
    return (feature.atlas.label if feature.atlas else None) or ""


def _draw_heat(axes: Axes, tokens: Sequence[str], layers: Sequence[LayerAttribution]) -> None:
    values = np.array([layer.by_token for layer in layers])
    labels = [visible_token(token, 14) for token in tokens]
    earlier = values.shape[1] - (MAX_COLUMNS - 1)
    if earlier > 1:
        values = np.concatenate([values[:, :earlier].sum(1, keepdims=True), values[:, earlier:]], axis=1)
        labels = [f"({earlier} earlier)", *labels[earlier:]]
    bound = np.abs(values).max() or 1.0
    image = axes.imshow(values, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto", origin="lower")
    axes.set_xticks(range(len(labels)), labels, rotation=90, parse_math=False)
    axes.set_yticks(range(len(layers)), [f"L{layer.layer}" for layer in layers])
    axes.set_title("attribution of all features, by token")
    axes.figure.colorbar(image, ax=axes, label="logits")


def _draw_bars(axes: Axes, features: Sequence[FeatureAttribution]) -> None:
    attributions = [feature.attribution for feature in features]
    axes.barh(range(len(features)), attributions, color=[RAISES if part > 0 else LOWERS for part in attributions])
    checked = [(feature.ablation, place) for place, feature in enumerate(features) if feature.ablation is not None]
    if checked:
        axes.plot(*zip(*checked, strict=True), "|", color="black", markersize=10, label="measured by ablation")
        axes.legend(loc="lower right", fontsize="small")
    labels = [f"{feature.name} {visible(_label(feature), 24)}".strip() for feature in features]
    axes.set_yticks(range(len(features)), labels, parse_math=False)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_title("strongest features")
    axes.set_xlabel("attribution, in logits")


__all__ = ["describe_target", "draw", "explanation_tables"]
