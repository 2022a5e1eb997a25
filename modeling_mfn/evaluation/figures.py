"""A prediction's result as a figure: its curves, and each measured figure with its interval, subject by subject."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .result import PredictionResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
COLOURS = ("#b2182b", "#2166ac", "#4d4d4d", "#e08214", "#1b7837", "#762a83", "#8c510a")


class Curve(NamedTuple):
    """A curve for each subject that a result's details have."""

    title: str
    across: str
    """What goes to the right."""
    detail: str
    points: Callable[[Any], Mapping[float, Any]]
    """What the details have of a subject -> x -> y, a number or a figure."""
    scale: str = "linear"
    """Of y."""


def _by_number(values: Mapping[Any, Any]) -> dict[float, Any]:
    return {float(x): y for x, y in values.items()}  # JSON's keys are strings


def _by_share(values: list[float]) -> dict[float, float]:
    return dict(zip(np.linspace(0, 1, len(values)), values, strict=True))


def _of_strengths(name: str) -> Callable[[Any], dict[float, Any]]:
    return lambda strengths: {x: of[name] for x, of in _by_number(strengths).items() if name in of}


STRENGTH = "activation, as a multiple of what it was"
CURVES = {
    "P1": [Curve("firing rate", "share of features that fire less often", "rate_quantiles", _by_share, "log")],
    "P3": [Curve("share of features that are matched", "with a correlation of at least", "share_above", _by_number)],
    "P4": [
        Curve(name, STRENGTH, "by_strength", _of_strengths(name))
        for name in ("correlation of logits", "KL", "unpredicted tokens")
    ],
}


def draw(result: PredictionResult) -> Figure:
    """Curves first, then a panel for each figure, a line a subject, the one that decided first; on no backend of its
    own."""
    from matplotlib.figure import Figure

    found = {name for figures in result.figures.values() for name in figures}
    names = sorted(found, key=lambda name: (name != result.headline, name))
    curves = [curve for curve in CURVES.get(result.prediction, []) if curve.detail in result.details]
    rows = max(1, -(-len(names) // COLUMNS))
    heights = [3.2] * bool(curves) + [0.9 + 0.28 * len(result.figures)] * rows
    figure = Figure(figsize=(4.2 * COLUMNS, 0.8 + sum(heights)), layout="constrained")
    figure.suptitle(f"{result.prediction}: {result.claim} ({result.outcome})", parse_math=False, wrap=True)
    panels = list(figure.subplots(len(heights), COLUMNS, squeeze=False, height_ratios=heights).flat)
    if curves:
        above, panels = panels[:COLUMNS], panels[COLUMNS:]
        for axes, curve in zip(above, curves, strict=False):
            _draw_curve(axes, result, curve)
        for axes in above[len(curves) :]:
            axes.set_axis_off()
        figure.legend(*above[0].get_legend_handles_labels(), loc="outside lower center", ncols=COLUMNS)
    for name, axes in zip(names, panels, strict=False):
        _draw_panel(axes, result, name)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    return figure


def _draw_curve(axes: Axes, result: PredictionResult, curve: Curve) -> None:
    for subject, colour in zip(result.figures, _colours(result), strict=True):
        points = sorted(curve.points(result.details[curve.detail].get(subject, {})).items())
        values = [_value(y) for _, y in points]
        if np.isfinite(values).any():
            axes.plot([x for x, _ in points], values, ".-", color=colour, label=subject)
    axes.set_title(curve.title, fontsize="medium", parse_math=False)
    axes.set_xlabel(curve.across, fontsize="small", parse_math=False)
    axes.grid(linewidth=0.4)
    axes.set_yscale(curve.scale)


def _value(y: Any) -> float:
    """Of a number, or of a figure as it is or as JSON has it, where null stands for NaN."""
    value = y["value"] if isinstance(y, Mapping) else y[0] if isinstance(y, tuple) else y
    return float("nan") if value is None else float(value)


def _draw_panel(axes: Axes, result: PredictionResult, name: str) -> None:
    for place, (figures, colour) in enumerate(zip(result.figures.values(), _colours(result), strict=True)):
        if name not in figures or not np.isfinite(figures[name].value):
            continue
        value, low, high = figures[name]
        axes.plot(value, place, "o", color=colour)
        if np.isfinite([low, high]).all():
            axes.plot([low, high], [place, place], "-", color=colour)
    axes.set_yticks(range(len(result.figures)), list(result.figures), parse_math=False)
    axes.set_ylim(len(result.figures) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.4)
    bold = "bold" if name == result.headline else "normal"
    axes.set_title(name.replace("_", " "), fontsize="medium", fontweight=bold, parse_math=False)


def _colours(result: PredictionResult) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(len(result.figures))]


__all__ = ["draw"]
