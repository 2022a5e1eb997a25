"""Probes fitted on text of one domain and judged on others: do features mean the same there?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from ...utils.extras import needs
from .probes import area, fit_sparse, scaled
from .tasks import Task, rows_of, task_places

with needs("evaluate"):
    from scipy.sparse import csr_array

    from ...features.activations import activations_at

if TYPE_CHECKING:
    from ...data.windows import Windows
    from ...model.mfn_for_causal_lm import MFNForCausalLM

LEAST_TOKENS = 10
"""Minimum of tokens of each label in one domain and on one side."""

Probes = Callable[["MFNForCausalLM", str], Mapping[str, Sequence[float]]]
"""(model, source) -> domain -> area under the ROC curve of each concept.

The probes read the model's codes. They are fitted on text of the source and judged on held-out text of the domain. All
calls have the same concepts, with NaN where there is too little text.
"""


def joined(windows: Mapping[str, Windows]) -> list[Mapping[str, Any]]:
    """Windows of all domains, one domain after the other: the text that tasks for [`probes_across`] are made of.

    Tasks made for each domain on its own would split words differently. A probe might then be judged on words that it
    was fitted to.
    """
    return [row for rows in windows.values() for row in rows]


def probes_across(
    windows: Mapping[str, Windows], tasks: Sequence[Task], *, num_features: int = 5, batch_size: int = 8
) -> Probes:
    """Makes the probes that P5 asks for.

    Each task has a probe of few features ([`probes.fit_sparse`]). It is chosen and fitted on the training side of the
    source, and judged on the held-out side of each domain. Areas are means over layers. They are NaN where a domain has
    fewer than ten tokens of a label on the side that is needed.

    Args:
        windows: domain -> windows, all of one length.
        tasks: tasks on `joined(windows)`, with limits that leave each domain its share.
        num_features: number of features that a probe reads.
        batch_size: windows per forward.
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
    """Areas of a probe that is fitted on some rows (n,) bool, on each of several other sets of rows."""
    if not _enough(labels, fitted):
        return [np.nan] * len(judged)
    code = scaled(code, fitted)
    values = fit_sparse(code, labels, fitted, [num_features])[num_features](code)
    return [area(values[rows], labels[rows]) if _enough(labels, rows) else np.nan for rows in judged]


def _enough(labels: np.ndarray, rows: np.ndarray) -> bool:
    return int(np.bincount(labels[rows], minlength=2).min()) >= LEAST_TOKENS


__all__ = ["Probes", "joined", "probes_across"]
