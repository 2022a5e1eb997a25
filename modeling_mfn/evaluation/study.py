"""All that predictions are measured on, brought together once; and the measuring, one result a prediction."""

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
from .measures.tasks import Limits, Task, formatting_tasks, without_task, word_tasks
from .predictions.p1_firing_rates import firing_rate_calibration
from .predictions.p2_probe_purity import judged, probe_purity
from .predictions.p3_seed_alignment import cross_seed_alignment
from .predictions.p4_interventions import intervention_predictability
from .predictions.p5_transfer import Transfer, transfer_gap
from .report import Measures, complete_figures, load_further, load_result, save_further, save_result, write_report
from .result import PredictionResult, Subjects

STABILITY_WINDOWS = 48
MAX_TOKENS = 98_304
"""Held-out tokens that rates, alignment and transfer are measured on where there are more. Probes need all: words of a
concept are rare."""
SHARED_LIMITS = Limits(tokens=1600, least_tokens=80)
"""Of tasks that several domains share."""


@dataclass(frozen=True)
class Evidence:
    """Models and texts. What a prediction lacks, it reports as not measured."""

    subjects: Subjects
    held_out: Mapping[str, Dataset]
    """Domain -> windows of text that no model was trained on."""
    tokenizer: Any
    choosing: Dataset | None = None
    """Windows of other text, for what is chosen and not judged: the matching of P3. Without it, that is done on every
    second held-out window, and judged on the others."""
    groups: Mapping[str, Concepts] = field(default_factory=dict)
    """Name of a group -> its concepts, for the probes of P2; those of formatting need none."""
    transfers: Mapping[str, Sequence[Transfer]] = field(default_factory=dict)
    """Subject -> its models that learnt from one domain, for P5."""
    seed: int = 0
    """Of samples, probes and bootstraps."""

    @property
    def windows(self) -> Dataset:
        """The held-out windows of all domains."""
        return concatenate_datasets(list(self.held_out.values()))


def _p1(evidence: Evidence) -> PredictionResult:
    return firing_rate_calibration(evidence.subjects, spread(evidence.windows, MAX_TOKENS))


def _p2(evidence: Evidence) -> PredictionResult:
    windows = evidence.windows
    tasks = _tasks(evidence, windows)
    untested = without_task(evidence.groups, tasks)
    return probe_purity(evidence.subjects, windows, tasks, untested=untested, seed=evidence.seed)


def _p3(evidence: Evidence) -> PredictionResult:
    windows, choosing = evidence.windows, evidence.choosing
    if choosing is None:
        numbers = range(len(windows))
        windows, choosing = windows.select(numbers[::2]), windows.select(numbers[1::2])
    windows = spread(windows, MAX_TOKENS)
    return cross_seed_alignment(evidence.subjects, windows, choosing, seed=evidence.seed)


def spread(windows: Dataset, tokens: int) -> Dataset:
    """At most so many tokens, but for the windows' length: windows that lie evenly among all."""
    most = max(1, tokens // len(windows[0]["input_ids"]))
    if len(windows) <= most:
        return windows
    return windows.select(np.linspace(0, len(windows) - 1, most).round().astype(int))


def _p4(evidence: Evidence) -> PredictionResult:
    return intervention_predictability(evidence.subjects, evidence.windows, seed=evidence.seed)


def _p5(evidence: Evidence) -> PredictionResult:
    probes, tasks, held_out = None, [], evidence.held_out
    if evidence.transfers:
        tasks = _tasks(evidence, evidence.windows, SHARED_LIMITS)
        tasks = [task for task, counts in zip(tasks, judged(tasks), strict=True) if counts]
        probes = probes_across(held_out, tasks) if tasks else None
    few = {domain: spread(rows, MAX_TOKENS // len(held_out)) for domain, rows in held_out.items()}
    concepts = [(task.group, task.name) for task in tasks]
    return transfer_gap(evidence.transfers, few, probes=probes, concepts=concepts, seed=evidence.seed)


def _tasks(evidence: Evidence, windows: Windows, limits: Limits | None = None) -> list[Task]:
    """Of the windows of all domains, one domain after the other."""
    tokenizer, seed = evidence.tokenizer, evidence.seed
    domains = [domain for domain, rows in evidence.held_out.items() for _ in range(len(rows))]
    tasks = word_tasks(evidence.groups, windows, tokenizer, sources=domains, limits=limits, seed=seed)
    return tasks + formatting_tasks(windows, tokenizer, sources=domains, limits=limits, seed=seed)


PREDICTIONS: dict[str, Callable[[Evidence], PredictionResult]] = {
    "P1": _p1, "P2": _p2, "P3": _p3, "P4": _p4, "P5": _p5,
}  # fmt: skip


def check_predictions(names: Sequence[str]) -> list[str]:
    """The names in order; `ValueError` if one is none of the five, or there is none."""
    unknown = [name for name in names if name not in PREDICTIONS]
    if unknown or not names:
        raise ValueError(f"predictions are {', '.join(names) or 'none'}; give some of {', '.join(PREDICTIONS)}")
    return [name for name in PREDICTIONS if name in names]


def measure_predictions(
    evidence: Evidence, names: Sequence[str], settings: Mapping[str, Any], folder: Path, commit: str | None = None
) -> list[PredictionResult]:
    """Measures predictions, and writes each as soon as it is there, and the report with it.

    Args:
        evidence: models and texts.
        names: some of `PREDICTIONS`.
        settings: JSON's types alone, what the evidence was made from: a result that is there already is taken if it was
            measured with the same.
        folder: gets `<prediction>.json`, `further.json`, `figures/` and `report.md`, which has all that was measured
            with these settings.
        commit: of the code that measures; goes into the details of each result, if there is one.
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
            complete_figures(result, folder)
        results[name] = result
        report(further)
    if further is None:
        further = further_measures(evidence)
        save_further(further, settings, folder)
        report(further)
    return list(results.values())


def further_measures(evidence: Evidence) -> Measures:
    """Stability of codes, which section 7 of the paper names next to the five predictions."""
    windows = list(evidence.windows)
    stability = code_stability(evidence.subjects, windows[:: max(1, len(windows) // STABILITY_WINDOWS)]).figures
    return {
        "Stability of codes": {
            subject: {f"{figure}, {what}": value for what, of in found.items() for figure, value in of.items()}
            for subject, found in stability.items()
        }
    }


__all__ = ["PREDICTIONS", "Evidence", "check_predictions", "further_measures", "measure_predictions"]
