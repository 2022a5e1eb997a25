"""`FeatureAtlas`: everything known about every feature of a model."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ...model.feature_names import FeatureName, format_feature, parse_feature
from ...model.interventions import Intervention, Interventions
from ...utils.extras import needs
from . import groups, storage
from .belonging import check_model
from .feature_index import FeatureIndex, feature_key, feature_keys
from .label_files import read_label_file
from .labels import Label, Labels
from .records import Example, ExampleLimits, FeatureRecord
from .search import SearchResult, search
from .text_reading import TextReading

if TYPE_CHECKING:
    import pandas as pd


class FeatureAtlas:
    """Everything known about every feature of a model.

    An atlas says how often, how strongly and where a feature fires, and together with which other features. It says
    which next tokens a feature promotes, and how the feature is labelled.

    ```python
    atlas = FeatureAtlas.build(model, tokenizer, windows)
    atlas.label("L6/1234", "animals")
    atlas.save_pretrained("gpt2-mfn")                    # writes gpt2-mfn/features/

    atlas = FeatureAtlas.from_pretrained("gpt2-mfn")     # or a repository on the Hub; needs no torch
    atlas["L6/1234"].promoted
    atlas.to_pandas().sort_values("firing_rate")
    ```

    Attributes:
        metadata: Content of `atlas.json`.
        features: pyarrow table with one row per feature.
        examples: pyarrow table with one row per example.
        labels: The `Labels` of all features.
    """

    def __init__(
        self, metadata: dict[str, Any], features: pa.Table, examples: pa.Table | Path, labels: Labels | None = None
    ) -> None:
        self.metadata = metadata
        self.features = features
        self.labels = Labels() if labels is None else labels
        self._index = FeatureIndex(features)
        self._examples = examples  # a folder until the examples are asked for
        self._harvest_state: Path | None = None

    @classmethod
    def build(
        cls,
        model: Any,
        tokenizer: Any,
        dataset: Any,
        *,
        tokens: int | None = None,
        batch_size: int = 8,
        skip_first: int = 1,
        skip_tokens: Collection[int] | None = None,
        examples: ExampleLimits | None = None,
        state_folder: str | os.PathLike[str] | None = None,
        resume: bool = False,
        save_every: int = 2048,
        progress: bool = True,
    ) -> FeatureAtlas:
        """Builds the atlas of a model in one pass over a data set.

        The model runs as it is: at its alpha, and with the interventions of the `steer` context around the call. Memory
        does not grow with the data: a feature has counters, a histogram and a limited number of examples, some 20 kB
        with the default limits. Under `accelerate launch` each of P processes takes every P-th batch. All of them
        return the same atlas, bit for bit that of a single process.

        Args:
            model: MFN model with an LM head, on the device where it is to run.
            tokenizer: The model's tokenizer.
            dataset: Data set, or any iterable, of windows of one length T, as `modeling_mfn.pack` makes them.
                A window has `input_ids` (T,). It may have `attention_mask` (T,) for padding, and `source`, the name of
                its corpus, so that firings are counted per source.
            tokens: Number of tokens to read, rounded up to whole windows; by default all.
            batch_size: Windows per batch.
            skip_first: Tokens at the start of each window that are left out of all statistics. Attention rests on the
                first token. Its residual is like no other, and features that fire on it would seem frequent and strong.
            skip_tokens: Token ids that are left out of all statistics, wherever they stand. By default the tokenizer's
                special tokens: inside packed windows their residual is as unusual. `()` counts all tokens.
            examples: Limits on the number of examples per feature and on their context.
            state_folder: Folder that keeps the state of the harvest. `save_pretrained` of the atlas removes it.
            resume: True to go on from the state in `state_folder`, if there is one. Model, data, settings and number of
                processes must be the same. The result is the same, bit for bit.
            save_every: Windows between two savings of the state.
            progress: True to show a progress bar.

        Raises:
            ValueError: If data or settings are not valid, or if a state belongs to another harvest.
        """
        from ..harvest.build import harvest_tables
        from ..harvest.harvest import HarvestOptions

        limits = examples or ExampleLimits()
        folder = None if state_folder is None else Path(state_folder)
        skipped = tuple(set(tokenizer.all_special_ids if skip_tokens is None else skip_tokens))
        options = HarvestOptions(tokens, batch_size, skip_first, skipped, limits, folder, resume, save_every, progress)
        atlas = cls(*harvest_tables(model, tokenizer, dataset, options))
        atlas._harvest_state = folder
        return atlas

    @classmethod
    def from_pretrained(
        cls, folder_or_repo: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
    ) -> FeatureAtlas:
        """Reads an atlas without its model.

        Args:
            folder_or_repo: Folder that contains `features/`, or that folder itself, or a repository on the Hub. Only
                `features/` is downloaded from a repository.
            revision: Branch, tag or commit of a repository.
            token: Access token for a repository, as in `huggingface_hub`.

        Raises:
            ValueError: If there is no atlas, if it is damaged, or if its schema is newer than this package.
        """
        folder = storage.find_folder(folder_or_repo, revision, token)
        metadata = storage.read_metadata(folder)
        labels = storage.read_labels(folder / storage.LABELS_FILE, storage.features_of(metadata))
        return cls(metadata, storage.read_features(folder), folder, labels)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `folder/features/`, next to the model's weights, and replaces an atlas there as a whole.

        If several processes built the atlas, let one of them save it.
        """
        storage.write_atlas(Path(folder), self.metadata, self.features, self.examples, self.labels)
        if self._harvest_state is not None:
            storage.remove_harvest(self._harvest_state)
            self._harvest_state = None

    @cached_property
    def examples(self) -> pa.Table:
        """Examples of all features, (layer, index) ascending; read from disk when first used."""
        return storage.read_examples(self._examples) if isinstance(self._examples, Path) else self._examples

    def example_tables(self) -> Iterator[pa.Table]:
        """Yields the examples in their order, table by table. Those on disk are not all held in memory."""
        if isinstance(self._examples, Path) and "examples" not in self.__dict__:
            yield from storage.example_tables(self._examples)
        else:
            rows = storage.ROWS_PER_GROUP
            yield from (self.examples.slice(start, rows) for start in range(0, len(self.examples), rows))

    @cached_property
    def _example_keys(self) -> np.ndarray:
        return feature_keys(self.examples)

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[str]:
        """Yields the names of all features."""
        return iter(self._index)

    def __contains__(self, feature: FeatureName) -> bool:
        return feature in self._index

    def __getitem__(self, feature: FeatureName) -> FeatureRecord:
        """Everything about one feature, `(layer, index)` or `"L6/1234"`; `ValueError` if there is no such feature."""
        return FeatureRecord(**self.row(feature), labels=self.labels[feature], examples=self._examples_of(feature))

    def row(self, feature: FeatureName) -> dict[str, Any]:
        """Row of a feature in `features`, without its examples and labels; `ValueError` if there is no such feature."""
        return self._index.row(feature)

    def label(
        self, feature: FeatureName, label: str, *, source: str = "human", score: float | None = None, **details: Any
    ) -> None:
        """Labels a feature and replaces its earlier label of this source. `save_pretrained` keeps the label.

        Args:
            feature: `(layer, index)` or `"L6/1234"`.
            label: Text of the label.
            source: `human`, `imported`, `automatic`, or `llm:` and the name of a model.
            score: Quality of the label on the scale of its source; larger is better.
            details: Anything else the source says, as JSON can hold it.

        Raises:
            ValueError: If there is no such feature, or a part of the label is not valid.
        """
        self._index.check(feature)
        self.labels.add(Label(format_feature(*parse_feature(feature)), label, source, score, details))

    def import_labels(self, file: str | os.PathLike[str]) -> int:
        """Adds the labels of a file as source `imported`.

        Args:
            file: .csv, .json or .jsonl, also with .gz, or an export of Neuronpedia.
                `modeling_mfn.features.atlas.label_files.read_label_file` describes the content.

        Returns:
            Number of features that were labelled.

        Raises:
            ValueError: If the file cannot be read, or one of its features does not exist. No label is added then.
        """
        labels = read_label_file(file)
        for label in labels:
            self._index.check(label.feature)
        for label in labels:
            self.labels.add(label)
        return len(labels)

    def search(self, query: str, limit: int = 20) -> SearchResult:
        """Finds the features that a query is about; upper and lower case are the same.

        Results come in four groups: the query is the whole label; it is whole words of a label; it is part of a word of
        a label; or the feature fires on it or promotes it. Within a group, features are ranked by a sum of two figures.
        One is the share of top examples whose token begins with the query. The other is 1 / place of the first such
        token among those promoted. The feature that fires more often comes first among equals.

        Args:
            query: One or more words.
            limit: Largest number of results.

        Returns:
            A list of `Found`: the feature, a label, and the figures it was ranked by. rich prints it as a table.
        """
        return search(self.features, self.examples, self.labels, query, limit)

    def top(self, text: str, model: Any, tokenizer: Any, k: int = 5) -> TextReading:
        """Reads a text through its features: which are active on each token, and what they do to the next token.

        The model runs once: at its alpha, and with the interventions of the `steer` context around the call. The first
        token's features say little, because attention rests on it.

        Args:
            text: The text to read.
            model: The model of this atlas.
            tokenizer: The model's tokenizer.
            k: Features per token: those with the largest activation relative to their largest one in the atlas.

        Returns:
            A list of `ReadToken`, each with its `ActiveFeature`s. rich prints it; `to_records()` is for JSON.
        """
        from ..reading import read_text

        check_model(self.metadata, model)
        scales = {int(layer): figures["logit_scale"] for layer, figures in self.metadata["layers"].items()}
        return read_text(text, model, tokenizer, k, self._index, self.labels, scales)

    def group(self, label: str, model: Any = None) -> list[str]:
        """Names of the features that show a label and are not pruned, by layer and index.

        Args:
            label: Text of the label; upper and lower case are the same.
            model: Model, or its config, whose pruned features are left out. By default those that were pruned when the
                atlas was built.

        Raises:
            ValueError: If no feature shows this label, or only pruned ones do; if the atlas is of another model.
        """
        if model is not None:
            check_model(self.metadata, model)
        return groups.group(self._index, self.labels, label, model)

    def steering(
        self, interventions: Interventions, unit: str = "typical", model: Any = None
    ) -> dict[tuple[int, int], Intervention]:
        """Makes interventions for `model.steer` out of features and of labels, which stand for all their features.

        ```python
        with model.steer(atlas.steering({"animals": Clamp(2.0), "L6/7": Ablate()}, model=model)):
            ...
        ```

        Args:
            interventions: Feature, `(layer, index)` or `"L6/1234"`, or label -> intervention, as an object or as JSON.
                A feature given by its name gets its own intervention, whatever groups it is in.
            unit: Unit of the values of `Clamp` and `Add`. `"typical"` is each feature's own mean activation over the
                tokens on which it is active in the atlas; `"activation"` leaves values as they are.
            model: Model, or its config, that is to be steered. Its pruned features are left out of groups, by default
                those that were pruned when the atlas was built.

        Raises:
            ValueError: If a label has no feature that is not pruned, or a feature does not exist or is meant twice.
                Also if a feature has no typical activation, but its intervention needs one, and if the atlas is of
                another model.
        """
        if model is not None:
            check_model(self.metadata, model)
        return groups.steering(self._index, self.labels, interventions, unit, model)

    def to_pandas(self, table: str = "features") -> pd.DataFrame:
        """Features, or with `"examples"` the examples, as a pandas DataFrame with one row each.

        The table of features also has the `label` to show and its `label_source`.
        """
        with needs("evaluate"):
            import pandas as pd  # noqa: F401  # pyarrow makes the frame with it
        if table == "examples":
            return self.examples.to_pandas()
        if table != "features":
            raise ValueError(f'table is {table!r}; it must be "features" or "examples"')
        best = [self.labels.best(name) for name in self]
        frame = self.features.to_pandas()
        frame["label"] = [label and label.label for label in best]
        frame["label_source"] = [label and label.source for label in best]
        return frame

    def __repr__(self) -> str:
        layers, data = self.metadata["model"]["layers"], self.metadata["data"]
        return (
            f"FeatureAtlas({len(self)} features of layers {layers}, {data['tokens']} tokens, {len(self.labels)} labels)"
        )

    def _examples_of(self, feature: FeatureName) -> list[Example]:
        key = feature_key(*parse_feature(feature))
        start, end = np.searchsorted(self._example_keys, [key, key + 1])
        rows = self.examples.slice(start, end - start).drop_columns(["layer", "index"]).to_pylist()
        return [Example(**row) for row in rows]


def find_atlas(model: str | os.PathLike[str]) -> FeatureAtlas | None:
    """Reads the atlas in a model's folder or repository on the Hub; returns `None` if there is none.

    Raises:
        ValueError: If the atlas is damaged or cannot be read.
    """
    try:
        return FeatureAtlas.from_pretrained(model)
    except storage.AtlasNotFoundError:
        return None


__all__ = ["FeatureAtlas", "find_atlas"]
