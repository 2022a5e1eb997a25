"""Tasks for probes: tokens of a text that have something, or have not, and how to split them so that a probe cannot
pass by heart.

Words are split by lemma, so that a probe is judged on words that it never saw. Kinds of tokens (a number, capitals) are
split by token, and what depends on the context (within brackets, at the start of a line) by window. Tokens come in
pairs, one that has it and one that has not: from the same source of text, such as a domain, or from the same window
where tokens are split by window. So what a text is about tells nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...data.tokens import token_texts
from ...data.windows import Windows
from ...features.labelling.concepts import LEFT_OUT, Concepts, Lexicon, WordFinder, check_concepts
from .formatting import IN_CONTEXT, OF_TOKENS, marks_of_window

FORMATTING = "formatting"


class Limits(NamedTuple):
    """How much of the text a task takes, and how much it needs."""

    occurrences: int = 8
    """The most tokens of one unit and label: frequent words shall not decide."""
    tokens: int = 400
    """The most tokens of one label and side."""
    least_units: int = 10
    """Units of each label on each side, or there is no task."""
    least_tokens: int = 40
    """Tokens of each label on each side, or there is no task."""


@dataclass(frozen=True)
class Task:
    """n tokens, half of them positive on either side, and in each source or window that pairs are taken from."""

    name: str
    group: str
    """"concepts", "polarity", "part of speech" or "formatting"."""
    places: np.ndarray
    """(n,) int64, ascending: T * window + position."""
    labels: np.ndarray
    """(n,) bool."""
    shuffled: np.ndarray
    """(n,) bool, the control: labels dealt out anew among the units of each side; among the tokens of each unit where
    units have both labels."""
    units: np.ndarray
    """(n,) int64, what the tokens are split by: lemma, token or window. All tokens of a unit are on one side."""
    held_out: np.ndarray
    """(n,) bool, the side that probes are judged on and never fitted or chosen on."""


def word_tasks(
    groups: Mapping[str, Concepts],
    windows: Windows,
    tokenizer: Any,
    *,
    sources: Sequence[str] | None = None,
    limits: Limits | None = None,
    seed: int = 0,
) -> list[Task]:
    """Each concept against the words of the other concepts of its group, at the token that ends a word. A group of two
    concepts makes one task. Concepts of which the text has too little make none, nor does a group's only concept
    (`without_task` names them); the first token of a window, which knows nothing of what was before it, is left out.

    Args:
        groups: name -> concepts: {"part of speech": {"nouns": ["dog", ["mouse", "mice"]], "verbs": [...]}}. Forms of a
            word are one unit.
        windows: the text.
        tokenizer: the model's.
        sources: where each window is from, such as its domain: a task takes as many positive tokens as negative ones
            from each. By default all windows are from one.
        limits: see [`Limits`].
        seed: of the split and of the tokens chosen.

    Raises:
        ValueError: if windows differ in length, there are none, or sources are not as many.
    """
    ids, counted = token_arrays(windows)
    source = _numbered(sources, ids)
    texts = token_texts(tokenizer)
    known = {word.casefold() for row in ids for word in re.findall(r"\w+", "".join(texts[token] for token in row))}
    tasks = []
    for group, concepts in groups.items():
        lexicon = Lexicon.of(_occurring(concepts, known), seed)
        words = np.where(counted, WordFinder(lexicon, tokenizer, texts).find(ids), LEFT_OUT).ravel()
        places = np.flatnonzero(words >= 0)
        words, held_out = words[places], lexicon.half[words[places]].astype(bool)
        for number, title in enumerate(_titles(lexicon.names)):
            labels = (lexicon.concepts == number).any(1)[words]
            candidates = _Candidates(places, labels, words, held_out, source.ravel()[places])
            tasks += _task(title, group, candidates, limits or Limits(), np.random.default_rng([seed, number]))
    return tasks


def without_task(groups: Mapping[str, Concepts], tasks: Sequence[Task]) -> dict[str, list[str]]:
    """Group -> its concepts of which `word_tasks` made no task, where there are any."""
    made = {(task.group, task.name) for task in tasks}
    missing = {}
    for group, concepts in groups.items():
        titles = _titles(list(concepts))
        whose = titles * 2 if len(concepts) == 2 else titles
        missing[group] = [name for name, title in zip(concepts, whose, strict=True) if (group, title) not in made]
    return {group: names for group, names in missing.items() if names}


def formatting_tasks(
    windows: Windows,
    tokenizer: Any,
    *,
    sources: Sequence[str] | None = None,
    limits: Limits | None = None,
    seed: int = 0,
) -> list[Task]:
    """Tasks that are computed from the text of tokens alone: those of `formatting.OF_TOKENS`, split by token, and those
    of `formatting.IN_CONTEXT`, split by window. Arguments are those of `word_tasks`."""
    ids, counted = token_arrays(windows)
    source, limits = _numbered(sources, ids), limits or Limits()
    texts = token_texts(tokenizer)
    for special in tokenizer.all_special_ids:
        texts[special] = "\n"
    tasks = []
    for number, (name, mark) in enumerate(OF_TOKENS.items()):
        generator = np.random.default_rng([seed, number])
        marks = np.array([mark(text.strip()) for text in texts])
        half = _rank(marks, generator) % 2 == 1
        candidates = _Candidates.of(np.where(counted, marks[ids], -1), ids, half[ids], source)
        tasks += _task(name, FORMATTING, candidates, limits, generator)
    window = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
    half = np.random.default_rng(seed).integers(0, 2, len(ids)).astype(bool)
    for number, (name, mark_text) in enumerate(IN_CONTEXT.items(), len(OF_TOKENS)):
        marks = np.stack([marks_of_window([texts[token] for token in row], mark_text) for row in ids])
        candidates = _Candidates.of(np.where(counted, marks, -1), window, half[window], window)
        tasks += _task(name, FORMATTING, candidates, limits, np.random.default_rng([seed, number]))
    return tasks


def task_places(tasks: Sequence[Task]) -> np.ndarray:
    """(P,) all places of some tasks, ascending and distinct. `ValueError` if there is no task."""
    if not tasks:
        raise ValueError("there are no tasks; give more text, or concepts whose words it has")
    return np.unique(np.concatenate([task.places for task in tasks]))


def rows_of(task: Task, places: np.ndarray) -> np.ndarray:
    """(n,) where a task's tokens are among the places of `task_places`."""
    return np.searchsorted(places, task.places)


def token_arrays(windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """(N, T) token ids, and (N, T) bool, which may be in a task: all but padding and each window's first token.
    `ValueError` if windows differ in length, or there are none."""
    rows = list(windows)
    lengths = {len(row["input_ids"]) for row in rows}
    if len(lengths) != 1:
        raise ValueError(f"windows have lengths {sorted(lengths)}; tasks need some, all of one length")
    ids = np.array([row["input_ids"] for row in rows], np.int64)
    counted = np.array([row.get("attention_mask", np.ones(ids.shape[1])) for row in rows], bool)
    return ids, counted & (counted.cumsum(1) > 1)


def _numbered(sources: Sequence[str] | None, ids: np.ndarray) -> np.ndarray:
    """(N, T) int64, the number of each token's source."""
    if sources is not None and len(sources) != len(ids):
        raise ValueError(f"there are {len(sources)} sources for {len(ids)} windows; give one a window")
    numbers = np.zeros(len(ids), np.int64) if sources is None else np.unique(sources, return_inverse=True)[1]
    return np.broadcast_to(numbers[:, None], ids.shape)


def _titles(names: Sequence[str]) -> list[str]:
    """Of a group's tasks: two concepts make one, each being what the other is not."""
    return [" or ".join(names)] if len(names) == 2 else list(names)


def _occurring(concepts: Concepts, known: set[str]) -> Concepts:
    """Concepts without the words of which a text has no form."""

    def occurs(forms: tuple[str, ...]) -> bool:
        return any(known.issuperset(re.findall(r"\w+", form.casefold())) for form in forms)

    return {name: [forms for forms in words if occurs(forms)] for name, words in check_concepts(concepts).items()}


class _Candidates(NamedTuple):
    """Tokens that a task may take."""

    places: np.ndarray
    labels: np.ndarray
    units: np.ndarray
    held_out: np.ndarray
    strata: np.ndarray
    """Numbers of where a token is paired with one of the other label."""

    @classmethod
    def of(cls, marks: np.ndarray, units: np.ndarray, held_out: np.ndarray, strata: np.ndarray) -> _Candidates:
        """From arrays (N, T); marks are 1, 0, or -1 where a token says nothing."""
        places = np.flatnonzero(marks >= 0)
        return cls(places, marks.ravel()[places] == 1, *(of.ravel()[places] for of in (units, held_out, strata)))

    def chosen(self, rows: np.ndarray) -> _Candidates:
        return _Candidates(*(column[rows] for column in self))

    def limited(self, most: int, generator: np.random.Generator) -> _Candidates:
        """At most so many tokens of each unit and label."""
        return self.chosen(_rank(self.units * 2 + self.labels, generator) < most)

    def paired(self, most: int, generator: np.random.Generator) -> _Candidates:
        """As many tokens of either label in each stratum of a side; at most so many pairs a side."""
        stratum = self.strata * 2 + self.held_out
        stratum_and_label = stratum * 2 + self.labels
        counts = np.bincount(stratum_and_label, minlength=2 * (stratum.max(initial=-1) + 1))
        rank = _rank(stratum_and_label, generator)
        rows = np.flatnonzero(rank < counts.reshape(-1, 2).min(1)[stratum])
        numbers = stratum[rows] * len(rank) + rank[rows]
        _, first, pair = np.unique(numbers, return_index=True, return_inverse=True)
        kept = _rank(self.held_out[rows][first], generator) < most
        return self.chosen(rows[kept[pair]])


def _task(name: str, group: str, candidates: _Candidates, limits: Limits, generator: np.random.Generator) -> list[Task]:
    """The task, or none if there is too little of it."""
    of = candidates.limited(limits.occurrences, generator).paired(limits.tokens, generator)
    side_and_label = of.held_out * 2 + of.labels
    tokens = np.bincount(side_and_label, minlength=4)
    units = [len(np.unique(of.units[side_and_label == which])) for which in range(4)]
    if tokens.min() < limits.least_tokens or min(units) < limits.least_units:
        return []
    shuffled = _shuffled(of.labels, of.units, of.held_out, generator)
    return [Task(name, group, of.places, of.labels, shuffled, of.units, of.held_out)]


def _rank(groups: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The place of each member within its group, by chance: (n,) int64."""
    order = np.lexsort((generator.random(len(groups)), groups))
    ordered = groups[order]
    starts = np.searchsorted(ordered, ordered)
    rank = np.empty(len(groups), np.int64)
    rank[order] = np.arange(len(groups)) - starts
    return rank


def _shuffled(
    labels: np.ndarray, units: np.ndarray, held_out: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    if (labels != labels[first][unit]).any():
        by_chance = np.lexsort((generator.random(len(units)), units))
        shuffled = np.empty_like(labels)
        shuffled[np.argsort(units, kind="stable")] = labels[by_chance]
        return shuffled
    of_unit = labels[first]
    for side in (False, True):
        own = np.flatnonzero(held_out[first] == side)
        of_unit[own] = of_unit[generator.permutation(own)]
    return of_unit[unit]


__all__ = ["Limits", "Task", "formatting_tasks", "rows_of", "task_places", "token_arrays", "without_task", "word_tasks"]
