"""Files of results: one JSON file and one figure per prediction, and a Markdown report of all predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..utils.display import markdown_table
from ..utils.files import read_json, write_whole
from ..utils.readers import ShapeT
from .figures import draw
from .intervals import Estimate
from .result import MFN, Estimates, PredictionResult, plain

REPORT, FIGURES, FURTHER = "report.md", "figures", "further.json"

Measures = dict[str, dict[str, dict[str, Estimate]]]
"""Title of a table -> subject -> name -> estimate, for what is measured next to the predictions."""


def save_result(result: PredictionResult, settings: Mapping[str, Any], folder: Path) -> None:
    """Writes `<prediction>.json`, the result with its settings, and then its figure as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": dict(settings), **result.to_json()}
    _figure_file(result.prediction, folder).unlink(missing_ok=True)
    # the measurement is written before its figure, so that an error in drawing does not lose it
    write_whole(folder / f"{result.prediction}.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    complete_figure(result, folder)


def complete_figure(result: PredictionResult, folder: Path) -> None:
    """Draws the figure if there is no file of it, as after an interrupted run."""
    file = _figure_file(result.prediction, folder)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn = BytesIO()
        draw(result).savefig(drawn, format="svg", metadata={"Date": None})
        write_whole(file, drawn.getvalue())


def _figure_file(prediction: str, folder: Path) -> Path:
    return folder / FIGURES / f"{prediction}.svg"


def load_result(prediction: str, settings: Mapping[str, Any], folder: Path) -> PredictionResult | None:
    """Returns the result that `save_result` wrote, or `None` if there is none or other settings made it."""
    return _read(folder / f"{prediction}.json", settings, PredictionResult)


@dataclass
class _Settings:
    """Part of every file of results."""

    settings: dict[str, Any]


@dataclass
class _Further:
    """Content of `further.json`, next to its settings."""

    measures: Measures


def _read(file: Path, settings: Mapping[str, Any], shape: type[ShapeT]) -> ShapeT | None:
    """Reads a file of results; None if there is none, or if other settings made it."""
    made_with = read_json(file, _Settings)
    if made_with is None or made_with.settings != json.loads(json.dumps(dict(settings))):
        return None
    return read_json(file, shape)


def save_further(measures: Measures, settings: Mapping[str, Any], folder: Path) -> None:
    """Writes `further.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": dict(settings), "measures": plain(measures)}
    write_whole(folder / FURTHER, json.dumps(record, indent=2, allow_nan=False) + "\n")


def load_further(settings: Mapping[str, Any], folder: Path) -> Measures | None:
    """Returns the measures that `save_further` wrote, or `None` if there are none or other settings made them."""
    found = _read(folder / FURTHER, settings, _Further)
    return None if found is None else found.measures


def write_report(
    results: Sequence[PredictionResult], further: Measures | None, settings: Mapping[str, Any], folder: Path
) -> Path:
    """Writes `report.md`: settings, outcomes, the estimates of each prediction by subject, and further measures.

    Returns:
        The file.
    """
    parts = ["# The paper's five predictions", _settings(settings), verdicts(results)]
    for result in results:
        parts += [f"## {result.prediction}: {result.claim}", f"**{result.outcome}.** {result.reason}"]
        paper = result.paper_criterion
        parts += [f"Criterion: {result.criterion}", f"The paper's own: {paper.criterion} **{paper}**."]
        if result.figures:
            parts += [_table(result.figures), f"![{result.prediction}]({FIGURES}/{result.prediction}.svg)"]
    for title, estimates in (further or {}).items():
        parts += [f"## {title}", _table(estimates)]
    file = folder / REPORT
    write_whole(file, "\n\n".join(parts) + "\n")
    return file


def verdicts(results: Sequence[PredictionResult], subject: str = MFN) -> str:
    """Returns a Markdown table of outcomes.

    Each row has the estimate that decided, the baseline's, and the paper's own criterion.
    """
    rows = []
    for result in results:
        name, ours, theirs = deciding(result, subject)
        headline = f"{name}: {ours}" if ours else ""
        claim = f"**{result.prediction}** {result.claim}"
        rows.append([claim, result.outcome, headline, theirs, str(result.paper_criterion)])
    return markdown_table(
        ["prediction", "outcome", "figure that decided [95 %]", "baseline", "the paper's own criterion"], rows
    )


def verdict_table(results: Sequence[PredictionResult]) -> Table:
    """Returns a table of outcomes for the terminal: the reason of each, and the paper's own criterion."""
    table = Table("prediction", "outcome", "because", "the paper's own criterion", show_lines=True)
    for result in results:
        claim, reason, paper = f"{result.prediction} {result.claim}", result.reason, str(result.paper_criterion)
        table.add_row(Text(claim), result.outcome, Text(reason), Text(paper))
    return table


def deciding(result: PredictionResult, subject: str = MFN) -> tuple[str, str, str]:
    """Returns the measure that decided, its estimate for a subject, and its estimate for the baseline.

    An estimate that does not exist is an empty string.
    """
    ours, theirs = (result.figures.get(name, {}).get(result.headline) for name in (subject, result.baseline))
    against = "" if theirs is None else f"{result.baseline}: {theirs}"
    return result.headline.replace("_", " "), "" if ours is None else str(ours), against


def _table(estimates: Estimates) -> str:
    names = list(dict.fromkeys(name for own in estimates.values() for name in own))
    rows = [[name.replace("_", " "), *(_cell(own.get(name)) for own in estimates.values())] for name in names]
    return markdown_table(["", *estimates], rows)


def _cell(estimate: Estimate | None) -> str:
    return "" if estimate is None else "-" if math.isnan(estimate.value) else str(estimate)


def _settings(settings: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: {_text(value)}" for name, value in settings.items())


def _text(value: Any) -> str:
    return f"`{json.dumps(value)}`" if isinstance(value, dict | list) else f"`{value}`"


__all__ = [
    "Measures",
    "complete_figure",
    "deciding",
    "load_further",
    "load_result",
    "save_further",
    "save_result",
    "verdict_table",
    "verdicts",
    "write_report",
]
