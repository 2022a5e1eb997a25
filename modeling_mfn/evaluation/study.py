"""Study of the five predictions: the evidence that they share, and the measurement of one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm

from ..data.windows import Windows
from ..features.labelling.concepts import Concepts
from .measures.code_stability import code_stability
from .measures.probe_transfer import probes_across
from .measures.tasks import Limits, Task, formatting_tasks, judged, without_task, word_tasks
from .predictions.p1_firing_rates import firing_rate_calibration
from .predictions.p2_probe_purity import probe_purity
from .predictions.p3_seed_alignment import cross_seed_alignment
from .predictions.p4_interventions import intervention_predictability
from .predictions.p5_transfer import Transfer, transfer_gap
from .report import Measures, complete_figure, load_further, load_result, save_further, save_result, write_report
from .result import PredictionResult, Subjects

STABILITY_WINDOWS = 48
"""Approximate number of windows for the stability of codes."""
MAX_TOKENS = 98_304
"""Held-out tokens for firing rates, alignment and transfer. Probes use all: words of a concept are rare."""
SHARED_LIMITS = Limits(tokens=1600, least_tokens=80)
"""Limits of tasks whose tokens several domains share."""


@dataclass(frozen=True)
class Evidence:
    """Models and texts. A prediction that lacks some of them is reported as not measured."""

    subjects: Subjects
    held_out: Mapping[str, Dataset]
    """Domain -> windows of text that no model was trained on."""
    tokenizer: Any
    choosing: Dataset | None = None
    """Windows of other text, on which P3 chooses its matching.

    By default P3 chooses on every second held-out window and is judged on the others.
    """
    groups: Mapping[str, Concepts] = field(default_factory=dict)
    """Name of a group -> its concepts, for the probes of P2. Probes of formatting need none."""
    transfers: Mapping[str, Sequence[Transfer]] = field(default_factory=dict)
    """Subject -> its models that learnt from one domain, for P5."""
    seed: int = 0
    """Seed of samples, probes and bootstraps."""

    @property
    def windows(self) -> Dataset:
        """Held-out windows of all domains, one domain after the other."""
        return concatenate_datasets(list(self.held_out.values()))

    def tasks(self, windows: Windows, limits: Limits | None = None) -> list[Task]:
        """Returns the tasks of words and of formatting in the held-out windows of all domains."""
        domains = [domain for domain, rows in self.held_out.items() for _ in range(len(rows))]
        words = word_tasks(self.groups, windows, self.tokenizer, sources=domains, limits=limits, seed=self.seed)
        formats = formatting_tasks(windows, self.tokenizer, sources=domains, limits=limits, seed=self.seed)
        return words + formats


def spread(windows: Dataset, tokens: int) -> Dataset:
    """Returns windows that lie evenly among all, with at most this number of tokens but at least one window."""
    most = max(1, tokens // len(windows[0]["input_ids"]))
    if len(windows) <= most:
        return windows
    return windows.select(np.linspace(0, len(windows) - 1, most).round().astype(int))


def _p1(evidence: Evidence) -> PredictionResult:
    return firing_rate_calibration(evidence.subjects, spread(evidence.windows, MAX_TOKENS))


def _p2(evidence: Evidence) -> PredictionResult:
    windows = evidence.windows
    tasks = evidence.tasks(windows)
    untested = without_task(evidence.groups, tasks)
    return probe_purity(evidence.subjects, windows, tasks, untested=untested, seed=evidence.seed)


def _p3(evidence: Evidence) -> PredictionResult:
    windows, choosing = evidence.windows, evidence.choosing
    if choosing is None:
        numbers = range(len(windows))
        windows, choosing = windows.select(numbers[::2]), windows.select(numbers[1::2])
    windows = spread(windows, MAX_TOKENS)
    return cross_seed_alignment(evidence.subjects, windows, choosing, seed=evidence.seed)


def _p4(evidence: Evidence) -> PredictionResult:
    return intervention_predictability(evidence.subjects, evidence.windows, seed=evidence.seed)


def _p5(evidence: Evidence) -> PredictionResult:
    probes, tasks, held_out = None, [], evidence.held_out
    if evidence.transfers:
        tasks = evidence.tasks(evidence.windows, SHARED_LIMITS)
        tasks = [task for task, counts in zip(tasks, judged(tasks), strict=True) if counts]
        probes = probes_across(held_out, tasks) if tasks else None
    few = {domain: spread(rows, MAX_TOKENS // len(held_out)) for domain, rows in held_out.items()}
    concepts = [(task.group, task.name) for task in tasks]
    return transfer_gap(evidence.transfers, few, probes=probes, concepts=concepts, seed=evidence.seed)


PREDICTIONS: dict[str, Callable[[Evidence], PredictionResult]] = {
    "P1": _p1, "P2": _p2, "P3": _p3, "P4": _p4, "P5": _p5,
}  # fmt: skip
"""Name of a prediction -> the function that measures it."""


def check_predictions(names: Sequence[str]) -> list[str]:
    """Returns the names in order.

    Raises:
        ValueError: if there is none, or one is not among the five.
    """
    unknown = [name for name in names if name not in PREDICTIONS]
    if unknown or not names:
        raise ValueError(f"predictions are {', '.join(names) or 'none'}; give some of {', '.join(PREDICTIONS)}")
    return [name for name in PREDICTIONS if name in names]


def measure_predictions(
    evidence: Evidence, names: Sequence[str], settings: Mapping[str, Any], folder: Path, commit: str | None = None
) -> list[PredictionResult]:
    """Measures predictions. Writes each result, and the report with it, as soon as it is known.

    A result in the folder that was measured with the same settings is kept.

    Args:
        evidence: models and texts.
        names: some of `PREDICTIONS`.
        settings: what the evidence was made from, in types of JSON.
        folder: folder for `<prediction>.json`, `further.json`, `figures/` and `report.md`. The report has everything
            that was measured with these settings.
        commit: commit of the code that measures, for the details of each result.
    """
    results: dict[str, PredictionResult] = {}

    def report(further: Measures | None) -> None:
        known = (results.get(name) or load_result(name, settings, folder) for name in PREDICTIONS)
        write_report([result for result in known if result is not None], further, settings, folder)

    further = load_further(settings, folder)
    for name in tqdm(check_predictions(names), "predictions", unit="prediction"):
        result = load_result(name, settings, folder)
        if result is None:
            result = PREDICTIONS[name](evidence)
            if commit is not None:
                result.details["commit"] = commit
            save_result(result, settings, folder)
        else:
            complete_figure(result, folder)
        results[name] = result
        report(further)
    if further is None:
        further = further_measures(evidence)
        save_further(further, settings, folder)
        report(further)
    return list(results.values())


def further_measures(evidence: Evidence) -> Measures:
    """Measures the stability of codes, which section 7 of the paper names next to the five predictions."""
    windows = list(evidence.windows)
    found = code_stability(evidence.subjects, windows[:: max(1, len(windows) // STABILITY_WINDOWS)]).figures
    return {
        "Stability of codes": {
            subject: {f"{name}, {kind}": value for kind, of in kinds.items() for name, value in of.items()}
            for subject, kinds in found.items()
        }
    }


__all__ = ["PREDICTIONS", "Evidence", "check_predictions", "further_measures", "measure_predictions", "spread"]
