"""Concepts, each a named set of words, and where their words stand in a text of tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Concepts = Mapping[str, Iterable[str | Sequence[str]]]
"""Name -> words; each a word, or a list of its forms, which stay together: `{"animals": ["dog", ["mouse", "mice"]]}`"""

HELD_IN, HELD_OUT = 0, 1
ORDINARY, LEFT_OUT = -1, -2
"""What is at a token that ends no word of a concept: an ordinary token, or one that says nothing about any concept."""


def read_concepts(file: str | os.PathLike[str]) -> Concepts:
    """Concepts from a JSON file; `ValueError` if it holds something else."""
    try:
        concepts = json.loads(Path(file).read_text(encoding="utf-8"))
        check_concepts(concepts)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as concepts: {error}") from error
    return dict(concepts)


def check_concepts(concepts: Any) -> dict[str, list[tuple[str, ...]]]:
    """Name -> forms of each word; `ValueError` if it is no mapping of names to words."""
    if not isinstance(concepts, Mapping):
        raise ValueError(f"concepts are a {type(concepts).__name__}; they must be a mapping of names to words")
    checked: dict[str, list[tuple[str, ...]]] = {}
    for name, words in concepts.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"a concept is called {name!r}; its name must be a text that is not empty")
        if isinstance(words, str | Mapping) or not isinstance(words, Iterable):
            raise ValueError(f"concept {name!r} is {str(words)[:60]!r}; it must be a list of words")
        checked[name] = []
        for word in words:
            forms = (word,) if isinstance(word, str) else word
            whole = isinstance(forms, list | tuple) and forms and all(isinstance(f, str) and f.strip() for f in forms)
            if not whole:
                raise ValueError(f"concept {name!r} has {word!r}; each entry is a word, or a list of a word's forms")
            checked[name].append(tuple(form.strip() for form in forms))
    return checked


class Lexicon(NamedTuple):
    """The words of some concepts, L in all, split into two halves."""

    names: list[str]
    """C, of concepts."""
    words: list[str]
    """(L,) the first form of each."""
    forms: list[tuple[str, ...]]
    """(L,)"""
    concepts: np.ndarray
    """(L, J) int64, the concepts of each word as places in `names`, -1 where it has no more."""
    shuffled: np.ndarray
    """(L, J) the same with concepts dealt out anew among the words of each half: as many of each, by chance."""
    half: np.ndarray
    """(L,) int64, `HELD_IN` or `HELD_OUT`."""

    @classmethod
    def of(cls, concepts: Concepts, seed: int) -> Lexicon:
        """Words that have their first form in common are one, which may belong to several concepts. Each concept's
        words are split evenly, but for those that are split with an earlier concept."""
        checked = check_concepts(concepts)
        members: dict[str, tuple[dict[str, None], dict[int, None]]] = {}  # dictionaries are sets that keep an order
        for place, words in enumerate(checked.values()):
            for forms in words:
                own_forms, own_concepts = members.setdefault(forms[0], ({}, {}))
                own_forms.update(dict.fromkeys(forms))
                own_concepts[place] = None
        generator = np.random.default_rng(seed)
        first = np.array([next(iter(of)) for _, of in members.values()], np.int64)
        half = np.zeros(len(members), np.int64)
        for place in range(len(checked)):
            own = generator.permutation(np.flatnonzero(first == place))
            half[own] = (np.arange(len(own)) + generator.integers(2)) % 2
        table = np.full((len(members), max((len(of) for _, of in members.values()), default=1)), -1, np.int64)
        for row, (_, of) in zip(table, members.values(), strict=True):
            row[: len(of)] = list(of)
        shuffled = table.copy()
        for side in (HELD_IN, HELD_OUT):
            own = np.flatnonzero(half == side)
            shuffled[own] = table[generator.permutation(own)]
        return cls(list(checked), list(members), [tuple(of) for of, _ in members.values()], table, shuffled, half)


def token_halves(vocabulary: int, seed: int) -> np.ndarray:
    """(V,) the half of each token where it ends no word, by chance."""
    return np.random.default_rng(seed).integers(HELD_IN, HELD_OUT + 1, vocabulary)


class WordFinder:
    """Finds words in windows of tokens.

    A word is at the token that ends it: the first at which a model that reads from left to right can know it. It
    counts where it stands after a space, as it is written or with a capital. Left out are tokens that would be the word
    but for the space or for more capitals, and ones that the next token goes on with (" king" before "dom").
    """

    def __init__(self, lexicon: Lexicon, tokenizer: Any, texts: Sequence[str]) -> None:
        """`texts` (V,) are all tokens as they stand in text."""
        self.vocabulary = len(texts)
        sequences: dict[tuple[int, ...], int] = {}
        spaced: list[str] = []
        words: list[int] = []
        for word, forms in enumerate(lexicon.forms):
            spellings = dict.fromkeys(spelling for form in forms for spelling in (form, form[:1].upper() + form[1:]))
            spaced.extend(spellings)
            words.extend([word] * len(spellings))
        self.found = np.zeros(len(lexicon.words), bool)
        """(L,) words that the tokenizer can write."""
        for word, ids in zip(words, _after_a_space(tokenizer, spaced), strict=True):
            if ids and tokenizer.unk_token_id not in ids:
                self.found[word] = True
                # a form of two words tells nothing about either
                sequences[ids] = word if sequences.get(ids, word) == word else LEFT_OUT
        known = {form.casefold() for form in spaced}
        for token, text in enumerate(texts):
            if text.strip().casefold() in known:
                sequences.setdefault((token,), LEFT_OUT)
        marks_spaces = any(texts[ids[0]].startswith(" ") for ids in sequences)
        self.goes_on = np.array([marks_spaces and text[:1].isalnum() for text in texts], bool)
        """(V,) tokens that go on with the word before."""
        self._build(sequences)

    def _build(self, sequences: Mapping[tuple[int, ...], int]) -> None:
        """A trie: an edge is a number, node V + token, and `_edges` has them sorted with the nodes they lead to."""
        edges: dict[int, int] = {}
        ends = [ORDINARY]
        for ids, word in sequences.items():
            node = 0
            for token in ids:
                edge = node * self.vocabulary + token
                if edge not in edges:
                    edges[edge] = len(ends)
                    ends.append(ORDINARY)
                node = edges[edge]
            ends[node] = word
        self._edges = np.array(sorted(edges), np.int64)
        self._targets = np.array([edges[edge] for edge in self._edges.tolist()], np.int64)
        self._ends = np.array(ends, np.int64)
        self._longest = max(map(len, sequences), default=0)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """(B, T) token ids -> (B, T) int64: the place in the lexicon of the word that ends there, the longest if there
        are several, or `ORDINARY`, or `LEFT_OUT`."""
        found = np.full(ids.shape, ORDINARY, np.int64)
        nodes = np.zeros(ids.shape, np.int64)  # of the trie, by the token that a walk began at
        for step in range(min(self._longest, ids.shape[1])):
            walks = nodes[:, : ids.shape[1] - step]
            edges = walks * self.vocabulary + ids[:, step:]
            at = np.searchsorted(self._edges, edges).clip(max=len(self._edges) - 1)
            nodes = np.where((walks >= 0) & (self._edges[at] == edges), self._targets[at], -1)
            ends = np.where(nodes >= 0, self._ends[nodes], ORDINARY)
            found[:, step:] = np.where(ends == ORDINARY, found[:, step:], ends)
        followed = np.zeros(ids.shape, bool)
        followed[:, :-1] = self.goes_on[ids[:, 1:]]
        return np.where((found >= 0) & followed, LEFT_OUT, found)


def _after_a_space(tokenizer: Any, words: list[str]) -> list[tuple[int, ...]]:
    """The tokens of each word after a space; none where the tokens before depend on it."""
    if not words:
        return []
    before = tuple(tokenizer("a", add_special_tokens=False)["input_ids"])
    encoded = tokenizer([f"a {word}" for word in words], add_special_tokens=False)["input_ids"]
    return [tuple(ids[len(before) :]) if tuple(ids[: len(before)]) == before else () for ids in encoded]


__all__ = ["Concepts", "Lexicon", "WordFinder", "check_concepts", "read_concepts", "token_halves"]
