"""A prediction's result as a figure: every measured figure with its interval, subject beside subject."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .result import PredictionResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
COLOURS = ("#b2182b", "#2166ac", "#4d4d4d", "#e08214", "#1b7837", "#762a83", "#8c510a")


def draw(result: PredictionResult) -> Figure:
    """One panel a figure, one line a subject, the one that decided first; on no backend of its own."""
    from matplotlib.figure import Figure

    found = {name for figures in result.figures.values() for name in figures}
    names = sorted(found, key=lambda name: (name != result.headline, name))
    rows = max(1, -(-len(names) // COLUMNS))
    size = (4.2 * COLUMNS, 0.8 + rows * (0.9 + 0.28 * len(result.figures)))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{result.prediction}: {result.claim} ({result.outcome})", parse_math=False, wrap=True)
    panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for name, axes in zip(names, panels, strict=False):
        _draw_panel(axes, result, name)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    return figure


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
