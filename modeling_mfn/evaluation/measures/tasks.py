"""Tasks for probes: tokens of a text that have a property, and as many that lack it, split so that memory cannot help.

- Words of a concept are split by lemma: a probe is judged on words that it never saw.
- Kinds of tokens (a number, capitals) are split by token.
- Properties of the context (in brackets, at the start of a line) are split by window.

Tokens come in pairs, one with the property and one without. Both are from the same source of text, such as a domain, or
from the same window where tokens are split by window. The topic of a text therefore says nothing about the label.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...data.tokens import token_texts
from ...features.labelling.concepts import LEFT_OUT, Concepts, Lexicon, WordFinder, check_concepts
from .formatting import IN_CONTEXT, NEITHER, OF_TOKENS, YES, marks_of_window

if TYPE_CHECKING:
    from ...data.windows import Windows

FORMATTING = "formatting"
"""Group of the tasks that [`formatting_tasks`] makes."""


class Limits(NamedTuple):
    """Maximum and minimum numbers of tokens and units in a task."""

    occurrences: int = 8
    """Maximum of tokens of one unit and label, so that frequent words do not decide."""
    tokens: int = 400
    """Maximum of tokens of one label on one side."""
    least_units: int = 10
    """Minimum of units of each label on each side. There is no task with fewer."""
    least_tokens: int = 40
    """Minimum of tokens of each label on each side. There is no task with fewer."""


@dataclass(frozen=True)
class Task:
    """Tokens to tell apart, n in all. Half of them are positive on either side, and in each source or window."""

    name: str
    group: str
    """Name of the group of concepts, or "formatting"."""
    places: np.ndarray
    """(n,) int64, ascending: T * window + position."""
    labels: np.ndarray
    """(n,) bool."""
    shuffled: np.ndarray
    """(n,) bool, control labels.

    Labels are dealt out anew among the units of each side, or among the tokens of each unit that has both labels.
    """
    units: np.ndarray
    """(n,) int64, lemma, token or window that the split is by. All tokens of a unit are on one side."""
    held_out: np.ndarray
    """(n,) bool, the side on which probes are judged. Nothing is fitted or chosen on it."""


def word_tasks(
    groups: Mapping[str, Concepts],
    windows: Windows,
    tokenizer: Any,
    *,
    sources: Sequence[str] | None = None,
    limits: Limits | None = None,
    seed: int = 0,
) -> list[Task]:
    """Makes a task of each concept against the words of the other concepts in its group.

    A word is at the token that ends it. A group of two concepts makes one task. A concept that is alone in its group,
    or has too few words in the text, makes none; [`without_task`] names these. The first token of a window is left out,
    because the model has not seen what was before it.

    Args:
        groups: name -> concepts: {"part of speech": {"nouns": ["dog", ["mouse", "mice"]], "verbs": [...]}}. The forms
            of a word are one unit.
        windows: text.
        tokenizer: tokenizer of the model.
        sources: source of each window, such as its domain. A task takes as many positive as negative tokens from each.
            By default all windows are from one source.
        limits: see [`Limits`].
        seed: seed of the split and of the choice of tokens.

    Raises:
        ValueError: if there is no window, windows differ in length, or there is not one source per window.
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
    """Returns the concepts by group for which `word_tasks` made no task. Groups that lack none are left out."""
    made = {(task.group, task.name) for task in tasks}
    missing = {}
    for group, concepts in groups.items():
        titles = _titles(list(concepts))
        of_concepts = titles * 2 if len(concepts) == 2 else titles
        missing[group] = [name for name, title in zip(concepts, of_concepts, strict=True) if (group, title) not in made]
    return {group: names for group, names in missing.items() if names}


def formatting_tasks(
    windows: Windows,
    tokenizer: Any,
    *,
    sources: Sequence[str] | None = None,
    limits: Limits | None = None,
    seed: int = 0,
) -> list[Task]:
    """Makes tasks from the text of tokens alone.

    Tasks of `formatting.OF_TOKENS` are split by token, those of `formatting.IN_CONTEXT` by window. The arguments are
    those of [`word_tasks`].
    """
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
        candidates = _Candidates.of(np.where(counted, marks[ids], NEITHER), ids, half[ids], source)
        tasks += _task(name, FORMATTING, candidates, limits, generator)
    window = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
    half = np.random.default_rng(seed).integers(0, 2, len(ids)).astype(bool)
    for number, (name, mark_text) in enumerate(IN_CONTEXT.items(), len(OF_TOKENS)):
        marks = np.stack([marks_of_window([texts[token] for token in row], mark_text) for row in ids])
        candidates = _Candidates.of(np.where(counted, marks, NEITHER), window, half[window], window)
        tasks += _task(name, FORMATTING, candidates, limits, np.random.default_rng([seed, number]))
    return tasks


def judged(tasks: Sequence[Task]) -> np.ndarray:
    """(tasks,) bool, the tasks that an outcome depends on: tasks of words, or all if there are none of words."""
    of_words = np.array([task.group != FORMATTING for task in tasks], bool)
    return of_words if of_words.any() else ~of_words


def task_places(tasks: Sequence[Task]) -> np.ndarray:
    """(P,) all places of the tasks, ascending and distinct.

    Raises:
        ValueError: if there is no task.
    """
    if not tasks:
        raise ValueError("there are no tasks; give more text, or concepts whose words it has")
    return np.unique(np.concatenate([task.places for task in tasks]))


def rows_of(task: Task, places: np.ndarray) -> np.ndarray:
    """(n,) index of each token of a task among the places of [`task_places`]."""
    return np.searchsorted(places, task.places)


def token_arrays(windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids (N, T), and (N, T) bool which of them may be in a task.

    Padding and the first token of each window may not.

    Raises:
        ValueError: if there is no window, or windows differ in length.
    """
    rows = list(windows)
    lengths = {len(row["input_ids"]) for row in rows}
    if len(lengths) != 1:
        raise ValueError(f"windows have lengths {sorted(lengths)}; tasks need some, all of one length")
    ids = np.array([row["input_ids"] for row in rows], np.int64)
    counted = np.array([row.get("attention_mask", np.ones(ids.shape[1])) for row in rows], bool)
    return ids, counted & (counted.cumsum(1) > 1)


def _numbered(sources: Sequence[str] | None, ids: np.ndarray) -> np.ndarray:
    """(N, T) int64, number of the source of each token."""
    if sources is not None and len(sources) != len(ids):
        raise ValueError(f"there are {len(sources)} sources for {len(ids)} windows; give one per window")
    numbers = np.zeros(len(ids), np.int64) if sources is None else np.unique(sources, return_inverse=True)[1]
    return np.broadcast_to(numbers[:, None], ids.shape)


def _titles(names: Sequence[str]) -> list[str]:
    """Titles of a group's tasks. Two concepts make one task, as each lacks what the other has."""
    return [" or ".join(names)] if len(names) == 2 else list(names)


def _occurring(concepts: Concepts, known: set[str]) -> Concepts:
    """Concepts without the words that have no form in the text."""

    def occurs(forms: tuple[str, ...]) -> bool:
        return any(known.issuperset(re.findall(r"\w+", form.casefold())) for form in forms)

    return {name: [forms for forms in words if occurs(forms)] for name, words in check_concepts(concepts).items()}


class _Candidates(NamedTuple):
    """Tokens (n,) that a task may take."""

    places: np.ndarray
    labels: np.ndarray
    units: np.ndarray
    held_out: np.ndarray
    strata: np.ndarray
    """Number of the source or window within which tokens are paired."""

    @classmethod
    def of(cls, marks: np.ndarray, units: np.ndarray, held_out: np.ndarray, strata: np.ndarray) -> _Candidates:
        """Takes the marked tokens from arrays (N, T)."""
        places = np.flatnonzero(marks != NEITHER)
        return cls(places, marks.ravel()[places] == YES, *(of.ravel()[places] for of in (units, held_out, strata)))

    def chosen(self, rows: np.ndarray) -> _Candidates:
        return _Candidates(*(column[rows] for column in self))

    def limited(self, most: int, generator: np.random.Generator) -> _Candidates:
        """Keeps at most this number of tokens of each unit and label."""
        return self.chosen(_rank(_combined(self.units, self.labels), generator) < most)

    def paired(self, most: int, generator: np.random.Generator) -> _Candidates:
        """Keeps as many tokens of either label in each stratum of a side, and at most this number of pairs per side."""
        stratum = _combined(self.strata, self.held_out)
        rank = _rank(_combined(stratum, self.labels), generator)
        counts = [np.bincount(stratum[self.labels == label], minlength=stratum.max(initial=0) + 1) for label in (0, 1)]
        rows = np.flatnonzero(rank < np.minimum(*counts)[stratum])
        _, first, pair = np.unique(_combined(stratum[rows], rank[rows]), return_index=True, return_inverse=True)
        kept = _rank(self.held_out[rows][first], generator) < most
        return self.chosen(rows[kept[pair]])


def _combined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n,) int64, one number for each combination of two columns, in lexicographic order."""
    columns = (first.astype(np.int64), second.astype(np.int64))
    return np.ravel_multi_index(columns, [int(column.max(initial=0)) + 1 for column in columns])


def _task(name: str, group: str, candidates: _Candidates, limits: Limits, generator: np.random.Generator) -> list[Task]:
    """Returns the task, or nothing if there are too few tokens or units for it."""
    of = candidates.limited(limits.occurrences, generator).paired(limits.tokens, generator)
    parts = [(of.held_out == side) & (of.labels == label) for side in (False, True) for label in (False, True)]
    tokens, units = min(part.sum() for part in parts), min(len(np.unique(of.units[part])) for part in parts)
    if tokens < limits.least_tokens or units < limits.least_units:
        return []
    shuffled = _shuffled(of.labels, of.units, of.held_out, generator)
    return [Task(name, group, of.places, of.labels, shuffled, of.units, of.held_out)]


def _rank(groups: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(n,) int64, random place of each member within its group."""
    order = np.lexsort((generator.random(len(groups)), groups))
    ordered = groups[order]
    starts = np.searchsorted(ordered, ordered)
    rank = np.empty(len(groups), np.int64)
    rank[order] = np.arange(len(groups)) - starts
    return rank


def _shuffled(
    labels: np.ndarray, units: np.ndarray, held_out: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """(n,) bool, the control labels of a [`Task`]."""
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


__all__ = [
    "FORMATTING",
    "Limits",
    "Task",
    "formatting_tasks",
    "judged",
    "rows_of",
    "task_places",
    "token_arrays",
    "without_task",
    "word_tasks",
]
