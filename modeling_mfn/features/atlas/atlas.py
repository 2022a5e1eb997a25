"""The atlas: what is known about every feature of a model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ...model.feature_names import FeatureName, format_feature, parse_feature
from . import storage
from .labels import Label, Labels

if TYPE_CHECKING:
    import pandas as pd

    from ...model.interventions import Intervention, Interventions
    from ..reading import TextReading
    from .search import SearchResult


@dataclass(frozen=True)
class Example:
    """A place in the text where a feature is active; fields as in `examples.parquet` (`docs/atlas.md`)."""

    kind: str
    stratum: float | None
    rank: int
    activation: float
    window: int
    position: int
    source: str | None
    offset: int
    token_ids: list[int]
    tokens: list[str]
    activations: list[float]

    @property
    def token(self) -> str:
        """The token that the feature is active on."""
        return self.tokens[self.offset]


@dataclass(frozen=True)
class FeatureRecord:
    """What the atlas knows about one feature; fields as in `features.parquet` (`docs/atlas.md`)."""

    layer: int
    index: int
    name: str
    status: str
    firing_count: int
    source_counts: list[int]
    firing_rate: float
    mean_activation: float | None
    max_activation: float | None
    histogram: list[int]
    promoted: list[dict[str, Any]]
    """Of `token_id`, `token` and `effect`, as are `suppressed`."""
    suppressed: list[dict[str, Any]]
    nearest: list[dict[str, Any]]
    """Of `index` and `cosine`."""
    co_active: list[dict[str, Any]]
    """Of `index`, `jaccard` and `count`."""
    labels: list[Label]
    """The one to show first."""
    examples: list[Example]
    """Those of kind `top`, the largest activation first, and then those of the strata."""

    @property
    def label(self) -> str | None:
        """The text of the label to show."""
        return self.labels[0].label if self.labels else None


class FeatureAtlas:
    """What is known about every feature of a model: how often and how strongly it fires, where, beside which others,
    what it does to the next token, and what it is called.

        atlas = FeatureAtlas.build(model, tokenizer, windows)
        atlas.label("L6/1234", "animals")
        atlas.save_pretrained("gpt2-mfn")                    # writes gpt2-mfn/features/

        atlas = FeatureAtlas.from_pretrained("gpt2-mfn")     # or a repository on the Hub; needs no torch
        atlas["L6/1234"].promoted
        atlas.to_pandas().sort_values("firing_rate")

    `metadata` is what `atlas.json` holds, `features` and `examples` are pyarrow tables, a row a feature and a row an
    example, and `labels` are the `Labels`. `docs/atlas.md` describes all of them.
    """

    def __init__(
        self, metadata: dict[str, Any], features: pa.Table, examples: pa.Table | Path, labels: Labels | None = None
    ) -> None:
        self.metadata = metadata
        self.features = features
        self.labels = Labels() if labels is None else labels
        self._examples = examples  # the folder they are in, until they are asked for
        names = zip(features["layer"].to_pylist(), features["index"].to_pylist(), strict=True)
        self._rows = {name: row for row, name in enumerate(names)}

    @classmethod
    def build(cls, model: Any, tokenizer: Any, dataset: Any, **options: Any) -> FeatureAtlas:
        """Makes the atlas of a model in one pass over a data set; `modeling_mfn.atlas.build.build_atlas` has the
        arguments."""
        from ..harvest.build import build_atlas

        return build_atlas(model, tokenizer, dataset, **options)

    @classmethod
    def from_pretrained(
        cls, folder_or_repo: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
    ) -> FeatureAtlas:
        """Reads an atlas without its model.

        Args:
            folder_or_repo: a folder that has `features/`, or that folder itself, or a repository on the Hub, of which
                only `features/` is downloaded.
            revision: of a repository: a branch, a tag or a commit.
            token: of a repository: as in `huggingface_hub`.

        Raises:
            ValueError: if there is no atlas, it is damaged, or its schema is newer than this package.
        """
        folder = storage.find_folder(folder_or_repo, revision, token)
        metadata = storage.read_metadata(folder)
        labels = storage.read_labels(folder / storage.LABELS_FILE)
        return cls(metadata, storage.read_features(folder), folder, labels)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `folder/features/`, beside the model's weights; an atlas that is there is replaced as a whole. Of
        several processes that built the same atlas, let one save it."""
        storage.write_atlas(Path(folder), self.metadata, self.features, self.examples, self.labels)

    @cached_property
    def examples(self) -> pa.Table:
        """The examples of all features, (layer, index) ascending; read from disk when they are first asked for."""
        return storage.read_examples(self._examples) if isinstance(self._examples, Path) else self._examples

    @cached_property
    def _example_keys(self) -> np.ndarray:
        return _sort_key(self.examples["layer"].to_numpy(), self.examples["index"].to_numpy())

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        """The names of all features."""
        return (format_feature(*name) for name in self._rows)

    def __contains__(self, feature: FeatureName) -> bool:
        return parse_feature(feature) in self._rows

    def __getitem__(self, feature: FeatureName) -> FeatureRecord:
        """All about one feature, `(layer, index)` or `"L6/1234"`. `ValueError` if the model has no such feature."""
        return FeatureRecord(**self.row(feature), labels=self.labels[feature], examples=self._examples_of(feature))

    def label(
        self, feature: FeatureName, label: str, *, source: str = "human", score: float | None = None, **details: Any
    ) -> None:
        """Labels a feature, in place of an earlier label of the same source; `save_pretrained` keeps it.

        Args:
            feature: `(layer, index)` or `"L6/1234"`.
            label: what it is about.
            source: `human`, `imported`, `automatic`, or `llm:` and the name of a model.
            score: how well the label describes the feature, on the scale of its source.
            details: what else the source says, as JSON has it.

        Raises:
            ValueError: if there is no such feature, or a part of the label cannot be.
        """
        self._row(feature)
        self.labels.add(Label(format_feature(*parse_feature(feature)), label, source, score, details))

    def import_labels(self, file: str | os.PathLike[str]) -> int:
        """Takes the labels of a file in, .csv, .json or .jsonl, or Neuronpedia's export, as source `imported`;
        `modeling_mfn.atlas.label_files.read_label_file` says what may be in it.

        Returns:
            How many features were labelled.

        Raises:
            ValueError: if the file cannot be read or one of its features does not exist; no label is taken in then.
        """
        from .label_files import read_label_file

        labels = read_label_file(file)
        for label in labels:
            self._row(label.feature)
        for label in labels:
            self.labels.add(label)
        return len(labels)

    def search(self, query: str, limit: int = 20) -> SearchResult:
        """The features that a query is about, whatever its case.

        First come features with a label that is the query, then those whose label has it as words of their own, then
        those whose label has it within a word, and then those that fire on it or promote it. Among equals, the sum of
        two figures decides: the share of a feature's top examples in which it fires on a token that begins with the
        query, and 1 / place of the first such token among those it promotes. Then the one that fires more often.

        Args:
            query: a word, or some.
            limit: features at most.

        Returns:
            A list of `Found`: feature, label, and the figures that it was ranked by. rich prints it as a table.
        """
        from .search import search

        return search(self, query, limit)

    def top(self, text: str, model: Any, tokenizer: Any, k: int = 5) -> TextReading:
        """Which features are active on a text, token by token, and what they do to the next token.

        The model runs once, at its alpha and under the `steer` context that is in force. The first token's features say
        little: attention rests on it.

        Args:
            text: the text.
            model: the atlas' model.
            tokenizer: its tokenizer.
            k: features a token, those whose activation is the largest share of their largest one in the atlas.

        Returns:
            A list of `ReadToken`, each with its `ActiveFeature`s. rich prints it; `to_records()` is for JSON.
        """
        from ..reading import read_text

        return read_text(self, text, model, tokenizer, k)

    def group(self, label: str, model: Any = None) -> list[str]:
        """The names of the features whose label to show is this one, whatever its case, by layer and index, without
        those that are pruned: in `model`, or, where none is given, when the atlas was made. `ValueError` if there are
        none, or none that is not pruned."""
        from .groups import group

        return group(self, label, model)

    def steering(
        self, interventions: Interventions, unit: str = "typical", model: Any = None
    ) -> dict[tuple[int, int], Intervention]:
        """Interventions for `model.steer`, on features and on all those of a label:

            with model.steer(atlas.steering({"animals": Clamp(2.0), "L6/7": Ablate()}, model=model)): ...

        Args:
            interventions: feature, `(layer, index)` or `"L6/1234"`, or label -> intervention, as an object or as JSON.
                A feature that is named by itself gets its own, whatever groups it is in.
            unit: of the values of `Clamp` and `Add`. `"typical"`: each feature's own mean activation over the tokens on
                which it is active in the atlas; `"activation"`: as they are.
            model: what it has pruned is left out of groups; its config will do. Without it, what was pruned when the
                atlas was made.

        Raises:
            ValueError: on a label that no feature has, or none that is not pruned, a feature that does not exist or is
                meant twice, and on one that the atlas never saw active where its typical activation is needed.
        """
        from .groups import steering

        return steering(self, interventions, unit, model)

    def row(self, feature: FeatureName) -> dict[str, Any]:
        """A feature's row of `features`, without its examples and labels."""
        (record,) = self.features.slice(self._row(feature), 1).to_pylist()
        return dict(record)

    def to_pandas(self, table: str = "features") -> pd.DataFrame:
        """The features, or with `"examples"` the examples, as a pandas DataFrame, a row each. Features come with the
        `label` to show and its `label_source`."""
        if table == "examples":
            return self.examples.to_pandas()
        if table != "features":
            raise ValueError(f'table is {table!r}; it must be "features" or "examples"')
        best = [self.labels.best(name) for name in self._rows]
        frame = self.features.to_pandas()
        frame["label"] = [label and label.label for label in best]
        frame["label_source"] = [label and label.source for label in best]
        return frame

    def __repr__(self) -> str:
        layers, data = self.metadata["model"]["layers"], self.metadata["data"]
        return (
            f"FeatureAtlas({len(self)} features of layers {layers}, {data['tokens']} tokens, {len(self.labels)} labels)"
        )

    def _row(self, feature: FeatureName) -> int:
        name = parse_feature(feature)
        if name not in self._rows:
            model = self.metadata["model"]
            raise ValueError(
                f"{format_feature(*name)} does not exist; layers are {model['layers']}, "
                f"features 0 to {model['num_features'] - 1}"
            )
        return self._rows[name]

    def _examples_of(self, feature: FeatureName) -> list[Example]:
        layer, index = parse_feature(feature)
        key = _sort_key(np.array([layer]), np.array([index]))[0]
        start, end = np.searchsorted(self._example_keys, [key, key + 1])
        rows = self.examples.slice(start, end - start).drop_columns(["layer", "index"]).to_pylist()
        return [Example(**row) for row in rows]


def find_atlas(model: str | os.PathLike[str]) -> FeatureAtlas | None:
    """The atlas that a model's folder, or its repository on the Hub, has; `None` if it has none. `ValueError` if it is
    damaged or cannot be read."""
    try:
        return FeatureAtlas.from_pretrained(model)
    except storage.AtlasNotFoundError:
        return None


def _sort_key(layer: np.ndarray, index: np.ndarray) -> np.ndarray:
    return (layer.astype(np.int64) << 32) | index


__all__ = ["Example", "FeatureAtlas", "FeatureRecord", "find_atlas"]
