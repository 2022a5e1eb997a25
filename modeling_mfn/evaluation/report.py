"""Results of predictions as files: one JSON each, figures, and a Markdown report of all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..display import markdown_table
from ..whole_files import write_whole
from .figures import draw
from .result import Figure, PredictionResult

REPORT, FIGURES = "report.md", "figures"
FORMATS = ("png", "svg")


def save_result(result: PredictionResult, settings: Mapping[str, Any], folder: Path) -> None:
    """Writes `<prediction>.json`, the result with the settings that made it, and its figures as PNG and SVG."""
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    figure = draw(result)
    for ending in FORMATS:
        figure.savefig(folder / FIGURES / f"{result.prediction}.{ending}", dpi=120)
    record = {"settings": dict(settings), **result.to_json()}
    write_whole(folder / f"{result.prediction}.json", json.dumps(record, indent=2, allow_nan=False) + "\n")


def load_result(prediction: str, settings: Mapping[str, Any], folder: Path) -> PredictionResult | None:
    """The result that `save_result` wrote; `None` if there is none, or if other settings made it."""
    file = folder / f"{prediction}.json"
    if not file.exists():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    if record.pop("settings") != json.loads(json.dumps(dict(settings))):
        return None
    return PredictionResult.from_json(record)


def write_report(results: Sequence[PredictionResult], settings: Mapping[str, Any], folder: Path) -> Path:
    """Writes `report.md`: the verdicts, then each prediction's figures by subject. Returns the file."""
    parts = ["# The paper's five predictions", _settings(settings), verdicts(results)]
    for result in results:
        parts += [f"## {result.prediction}: {result.claim}", f"**{result.outcome}.** {result.reason}"]
        parts += [f"Criterion: {result.criterion}"]
        if result.figures:
            parts += [_figures(result), f"![{result.prediction}]({FIGURES}/{result.prediction}.png)"]
    file = folder / REPORT
    write_whole(file, "\n\n".join(parts) + "\n")
    return file


def verdicts(results: Sequence[PredictionResult], subject: str = "MFN") -> str:
    """The table of verdicts in Markdown: of each prediction what was found, the figure that decided with its interval,
    and the baseline's."""
    rows = []
    for result in results:
        own, baseline = (result.figures.get(name, {}).get(result.headline) for name in (subject, result.baseline))
        against = f"{result.baseline}: {baseline}" if baseline is not None else ""
        headline = f"{result.headline.replace('_', ' ')}: {own}" if own is not None else ""
        rows.append([f"**{result.prediction}** {result.claim}", result.outcome, headline, against])
    return markdown_table(["prediction", "outcome", "figure that decided [95 %]", "baseline"], rows)


def _figures(result: PredictionResult) -> str:
    names = list(dict.fromkeys(name for figures in result.figures.values() for name in figures))
    rows = [
        [name.replace("_", " "), *(_cell(figures.get(name)) for figures in result.figures.values())] for name in names
    ]
    return markdown_table(["", *result.figures], rows)


def _cell(figure: Figure | None) -> str:
    return "" if figure is None else "-" if math.isnan(figure.value) else str(figure)


def _settings(settings: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: {_text(value)}" for name, value in settings.items())


def _text(value: Any) -> str:
    return f"`{json.dumps(value)}`" if isinstance(value, dict | list) else f"`{value}`"


__all__ = ["load_result", "save_result", "verdicts", "write_report"]
