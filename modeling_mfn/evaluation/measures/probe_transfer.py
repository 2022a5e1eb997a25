"""Probes that are fitted on text of one domain and judged on that of others: whether features mean the same there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from tqdm.auto import tqdm

from ...data.windows import Windows
from ...features.activations import activations_at
from ...model.modeling_mfn import MFNForCausalLM
from ..predictions.p5_transfer import Probes
from .probes import area, fit_sparse, scaled
from .tasks import Task, rows_of, task_places

LEAST_TOKENS = 10


def joined(windows: Mapping[str, Windows]) -> list[Mapping[str, Any]]:
    """The windows of all domains, one domain after the other: the text that tasks for `probes_across` are of. Made for
    each domain by itself they would split words differently, and a probe might be judged on words that it was fitted
    to."""
    return [row for rows in windows.values() for row in rows]


def probes_across(
    windows: Mapping[str, Windows], tasks: Sequence[Task], *, num_features: int = 5, batch_size: int = 8
) -> Probes:
    """The `probes` of `transfer_gap`: for each task a probe of few features (`probes.fit_sparse`), chosen and fitted
    on the training side of the source's text and judged on the held-out side of each domain's; a mean over layers. NaN
    where a domain has fewer than ten tokens of a label on the side that is needed.

    Args:
        windows: domain -> windows, all of one length.
        tasks: of `joined(windows)`, with limits so wide that each domain has its share.
        num_features: the most that a probe reads.
        batch_size: windows a forward.
    """
    text, places = joined(windows), task_places(tasks)
    ends = np.cumsum([len(list(rows)) for rows in windows.values()])
    of_window = np.searchsorted(ends, np.arange(len(text)), side="right")
    domain = of_window[places // len(text[0]["input_ids"])]

    def probes(model: MFNForCausalLM, source: str) -> dict[str, list[float]]:
        codes = activations_at(model, text, places, batch_size=batch_size).codes
        areas = []
        for task in tqdm(tasks, f"probes of {source}", unit="task", leave=False):
            rows = rows_of(task, places)
            fitted = ~task.held_out & (domain[rows] == list(windows).index(source))
            judged = [task.held_out & (domain[rows] == number) for number in range(len(windows))]
            by_layer = [_areas(code[rows], task.labels, fitted, judged, num_features) for code in codes.values()]
            areas.append(np.mean(by_layer, axis=0))
        return {name: [float(of[number]) for of in areas] for number, name in enumerate(windows)}

    return probes


def _areas(
    code: csr_array, labels: np.ndarray, fitted: np.ndarray, judged: Sequence[np.ndarray], num_features: int
) -> list[float]:
    """Under the ROC curve of a probe that is fitted on some rows (n,) bool, on each of several others."""
    if not _enough(labels, fitted):
        return [np.nan] * len(judged)
    code = scaled(code, fitted)
    values = fit_sparse(code, labels, fitted, [num_features])[num_features](code)
    return [area(values[rows], labels[rows]) if _enough(labels, rows) else np.nan for rows in judged]


def _enough(labels: np.ndarray, rows: np.ndarray) -> bool:
    return int(np.bincount(labels[rows], minlength=2).min()) >= LEAST_TOKENS


__all__ = ["joined", "probes_across"]
