"""Labels of features, given by people, automatic measures and language models."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...model.checks import as_number, shown
from ...model.feature_names import FeatureName, format_feature, parse_feature

SOURCES = ("human", "imported", "automatic", "llm")
"""Sources of labels; a label of an earlier source is shown first."""
OWN_KEYS = ("feature", "label", "source", "score")
"""Keys of a label in `labels.json`."""
BELONGS_TO = "features_digest"
"""Key in `labels.json` of the name of the features that a label was given to."""


@dataclass(frozen=True)
class Label:
    """Name that one source gives to one feature; raises `ValueError` if a part of it is not valid."""

    feature: str
    """Name of the feature, `L6/1234`."""
    label: str
    """Raw text: escape it wherever it is rendered."""
    source: str = "human"
    """`human`, `imported`, `automatic`, or `llm:` and the name of a model."""
    score: float | None = None
    """Quality of the label on the scale of its source; larger is better."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Anything else the source says, such as precision and recall, as JSON can hold it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "feature", format_feature(*parse_feature(self.feature)))
        if not isinstance(self.label, str) or not self.label.strip():
            raise ValueError(f"label of {self.feature} is {shown(self.label)}; it must be text that is not empty")
        if not isinstance(self.source, str) or not re.fullmatch(r"(?s)human|imported|automatic|llm:.+", self.source):
            raise ValueError(
                f"source of the label of {self.feature} is {shown(self.source)}; "
                "it must be human, imported, automatic or llm:MODEL"
            )
        if self.score is not None:
            object.__setattr__(self, "score", as_number(f"score of the label of {self.feature}", self.score))
        if not isinstance(self.details, Mapping) or not _is_json(self.to_record()):
            raise ValueError(
                f"the label of {self.feature} is {shown(self.label)} with the details {shown(self.details)}; JSON in "
                "UTF-8 must be able to hold both"
            )
        taken = {*OWN_KEYS, BELONGS_TO} & set(self.details)
        if taken:
            raise ValueError(f"details of the label of {self.feature} cannot be called {', '.join(sorted(taken))}")

    def to_record(self) -> dict[str, Any]:
        """Label as one flat object of `labels.json`."""
        record = {"feature": self.feature, "label": self.label, "source": self.source, "score": self.score}
        return record | dict(self.details)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Label:
        """Reads an object of `labels.json`; `feature` and `label` are required."""
        if not isinstance(record, Mapping) or not isinstance(record.get("feature"), str) or "label" not in record:
            raise ValueError(f"{str(record)[:100]} is not a label; it needs a feature and a label")
        own = {name: record[name] for name in OWN_KEYS if name in record}
        details = {name: value for name, value in record.items() if name not in (*OWN_KEYS, BELONGS_TO)}
        return cls(**own, details=details)


def _is_json(record: dict[str, Any]) -> bool:
    """Returns True for a record that a file of labels can hold."""
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError):
        return False
    return True


class Labels:
    """Labels of an atlas. A feature has at most one label per source; a new label replaces the old one.

    ```python
    labels["L6/1234"]       # all labels of a feature, the one to show first
    labels.best("L6/1234")  # the label to show, or None
    for label in labels:    # all labels, by feature
        ...
    ```
    """

    def __init__(self, labels: Iterable[Label] = ()) -> None:
        self._by_feature: dict[tuple[int, int], dict[str, Label]] = {}
        for label in labels:
            self.add(label)

    def add(self, label: Label) -> None:
        """Adds a label; it replaces the feature's earlier label of the same source."""
        self._by_feature.setdefault(parse_feature(label.feature), {})[label.source] = label

    def remove(self, feature: FeatureName, source: str) -> None:
        """Removes a source's label of a feature; raises `ValueError` if there is none."""
        found = self._by_feature.get(parse_feature(feature), {})
        if source not in found:
            raise ValueError(f"{format_feature(*parse_feature(feature))} has no label of source {source!r}")
        del found[source]

    def __getitem__(self, feature: FeatureName) -> list[Label]:
        """Labels of a feature, the one to show first: human before imported, automatic and llm, then by score."""
        return sorted(self._by_feature.get(parse_feature(feature), {}).values(), key=display_order)

    def best(self, feature: FeatureName) -> Label | None:
        """Label of a feature to show, or `None`."""
        return next(iter(self[feature]), None)

    def shown(self) -> dict[str, str]:
        """Text of the label to show, for each feature that has a label: feature -> text."""
        # reversed, so that the label to show, which comes first, is written last
        return {each.feature: each.label for each in reversed(list(self))}

    def __iter__(self) -> Iterator[Label]:
        for feature in sorted(self._by_feature):
            yield from self[feature]

    def __len__(self) -> int:
        return sum(map(len, self._by_feature.values()))


def display_order(label: Label) -> tuple[int, float, str]:
    """Sort key of labels; the label to show has the smallest."""
    score = -math.inf if label.score is None else label.score
    return SOURCES.index(label.source.partition(":")[0]), -score, label.source


__all__ = ["Label", "Labels", "display_order"]
