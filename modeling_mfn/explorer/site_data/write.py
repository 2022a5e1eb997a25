"""The static folder of the explorer: its pages as they are, and the data of one model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...features.atlas import FeatureAtlas
from ...features.atlas.belonging import check_model
from ...features.atlas.storage import features_of
from ...features.public_names import public_name
from ...model.configuration_mfn import MFNConfig
from ...model.version import __version__
from ...utils.ours import SITE
from .data_files import file_of, write_packed, write_plain
from .examples import ExampleReader, read_examples
from .feature_pages import (
    FEATURES_PER_CHUNK,
    FeatureList,
    chunks_of,
    feature_pages,
    labels_of,
    number_of_parts,
)
from .model_page import model_page

ASSETS = Path(__file__).parents[1] / "assets"
"""Pages of the explorer and the libraries that they need."""
SCHEMA = 1
"""Version of the form of the data."""
LAYER_FIGURES = ("features", "dead_share", "active_features", "firing_rate_mean", "max_activation")
"""Figures of a layer that the pages show."""


def write_site(
    atlas: FeatureAtlas,
    model: Path,
    site: Path,
    *,
    name: str | None = None,
    evaluation: Path | None = None,
    live: bool = False,
) -> None:
    """Writes the explorer of a model into an empty folder, whose `index.html` opens from disk.

    Examples are read piece by piece, so that memory does not grow with them.

    Args:
        atlas: Atlas of the model.
        model: Folder with the model's `config.json`. Training record and perplexities are shown if they are there.
        site: Empty folder.
        name: Name of the model. Default: the name of the folder.
        evaluation: Folder that `mfn evaluate` wrote. Default: `evaluation` in the model's folder, if there is one.
        live: True if a server answers what needs the model.

    Raises:
        ValueError: If the atlas is of other features than the model's, or a file next to the model is damaged.
    """
    config = MFNConfig.from_pretrained(model)
    name = name or public_name(str(model)) or "model"
    check_model(atlas.metadata, config, name, whole=True)
    written = [path for path in ASSETS.rglob("*") if path.is_file()] if ASSETS.is_dir() else []
    files = [path.relative_to(ASSETS).as_posix() for path in written] + list(map(file_of, _names(atlas)))
    # first of all, so that a folder that a killed command leaves is known, too
    (site / SITE).write_text(json.dumps({"mfn_version": __version__, "files": sorted(files)}) + "\n", encoding="utf-8")
    if written:
        shutil.copytree(ASSETS, site, dirs_exist_ok=True)
    write_packed(site, "model", model_page(model, config, evaluation))
    labelled = _write_features(atlas, site)
    write_plain(site, "site", _about(atlas, config, name, labelled, live))


def _names(atlas: FeatureAtlas) -> Iterator[str]:
    """Yields the names of all data."""
    yield from ("site", "model")
    yield from (chunk.name for chunk in chunks_of(atlas.features))
    yield from (f"index/{part}" for part in range(number_of_parts(len(atlas))))


def _write_features(atlas: FeatureAtlas, site: Path) -> int:
    """Writes pages and list of all features; returns the number of those with a label."""
    reader, found = ExampleReader(atlas.example_tables()), FeatureList()
    for chunk in chunks_of(atlas.features):
        rows = atlas.features.slice(chunk.start, chunk.end - chunk.start)
        examples, labels = read_examples(reader.up_to(chunk.last_key)), labels_of(atlas.labels, rows)
        write_packed(site, chunk.name, feature_pages(rows, labels, examples))
        found.add(rows, labels, examples)
    for number, part in enumerate(found.parts()):
        write_packed(site, f"index/{number}", part)
    return found.labelled


def _about(atlas: FeatureAtlas, config: MFNConfig, name: str, labelled: int, live: bool) -> dict[str, Any]:
    """Facts that every page needs."""
    data, figures = atlas.metadata["data"], atlas.metadata["layers"]
    return {
        "schema": SCHEMA,
        "version": __version__,
        "name": name,
        "base": public_name(config.text_config._name_or_path),
        "live": live,
        "layers": [
            {"layer": layer} | {figure: figures[str(layer)].get(figure) for figure in LAYER_FIGURES}
            for layer in config.layers
        ],
        "k": config.k,
        "alpha": config.alpha,
        "codes": config.codes,
        "features_digest": features_of(atlas.metadata),
        "data": {part: data.get(part) for part in ("tokens", "windows", "window", "sources")},
        "histogram_edges": atlas.metadata.get("histogram_edges"),
        "chunk": FEATURES_PER_CHUNK,
        "index_parts": number_of_parts(len(atlas)),
        "features": len(atlas),
        "labelled": labelled,
    }


__all__ = ["write_site"]
