"""Presets and labels, saved in the model's folder at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...features.atlas import storage
from ...features.atlas.schema import LABELS_FILE
from ...model.configuration_mfn import MFNConfig
from ...model.feature_names import format_feature
from ...model.presets import write_preset
from ...utils.files import write_whole
from .errors import Refused
from .explored import Explored
from .limits import MAX_PRESET_NAME
from .requests import PresetRequest

CONFIG_FILE = "config.json"
HUMAN = "human"
"""Source of the labels that people give."""
_saving = threading.Lock()


def presets(explored: Explored) -> dict[str, Any]:
    """Returns the presets of the model as JSON, without features that are pruned."""
    return {name: write_preset(preset) for name, preset in explored.model.presets.items()}


def save_preset(explored: Explored, name: str, request: PresetRequest) -> dict[str, Any]:
    """Saves a preset, also in place of an older one of this name.

    Raises:
        Refused: If nobody may save.
        ValueError: If the model cannot have such a preset.
    """
    if len(name) > MAX_PRESET_NAME:
        raise ValueError(f"the name has {len(name)} characters; a preset's name has {MAX_PRESET_NAME} at most")
    explored.steering(request.interventions)
    with _presets_changed(explored):
        if name in explored.model.config.steering_presets:
            explored.model.delete_preset(name)
        explored.model.save_preset(name, request.interventions, request.positions)
    return presets(explored)[name]


def delete_preset(explored: Explored, name: str) -> None:
    """Deletes a preset.

    Raises:
        Refused: If nobody may save, or if there is no such preset.
        ValueError: If the preset is active by default.
    """
    folder(explored)
    if name not in explored.model.config.steering_presets:
        raise Refused(404, f"there is no preset of the name {name!r}")
    if name == explored.model.config.active_preset:
        raise ValueError(f"{name!r} is the preset that is active by default; choose another with mfn steer --active")
    with _presets_changed(explored):
        explored.model.delete_preset(name)


@contextmanager
def _presets_changed(explored: Explored) -> Iterator[None]:
    """Writes the presets of the model into its folder at the end; after an error nothing has changed.

    The file's config may have other settings than the model in memory, such as its precision, and presets that another
    program saved meanwhile. So the file is read again, and only its presets change.
    """
    place, config = folder(explored), explored.model.config
    with _saving, _written():
        file = MFNConfig.from_pretrained(place)
        before = config.steering_presets, config.active_preset
        try:
            # no preset is active while the server runs; the name is given back below
            config.active_preset, config.steering_presets = None, dict(file.steering_presets)
            yield
            file.steering_presets = config.steering_presets
            write_whole(place / CONFIG_FILE, file.to_json_string())
        except BaseException:
            config.steering_presets = before[0]
            raise
        finally:
            config.active_preset = before[1] if before[1] in config.steering_presets else None


def labels(explored: Explored) -> dict[str, Any]:
    """Returns the labels that people gave: feature -> record, `None` where one was removed since the server began."""
    there = {label.feature: label.to_record() for label in explored.atlas.labels if label.source == HUMAN}
    return dict.fromkeys(sorted(explored.removed)) | there


def save_label(explored: Explored, layer: int, index: int, text: str) -> dict[str, Any]:
    """Saves a person's label of a feature with the atlas.

    Raises:
        Refused: If nobody may save, or if there is no such feature.
        ValueError: If the text cannot be a label.
    """
    feature = existing(explored, layer, index)
    with _labels_changed(explored):
        explored.atlas.label(feature, text, source=HUMAN)
    return labels(explored)[feature]


def delete_label(explored: Explored, layer: int, index: int) -> dict[str, Any] | None:
    """Deletes a person's label of a feature; returns the label that is shown now."""
    feature = existing(explored, layer, index)
    with _labels_changed(explored):
        if not labels(explored).get(feature):
            raise Refused(404, f"{feature} has no label that a person gave")
        explored.atlas.labels.remove(feature, HUMAN)
    explored.removed.add(feature)
    best = explored.atlas.labels.best(feature)
    return None if best is None else best.to_record()


@contextmanager
def _labels_changed(explored: Explored) -> Iterator[None]:
    """Writes labels into the folder of the atlas at the end; those that another program saved meanwhile are kept."""
    file = folder(explored) / storage.FOLDER / LABELS_FILE
    features = storage.features_of(explored.atlas.metadata)
    with _saving, _written():
        before = explored.atlas.labels
        explored.atlas.labels = storage.read_labels(file, features)
        try:
            yield
            storage.write_labels(file, explored.atlas.labels, features)
        except BaseException:
            explored.atlas.labels = before
            raise


@contextmanager
def _written() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(507, f"the model's folder cannot be written: {error.strerror}") from error


def folder(explored: Explored) -> Path:
    """Returns the folder in which presets and labels are saved; raises `Refused` if nobody may save."""
    if explored.folder is None:
        raise Refused(403, "presets and labels cannot be saved here; run mfn explore on a folder of your own")
    return explored.folder


def existing(explored: Explored, layer: int, index: int) -> str:
    """Returns the name of a feature; raises `Refused` if the atlas does not have it."""
    name = format_feature(layer, index)
    try:
        explored.atlas.row(name)
    except ValueError as error:
        raise Refused(404, str(error)) from None
    return name


__all__ = ["delete_label", "delete_preset", "existing", "labels", "presets", "save_label", "save_preset"]
