"""Results of predictions as files: one JSON each, figures, and a Markdown report of all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from ..utils.display import markdown_table
from ..utils.files import write_whole
from .figures import draw
from .intervals import Estimate
from .result import PredictionResult, estimates_of, plain

REPORT, FIGURES, FURTHER = "report.md", "figures", "further.json"
FORMATS = ("png", "svg")

Measures = dict[str, dict[str, dict[str, Estimate]]]
"""Title -> subject -> name -> figure: what is measured beside the predictions."""


def save_result(result: PredictionResult, settings: Mapping[str, Any], folder: Path) -> None:
    """Writes `<prediction>.json`, the result with the settings that made it, and its figures as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": dict(settings), **result.to_json()}
    for file in _figure_files(result.prediction, folder):
        file.unlink(missing_ok=True)
    # before its figures: whatever fails in drawing must not cost the measurement
    write_whole(folder / f"{result.prediction}.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    complete_figures(result, folder)


def complete_figures(result: PredictionResult, folder: Path) -> None:
    """Draws what there is no file of, after a run that ended in between."""
    if missing := [file for file in _figure_files(result.prediction, folder) if not file.exists()]:
        (folder / FIGURES).mkdir(parents=True, exist_ok=True)
        figure = draw(result)
        for file in missing:
            drawn = BytesIO()
            figure.savefig(drawn, format=file.suffix[1:], dpi=120)
            write_whole(file, drawn.getvalue())


def _figure_files(prediction: str, folder: Path) -> list[Path]:
    return [folder / FIGURES / f"{prediction}.{ending}" for ending in FORMATS]


def load_result(prediction: str, settings: Mapping[str, Any], folder: Path) -> PredictionResult | None:
    """The result that `save_result` wrote; `None` if there is none, or if other settings made it."""
    record = _read(folder / f"{prediction}.json", settings)
    return None if record is None else PredictionResult.from_json(record)


def _read(file: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    if not file.exists():
        return None
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record if record.pop("settings") == json.loads(json.dumps(dict(settings))) else None


def save_further(measures: Measures, settings: Mapping[str, Any], folder: Path) -> None:
    """Writes `further.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": dict(settings), "measures": plain(measures)}
    write_whole(folder / FURTHER, json.dumps(record, indent=2, allow_nan=False) + "\n")


def load_further(settings: Mapping[str, Any], folder: Path) -> Measures | None:
    """What `save_further` wrote with the same settings, if it did."""
    record = _read(folder / FURTHER, settings)
    return None if record is None else {title: estimates_of(of) for title, of in record["measures"].items()}


def write_report(
    results: Sequence[PredictionResult], further: Measures | None, settings: Mapping[str, Any], folder: Path
) -> Path:
    """Writes `report.md`, which this returns: the verdicts, each prediction's figures by subject, further measures if
    there are any."""
    parts = ["# The paper's five predictions", _settings(settings), verdicts(results)]
    for result in results:
        parts += [f"## {result.prediction}: {result.claim}", f"**{result.outcome}.** {result.reason}"]
        paper = result.paper_criterion
        parts += [f"Criterion: {result.criterion}", f"The paper's own: {paper.criterion} **{paper}**."]
        if result.figures:
            parts += [_table(result.figures), f"![{result.prediction}]({FIGURES}/{result.prediction}.png)"]
    for title, figures in (further or {}).items():
        parts += [f"## {title}", _table(figures)]
    file = folder / REPORT
    write_whole(file, "\n\n".join(parts) + "\n")
    return file


def verdicts(results: Sequence[PredictionResult], subject: str = "MFN") -> str:
    """The table of verdicts in Markdown: of each prediction what was found, the figure that decided with its interval,
    the baseline's, and whether the paper's own criterion is met."""
    rows = []
    for result in results:
        figure, own, against = deciding(result, subject)
        headline = f"{figure}: {own}" if own else ""
        rows.append(
            [f"**{result.prediction}** {result.claim}", result.outcome, headline, against, str(result.paper_criterion)]
        )
    return markdown_table(
        ["prediction", "outcome", "figure that decided [95 %]", "baseline", "the paper's own criterion"], rows
    )


def deciding(result: PredictionResult, subject: str = "MFN") -> tuple[str, str, str]:
    """The name of the figure that decided, what it is of a subject with its interval, and what of the baseline; empty
    where there is none."""
    own, baseline = (result.figures.get(name, {}).get(result.headline) for name in (subject, result.baseline))
    against = "" if baseline is None else f"{result.baseline}: {baseline}"
    return result.headline.replace("_", " "), "" if own is None else str(own), against


def _table(figures: Mapping[str, Mapping[str, Estimate]]) -> str:
    names = list(dict.fromkeys(name for of in figures.values() for name in of))
    rows = [[name.replace("_", " "), *(_cell(of.get(name)) for of in figures.values())] for name in names]
    return markdown_table(["", *figures], rows)


def _cell(figure: Estimate | None) -> str:
    return "" if figure is None else "-" if math.isnan(figure.value) else str(figure)


def _settings(settings: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: {_text(value)}" for name, value in settings.items())


def _text(value: Any) -> str:
    return f"`{json.dumps(value)}`" if isinstance(value, dict | list) else f"`{value}`"


__all__ = [
    "Measures",
    "complete_figures",
    "deciding",
    "load_further",
    "load_result",
    "save_further",
    "save_result",
    "verdicts",
    "write_report",
]
