"""Automatic labels: the concept, or the few tokens, that a feature fires on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from rich.table import Table
from tqdm.auto import tqdm

from ...data.tokens import token_texts
from ...data.windows import column_batches, first_length
from ...model.feature_names import format_feature
from ...model.mfn_for_causal_lm import MFNForCausalLM
from ...model.modes import evaluating
from ...model.twins import is_a
from ...utils.display import for_terminal
from ..atlas.atlas import FeatureAtlas
from ..atlas.belonging import check_model
from ..atlas.labels import Label, Labels
from ..harvest.firings import Firings, TokenBatch
from ..harvest.harvest import Skipped, run_windows
from .concepts import HELD_IN, HELD_OUT, LEFT_OUT, Concepts, Lexicon, WordFinder, token_halves
from .separation import ActivationCounts, Places, Separation, effective_number
from .token_sets import TokenSet, TokenSetCounts, example_tokens

WINDOWS_PER_RUN = 16
"""Consecutive windows in a run; runs belong alternately to one half of the text and to the other."""


@dataclass(frozen=True)
class ConceptFigures:
    """Words of a concept in the text, and the labels given for it; pairs are held in, held out."""

    name: str
    words: tuple[int, int]
    """Number of different words that occurred."""
    effective_words: tuple[float, float]
    """Equivalent number of equally frequent words."""
    occurrences: tuple[int, int]
    enough: bool
    """True if the words were enough for the concept to take part."""
    features: int
    """Number of features labelled with the concept."""


@dataclass(frozen=True)
class LabellingReport:
    """Result of `label_features`; rich prints it as a table."""

    tokens: int
    """Number of tokens counted in the text."""
    concepts: list[ConceptFigures]
    token_sets: int
    """Number of features labelled by the tokens on which they fire."""
    control: int
    """Number of features that the same procedure labels if words are dealt out among concepts at random. Labels by
    concepts mean little unless this number is far below theirs."""
    unknown_words: list[str]
    """Words that the tokenizer cannot write."""

    @property
    def labelled(self) -> int:
        """Number of features labelled with a concept."""
        return sum(concept.features for concept in self.concepts)

    def __rich__(self) -> Table:
        table = Table("concept", "words", "occurrences", "features", title="held in / held out")
        for concept in self.concepts:
            words, occurrences = (f"{a} / {b}" for a, b in (concept.words, concept.occurrences))
            features = str(concept.features) if concept.enough else "too few words"
            table.add_row(for_terminal(concept.name, 40), words, occurrences, features)
        table.add_row("with shuffled words", "", "", str(self.control), end_section=True)
        table.add_row("by tokens", "", "", str(self.token_sets))
        return table


def label_features(
    atlas: FeatureAtlas,
    model: MFNForCausalLM,
    tokenizer: Any,
    dataset: Dataset | Iterable[dict[str, Any]],
    concepts: Concepts,
    *,
    min_auroc: float = 0.9,
    min_occurrences: int = 50,
    min_words: float = 5,
    tokens: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> LabellingReport:
    """Labels the features of an atlas by what they fire on, in one pass of the model over a text.

    New labels of source `automatic` replace all earlier ones of this source. Labels of other sources stay.

    **Concepts.** The words of each concept are split into two halves, and so are all other tokens of the vocabulary. On
    the held-in half, each feature gets the concept that it separates best, and the threshold with the best F1 score.
    The held-out half had no part in that choice and judges the label, so that a label for single tokens fails.

    A label is given if the area under the ROC curve of the activation is at least `min_auroc` on both halves. The area
    is counted twice: the concept's words against all other tokens, and against words of other concepts alone. The
    smaller one decides, so that a feature of all nouns is not a feature of animals. The score of the label is the
    smaller area on the held-out half. Its details are `method` ("concept"), `concept`, `auroc`, `auroc_words`,
    `auroc_held_in`, `threshold`, `precision`, `recall`, `occurrences` and `words`.

    **Token sets.** A feature without a concept is labelled `fires on: ' king', ' queen'` if its firings are mostly on a
    few tokens: at least 80 % of them on at most 8. The tokens are chosen on every other run of 16 windows and judged on
    the rest. The details of the label are `method` ("tokens"), `token_ids`, `tokens`, `precision`, `recall` and
    `firings`. Its score is the area under the ROC curve of firing or not.

    A word counts on the token that ends it, after a space, as written or with a capital; see `WordFinder`. Memory does
    not grow with the text: about 128 (2 C + 2) bytes per feature, for C concepts.

    Args:
        atlas: Atlas of the model. Its histograms decide how activations are binned, its examples which tokens to try.
        model: MFN model. It runs as it is: at its alpha, and with the interventions of the `steer` context around the
            call.
        tokenizer: The model's tokenizer.
        dataset: Windows of tokens, as for `FeatureAtlas.build`; the text may be another one than the atlas'.
        concepts: Name -> words, each a word or a list of its forms, which stay in one half.
        min_auroc: Smallest area under the ROC curve for a label.
        min_occurrences: Occurrences of a concept's words in each half, for the concept to take part.
        min_words: Different words of a concept in each half, for the concept to take part. They are counted as the
            equivalent number of equally frequent words (`effective_number`).
        tokens: Number of tokens to read, rounded up to whole windows; by default all.
        batch_size: Windows per batch.
        seed: Seed for the split into halves.
        progress: True to show a progress bar.

    Raises:
        ValueError: If concepts or settings are not valid, or the atlas is of another model.
    """
    _check(atlas, model, min_auroc, min_occurrences, min_words, tokens, batch_size)
    lexicon = Lexicon.of(concepts, seed)
    texts = token_texts(tokenizer)
    finder = WordFinder(lexicon, tokenizer, texts)
    counts = _Counts(atlas, lexicon, finder, max(model.config.vocab_size, len(texts)), seed)
    dataset, window = first_length(dataset)
    limit = None if tokens is None else -(-tokens // window)
    total = min(len(dataset), limit or len(dataset)) if isinstance(dataset, Dataset) else limit
    data = atlas.metadata["data"]
    skipped = Skipped(data["skip_first"], tuple(data.get("skip_tokens", ())))  # atlases of 0.1.0 count all tokens
    bar = tqdm(total=total, desc="labelling", unit="window", disable=not progress, leave=False)
    with bar, evaluating(model), torch.no_grad():
        for number, rows in enumerate(column_batches(dataset, window, batch_size, limit)):
            ids = rows["input_ids"]
            counts.add(*run_windows(model, rows, number * batch_size, skipped, np.zeros(len(ids), np.int32)))
            bar.update(len(ids))
    return counts.label(atlas, texts, min_auroc, min_occurrences, min_words)


class _WordCounts(NamedTuple):
    """Words of a concept in the text; pairs are held in, held out."""

    different: tuple[int, int]
    effective: tuple[float, float]
    occurrences: tuple[int, int]


class _Counts:
    """Counts of all layers, and the labels that follow from them."""

    def __init__(self, atlas: FeatureAtlas, lexicon: Lexicon, finder: WordFinder, vocabulary: int, seed: int) -> None:
        self.lexicon, self.finder = lexicon, finder
        self.token_half = token_halves(vocabulary, seed)
        """(V,): half of each token where it does not end a word."""
        self.word_half = np.append(lexicon.half, 0)
        """(L + 1,): half of each word; the last entry stands for no word."""
        self.word_counts = np.zeros(len(lexicon.words) + 1, np.int64)
        """(L + 1,): occurrences of each word; the last entry collects tokens that do not end a word."""
        self.kinds = np.zeros((2, 2), np.int64)
        """(2, 2): ordinary tokens, then words, in each half."""
        self.occurrences = np.zeros((2, vocabulary), np.int64)
        """(2, V): occurrences of each token in each half of the text."""
        shuffled = np.where(lexicon.shuffled < 0, -1, lexicon.shuffled + len(lexicon.names))
        self.columns = np.pad(np.hstack([lexicon.concepts, shuffled]), ((0, 1), (0, 0)), constant_values=-1)
        """(L + 1, 2 J): concepts of each word, then those of the control; the last row stands for no word."""
        self.activations: dict[int, ActivationCounts] = {}
        self.token_sets: dict[int, TokenSetCounts] = {}
        layers = atlas.features["layer"].to_numpy()
        histograms = atlas.features["histogram"].combine_chunks().flatten().to_numpy().reshape(len(layers), -1)
        for layer in atlas.metadata["model"]["layers"]:
            histogram = histograms[layers == layer]
            self.activations[layer] = ActivationCounts(histogram, 2 * len(lexicon.names))
            self.token_sets[layer] = TokenSetCounts(example_tokens(atlas.examples, layer), len(histogram), vocabulary)

    def add(self, batch: TokenBatch, codes: dict[int, tuple[np.ndarray, np.ndarray]]) -> None:
        """Adds a batch of B windows."""
        ids = batch.input_ids.astype(np.int64)
        words = self.finder.find(ids).reshape(-1)
        ids, counted = ids.reshape(-1), batch.counted.reshape(-1)
        is_word, judged, word = (words >= 0).astype(np.int64), counted & (words != LEFT_OUT), np.maximum(words, -1)
        half = np.where(words >= 0, self.word_half[word], self.token_half[ids])
        places = Places(self.columns[word], is_word, half)
        np.add.at(self.kinds, (is_word[judged], half[judged]), 1)
        np.add.at(self.word_counts, word[counted], 1)
        windows = batch.first_window + np.arange(len(batch.input_ids))
        text_half = np.repeat(windows // WINDOWS_PER_RUN % 2, batch.input_ids.shape[1])
        np.add.at(self.occurrences, (text_half[counted], ids[counted]), 1)
        for layer, (indices, values) in codes.items():
            firings = Firings.of(indices, values, counted)
            self.token_sets[layer].add(firings, ids, text_half)
            on_judged = judged[firings.places]
            self.activations[layer].add(Firings(*(column[on_judged] for column in firings)), places)

    def label(
        self, atlas: FeatureAtlas, texts: list[str], min_auroc: float, min_occurrences: int, min_words: float
    ) -> LabellingReport:
        """Labels the atlas' features from the counts."""
        names = self.lexicon.names
        counted = [self._count_words(column) for column in range(2 * len(names))]
        occurrences = np.array([words.occurrences for words in counted], np.int64).reshape(-1, 2)
        enough = np.array(
            [min(words.occurrences) >= min_occurrences and min(words.effective) >= min_words for words in counted], bool
        )
        labels: list[Label] = []
        control = 0
        for layer, counts in self.activations.items():
            sets = self.token_sets[layer].token_sets(self.occurrences)
            if names:
                own, shuffled = slice(0, len(names)), slice(len(names), None)
                found = counts.separation(own, occurrences[own], self.kinds, enough[own])
                for feature in np.flatnonzero(_passes(found, min_auroc)).tolist():
                    labels.append(self._concept_label(layer, feature, found, counted))
                    sets.pop(feature, None)
                found = counts.separation(shuffled, occurrences[shuffled], self.kinds, enough[shuffled])
                control += int(_passes(found, min_auroc).sum())
            labels += [_token_label(layer, feature, tokens, texts) for feature, tokens in sets.items()]
        kept = [label for label in atlas.labels if label.source != "automatic"]
        atlas.labels = Labels([*kept, *labels])
        by_concept = [label.details.get("concept") for label in labels]
        figures = [
            ConceptFigures(name, *counted[at], bool(enough[at]), by_concept.count(name))
            for at, name in enumerate(names)
        ]
        unknown = [word for word, found in zip(self.lexicon.words, self.finder.found, strict=True) if not found]
        return LabellingReport(int(self.occurrences.sum()), figures, by_concept.count(None), control, unknown)

    def _count_words(self, column: int) -> _WordCounts:
        of_column = (self.columns[:-1] == column).any(1)
        halves = [self.word_counts[:-1][of_column & (self.lexicon.half == half)] for half in (HELD_IN, HELD_OUT)]
        first, second = halves
        return _WordCounts(
            (int((first > 0).sum()), int((second > 0).sum())),
            (effective_number(first), effective_number(second)),
            (int(first.sum()), int(second.sum())),
        )

    def _concept_label(self, layer: int, feature: int, found: Separation, counted: list[_WordCounts]) -> Label:
        figures = {name: float(column[feature]) for name, column in found._asdict().items() if name != "concept"}
        place = int(found.concept[feature])
        score = float(np.fmin(figures["auroc"], figures["auroc_words"]))
        details: dict[str, Any] = {"method": "concept", "concept": self.lexicon.names[place]}
        details |= {name: round(value, 6) for name, value in figures.items() if not np.isnan(value)}
        details |= {"occurrences": counted[place].occurrences[HELD_OUT], "words": counted[place].different[HELD_OUT]}
        return Label(format_feature(layer, feature), details["concept"], "automatic", round(score, 6), details)


def _passes(found: Separation, min_auroc: float) -> np.ndarray:
    smaller = np.fmin(np.fmin(found.auroc, found.auroc_words), found.auroc_held_in)
    return (np.where(np.isnan(smaller), -1.0, smaller) >= min_auroc) & (found.recall > 0)


def _token_label(layer: int, feature: int, found: TokenSet, texts: list[str]) -> Label:
    tokens = [texts[token] for token in found.token_ids]
    details: dict[str, Any] = {"method": "tokens", "token_ids": found.token_ids, "tokens": tokens}
    details |= {"precision": round(found.precision, 6), "recall": round(found.recall, 6), "firings": found.firings}
    text = "fires on: " + ", ".join(f"'{token}'" for token in tokens)
    return Label(format_feature(layer, feature), text, "automatic", round(found.auroc, 6), details)


def _check(
    atlas: FeatureAtlas,
    model: Any,
    min_auroc: float,
    min_occurrences: int,
    min_words: float,
    tokens: int | None,
    batch_size: int,
) -> None:
    if not is_a(model, MFNForCausalLM):
        raise ValueError(f"model is a {type(model).__name__}; features are those of an MFNForCausalLM")
    check_model(atlas.metadata, model, whole=True)
    if not 0 <= min_auroc <= 1:
        raise ValueError(f"min_auroc is {min_auroc}; it must be between 0 and 1")
    least = {"min_occurrences": min_occurrences, "min_words": min_words, "tokens": tokens, "batch_size": batch_size}
    for name, number in least.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")


__all__ = ["ConceptFigures", "LabellingReport", "label_features"]
