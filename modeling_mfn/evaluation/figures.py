"""Figure of a prediction's result: curves first, then one panel per measure with the interval of each subject."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..utils.extras import needs
from .result import PredictionResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
PANEL_WIDTH, CURVE_HEIGHT, PANEL_HEIGHT, SUBJECT_HEIGHT, TITLE_HEIGHT = 4.2, 3.2, 0.9, 0.28, 0.8
"""Sizes in inches. A panel grows with each subject."""
COLOURS = ("#b2182b", "#2166ac", "#4d4d4d", "#e08214", "#1b7837", "#762a83", "#8c510a")


class Curve(NamedTuple):
    """Panel with one curve per subject, from the details of a result."""

    title: str
    across: str
    """Label of the horizontal axis."""
    detail: str
    """Name among the details."""
    points: Callable[[Any], Mapping[float, Any]]
    """Maps the details of a subject to x -> y, where y is a number or an estimate."""
    scale: str = "linear"
    """Scale of the vertical axis."""


def _by_number(values: Mapping[Any, Any]) -> dict[float, Any]:
    return {float(x): y for x, y in values.items()}  # keys in JSON are strings


def _by_share(values: list[float]) -> dict[float, float]:
    return dict(zip(np.linspace(0, 1, len(values)), values, strict=True))


def _by_strength(name: str) -> Callable[[Any], dict[float, Any]]:
    return lambda strengths: {x: of[name] for x, of in _by_number(strengths).items() if name in of}


CURVES = {
    "P1": [Curve("firing rate", "share of features that fire less often", "rate_quantiles", _by_share, "log")],
    "P3": [Curve("share of features that are matched", "with a correlation of at least", "share_above", _by_number)],
    "P4": [
        Curve(name, "activation, as a multiple of what it was", "by_strength", _by_strength(name))
        for name in ("correlation of logits", "KL", "unpredicted tokens")
    ],
}
"""Prediction -> its curves, at most `COLUMNS`."""


def draw(result: PredictionResult) -> Figure:
    """Draws the result. The panel of the measure that decided comes first.

    Raises:
        MissingExtra: if matplotlib is not installed.
    """
    with needs("evaluate"):
        from matplotlib.figure import Figure
    found = {name for own in result.figures.values() for name in own}
    names = sorted(found, key=lambda name: (name != result.headline, name))
    curves = [curve for curve in CURVES.get(result.prediction, []) if curve.detail in result.details]
    rows = max(1, -(-len(names) // COLUMNS))
    heights = [CURVE_HEIGHT] * bool(curves) + [PANEL_HEIGHT + SUBJECT_HEIGHT * len(result.figures)] * rows
    figure = Figure(figsize=(PANEL_WIDTH * COLUMNS, TITLE_HEIGHT + sum(heights)), layout="constrained")
    figure.suptitle(f"{result.prediction}: {result.claim} ({result.outcome})", parse_math=False, wrap=True)
    panels = list(figure.subplots(len(heights), COLUMNS, squeeze=False, height_ratios=heights).flat)
    if curves:
        above, panels = panels[:COLUMNS], panels[COLUMNS:]
        for axes, curve in zip(above, curves, strict=False):
            _draw_curve(axes, result, curve)
        _hide(above[len(curves) :])
        figure.legend(*above[0].get_legend_handles_labels(), loc="outside lower center", ncols=COLUMNS)
    for name, axes in zip(names, panels, strict=False):
        _draw_panel(axes, result, name)
    _hide(panels[len(names) :])
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
    """Value of a number, of an estimate, or of an estimate as JSON has it, where null stands for NaN."""
    value = y["value"] if isinstance(y, Mapping) else y[0] if isinstance(y, tuple) else y
    return float("nan") if value is None else float(value)


def _draw_panel(axes: Axes, result: PredictionResult, name: str) -> None:
    for place, (estimates, colour) in enumerate(zip(result.figures.values(), _colours(result), strict=True)):
        if name not in estimates or not np.isfinite(estimates[name].value):
            continue
        value, low, high = estimates[name]
        axes.plot(value, place, "o", color=colour)
        if np.isfinite([low, high]).all():
            axes.plot([low, high], [place, place], "-", color=colour)
    axes.set_yticks(range(len(result.figures)), list(result.figures), parse_math=False)
    axes.set_ylim(len(result.figures) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.4)
    bold = "bold" if name == result.headline else "normal"
    axes.set_title(name.replace("_", " "), fontsize="medium", fontweight=bold, parse_math=False)


def _hide(panels: Iterable[Axes]) -> None:
    for axes in panels:
        axes.set_axis_off()


def _colours(result: PredictionResult) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(len(result.figures))]


__all__ = ["draw"]
