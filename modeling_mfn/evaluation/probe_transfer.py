"""Probes that are fitted on text of one domain and judged on that of others: whether features mean the same there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from ..modeling_mfn import MFNForCausalLM
from .activations import Windows, activations_at
from .probes import sparse_probes
from .tasks import Task, rows_of, task_places
from .transfer import Probes

LEAST_TOKENS = 10


def joined(windows: Mapping[str, Windows]) -> list[Mapping[str, Any]]:
    """The windows of all domains, one domain after the other: the text that tasks for `probes_across` are of. Made for
    each domain by itself they would split words differently, and a probe might be judged on words that it was fitted
    to."""
    return [row for rows in windows.values() for row in rows]


def probes_across(
    windows: Mapping[str, Windows], tasks: Sequence[Task], *, num_features: int = 5, batch_size: int = 8
) -> Probes:
    """The `probes` of `transfer_gap`: for each task a probe of few features (`probes.sparse_probes`), chosen and fitted
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
        found: dict[str, list[float]] = {name: [] for name in windows}
        for task in tasks:
            rows = rows_of(task, places)
            fitted = ~task.held_out & (domain[rows] == list(windows).index(source))
            for number, name in enumerate(windows):
                used = fitted | (task.held_out & (domain[rows] == number))
                part = _part(task, used)
                found[name].append(np.nan if part is None else _area(codes, rows[used], part, num_features))
        return found

    return probes


def _area(codes: Mapping[int, csr_array], rows: np.ndarray, task: Task, num_features: int) -> float:
    """A mean over layers."""
    scores = [sparse_probes(code[rows], task, [num_features])[num_features] for code in codes.values()]
    return float(np.mean([score.held_out for score in scores]))


def _part(task: Task, used: np.ndarray) -> Task | None:
    """Some of a task's tokens, (n,) bool; `None` if they are too few."""
    counts = np.bincount(task.held_out[used] * 2 + task.labels[used], minlength=4)
    if counts.min() < LEAST_TOKENS:
        return None
    labels = task.labels[used]  # shuffled ones might be of one kind alone, and are not asked for
    return replace(
        task, places=task.places[used], labels=labels, shuffled=labels, units=task.units[used],
        held_out=task.held_out[used],
    )  # fmt: skip


__all__ = ["joined", "probes_across"]
