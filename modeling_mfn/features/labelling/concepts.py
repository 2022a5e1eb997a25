"""Concepts, each a named set of words, and the places of these words in a text of tokens."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...utils.readers import parse_json

Concepts = Mapping[str, Iterable[str | Sequence[str]]]
"""Name -> words, such as `{"animals": ["dog", ["mouse", "mice"]]}`. Forms of one word in a list stay together."""

HELD_IN, HELD_OUT = 0, 1
"""Halves of words and tokens: the one that chooses, the one that judges."""
ORDINARY, LEFT_OUT = -1, -2
"""Marks of tokens that do not end a word: ordinary tokens, and tokens too similar to a word to be counted."""


def read_concepts(file: str | os.PathLike[str]) -> Concepts:
    """Reads concepts from a JSON file; raises `ValueError` if it contains something else."""
    try:
        content = Path(file).read_bytes().removeprefix(codecs.BOM_UTF8)
        concepts = parse_json(content, dict[str, Any])
        check_concepts(concepts)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as concepts: {error}") from error
    return concepts


def check_concepts(concepts: Any) -> dict[str, list[tuple[str, ...]]]:
    """Checks concepts and returns name -> forms of each word; raises `ValueError` if they are not valid."""
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
    """Words of C concepts, L in all, split into two halves."""

    names: list[str]
    """(C,): name of each concept."""
    words: list[str]
    """(L,): first form of each word."""
    forms: list[tuple[str, ...]]
    """(L,): all forms of each word."""
    concepts: np.ndarray
    """(L, J) int64: concepts of each word as places in `names`; -1 where it has no further one."""
    shuffled: np.ndarray
    """(L, J) int64: concepts dealt out at random among the words of each half, each as often as before."""
    half: np.ndarray
    """(L,) int64: `HELD_IN` or `HELD_OUT`."""

    @classmethod
    def of(cls, concepts: Concepts, seed: int) -> Lexicon:
        """Collects the words of concepts and splits them into halves.

        Words with the same first form are one word, which may belong to several concepts. Each concept's words are
        split evenly, apart from those that were split with an earlier concept.
        """
        checked = check_concepts(concepts)
        members: dict[str, tuple[dict[str, None], dict[int, None]]] = {}  # dictionaries are sets that keep an order
        for place, words in enumerate(checked.values()):
            for forms in words:
                own_forms, own_concepts = members.setdefault(forms[0], ({}, {}))
                own_forms.update(dict.fromkeys(forms))
                own_concepts[place] = None
        generator = np.random.default_rng(seed)
        first = np.array([next(iter(places)) for _, places in members.values()], np.int64)
        half = np.zeros(len(members), np.int64)
        for place in range(len(checked)):
            own = generator.permutation(np.flatnonzero(first == place))
            half[own] = (np.arange(len(own)) + generator.integers(2)) % 2
        width = max((len(places) for _, places in members.values()), default=1)
        table = np.full((len(members), width), -1, np.int64)
        for row, (_, places) in zip(table, members.values(), strict=True):
            row[: len(places)] = list(places)
        shuffled = table.copy()
        for side in (HELD_IN, HELD_OUT):
            own = np.flatnonzero(half == side)
            shuffled[own] = table[generator.permutation(own)]
        forms_of_each = [tuple(forms) for forms, _ in members.values()]
        return cls(list(checked), list(members), forms_of_each, table, shuffled, half)


def token_halves(vocabulary: int, seed: int) -> np.ndarray:
    """Random half (V,) of each token, for places where it does not end a word."""
    return np.random.default_rng(seed).integers(HELD_IN, HELD_OUT + 1, vocabulary)


class WordFinder:
    """Finds words in windows of tokens.

    A word is found at the token that ends it, the first at which a model that reads from left to right can know it. It
    counts after a space, as written or with a capital. Tokens that are the word but for the space or for more capitals
    are left out. A word that the next token continues (" king" before "dom") is left out, too.
    """

    def __init__(self, lexicon: Lexicon, tokenizer: Any, texts: Sequence[str]) -> None:
        """Prepares the search for a lexicon's words; `texts` (V,) has the text of every token."""
        self.vocabulary = len(texts)
        sequences: dict[tuple[int, ...], int] = {}
        spaced: list[str] = []
        words: list[int] = []
        for word, forms in enumerate(lexicon.forms):
            spellings = dict.fromkeys(spelling for form in forms for spelling in (form, form[:1].upper() + form[1:]))
            spaced.extend(spellings)
            words.extend([word] * len(spellings))
        self.found = np.zeros(len(lexicon.words), bool)
        """(L,): true for words that the tokenizer can write."""
        for word, ids in zip(words, _after_a_space(tokenizer, spaced), strict=True):
            if ids and tokenizer.unk_token_id not in ids:
                self.found[word] = True
                # a form that two words share says nothing about either
                sequences[ids] = word if sequences.get(ids, word) == word else LEFT_OUT
        known = {form.casefold() for form in spaced}
        for token, text in enumerate(texts):
            if text.strip().casefold() in known:
                sequences.setdefault((token,), LEFT_OUT)
        marks_spaces = any(texts[ids[0]].startswith(" ") for ids in sequences)
        self.goes_on = np.array([marks_spaces and text[:1].isalnum() for text in texts], bool)
        """(V,): true for tokens that continue the word before."""
        self._build(sequences)

    def _build(self, sequences: Mapping[tuple[int, ...], int]) -> None:
        """Builds a trie. `_edges` are sorted numbers, node V + token; `_targets` are the nodes that edges lead to."""
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
        """Finds the words in token ids (B, T).

        Returns:
            (B, T) int64: place in the lexicon of the longest word that ends at a token, or `ORDINARY`, or `LEFT_OUT`.
        """
        found = np.full(ids.shape, ORDINARY, np.int64)
        nodes = np.zeros(ids.shape, np.int64)  # node of the trie that each walk has reached, by the token it began at
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
    """Tokens of each word after a space; none if the word changes the tokens before it."""
    if not words:
        return []
    before = tuple(tokenizer("a", add_special_tokens=False)["input_ids"])
    encoded = tokenizer([f"a {word}" for word in words], add_special_tokens=False)["input_ids"]
    return [tuple(ids[len(before) :]) if tuple(ids[: len(before)]) == before else () for ids in encoded]


__all__ = ["Concepts", "Lexicon", "WordFinder", "check_concepts", "read_concepts", "token_halves"]
