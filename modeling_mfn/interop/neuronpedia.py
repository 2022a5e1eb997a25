"""Atlases as batch files of Neuronpedia: JSON lines that its importer puts into the tables of its database."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..features.atlas import FeatureAtlas
from ..features.atlas.belonging import check_model
from ..features.atlas.labels import Label
from ..features.atlas.records import Example, FeatureRecord
from ..features.atlas.schema import HISTOGRAM_EDGES, NUM_BINS, stratum_edges, stratum_of
from ..features.public_names import SOURCE_SET, neuronpedia_model, neuronpedia_source
from ..model.configuration_mfn import MFNConfig
from ..model.version import __version__
from .hooks import hook_name

FEATURES_PER_FILE = 1024
CREATOR = "clkht01d40000jv08hvalcvly"
"""Default user of Neuronpedia, to whom its own converters give what they write."""
TOP_BIN = -1.0
"""Lower end, and share of tokens, that Neuronpedia gives to the examples with the largest activations."""
EXPORT_FILE = "mfn_export.json"
"""Name of the file that says of which features an export is. Its presence lets `--overwrite` replace the export."""


def export_neuronpedia(atlas: FeatureAtlas, config: MFNConfig, folder: Path, name: str | None = None) -> None:
    """Writes an atlas in the layout of Neuronpedia's exports, one folder `<layer>-mfn` per layer.

    Each has `model.jsonl`, `sourceset.jsonl`, `source.jsonl`, and files `batch-<n>.jsonl.gz` of 1,024 features in
    `features/`, `activations/` and `explanations/`. Columns that the atlas cannot fill are left out, so that they get
    the database's defaults. Pruned features are left out. The same atlas gives the same bytes.

    Args:
        atlas: Atlas of the model.
        config: Config of the model.
        folder: Empty folder that becomes Neuronpedia's folder of the model.
        name: Name of the model. Default: the one in the atlas.

    Raises:
        ValueError: If the atlas is of another model.
    """
    check_model(atlas.metadata, config, name or "", whole=True)
    name = name or atlas.metadata["model"].get("name_or_path")
    tokens = atlas.metadata["data"]["tokens"]
    for layer in config.layers:
        place = folder / neuronpedia_source(layer)
        keys = {"modelId": neuronpedia_model(name), "layer": neuronpedia_source(layer)}
        _write_lines(place / "model.jsonl", [_model(name, config)])
        _write_lines(place / "sourceset.jsonl", [_source_set(name, config)])
        _write_lines(place / "source.jsonl", [_source(name, atlas, config, layer)])
        for number, batch in enumerate(_batches(atlas, layer)):
            file = f"batch-{number}.jsonl.gz"
            _write_lines(place / "features" / file, (_feature(record, config, keys) for record in batch))
            activations = (_activation(record, each, tokens, keys) for record in batch for each in record.examples)
            explanations = (_explanation(record, each, keys) for record in batch for each in record.labels)
            _write_lines(place / "activations" / file, map(_with_id, activations))
            _write_lines(place / "explanations" / file, map(_with_id, explanations))
    origin = {"format": "neuronpedia", "mfn_version": __version__, "model": name, **_digest(atlas)}
    (folder / EXPORT_FILE).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def _batches(atlas: FeatureAtlas, layer: int) -> Iterator[list[FeatureRecord]]:
    """Yields the features of a layer that are not pruned, by index."""
    prefix = f"L{layer}/"
    records = (atlas[name] for name in atlas if name.startswith(prefix))
    there = (record for record in records if record.status != "pruned")
    while batch := list(islice(there, FEATURES_PER_FILE)):
        yield batch


def _digest(atlas: FeatureAtlas) -> dict[str, Any]:
    return {"features_digest": atlas.metadata["model"].get("features_digest")}


def _owner(name: str | None) -> str:
    """Owner in an id on the Hub; "" where none is known, since Neuronpedia asks for text."""
    return (name or "").rpartition("/")[0]


def _model(name: str | None, config: MFNConfig) -> dict[str, Any]:
    base = config.text_config
    shown = name or neuronpedia_model(name)
    return {
        "id": neuronpedia_model(name),
        "displayName": shown,
        "displayNameShort": shown.rpartition("/")[2],
        "owner": _owner(name),
        "layers": base.num_hidden_layers,
        "neuronsPerLayer": 0,  # the export has none
        "dimension": base.hidden_size,
        "visibility": "PUBLIC",
        "creatorId": CREATOR,
    }


def _source_set(name: str | None, config: MFNConfig) -> dict[str, Any]:
    return {
        "modelId": neuronpedia_model(name),
        "name": SOURCE_SET,
        "description": f"MFN layers with {config.num_features} features, at most {config.k} active per token",
        "creatorName": _owner(name),
        "allowInferenceSearch": False,  # no server of Neuronpedia runs the model
        "visibility": "PUBLIC",
        "creatorId": CREATOR,
    }


def _source(name: str | None, atlas: FeatureAtlas, config: MFNConfig, layer: int) -> dict[str, Any]:
    data = atlas.metadata["data"]
    named = [source["name"] for source in data["sources"] if source["name"] is not None]
    settings = {key: getattr(config, key) for key in ("k", "alpha", "codes", "input_norm", "blend_into")}
    return {
        "modelId": neuronpedia_model(name),
        "setName": SOURCE_SET,
        "id": neuronpedia_source(layer),
        "dataset": ", ".join(named) or None,
        "num_prompts": data.get("windows"),
        "num_tokens_in_prompt": data.get("window"),
        "hfRepoId": name if _owner(name) else None,
        "notes": json.dumps(settings | _digest(atlas)),
        "visibility": "PUBLIC",
        "creatorId": CREATOR,
    }


def _feature(record: FeatureRecord, config: MFNConfig, keys: dict[str, str]) -> dict[str, Any]:
    heights, values = _bars(record)
    return {
        **keys,
        "index": str(record.index),
        "sourceSetName": SOURCE_SET,
        "hookName": hook_name(config, record.layer),
        "maxActApprox": record.max_activation or 0.0,
        "frac_nonzero": record.firing_rate,
        "freq_hist_data_bar_heights": heights,
        "freq_hist_data_bar_values": values,
        "pos_str": [token["token"] for token in record.promoted],
        "pos_values": [token["effect"] for token in record.promoted],
        "neg_str": [token["token"] for token in record.suppressed],
        "neg_values": [token["effect"] for token in record.suppressed],
        "topkCosSimIndices": [near["index"] for near in record.nearest],
        "topkCosSimValues": [near["cosine"] for near in record.nearest],
        "creatorId": CREATOR,
    }


def _bars(record: FeatureRecord) -> tuple[list[int], list[float]]:
    """Heights of the bars, in tokens, and the middle of each bin, from the first to the last bin with a token."""
    filled = np.flatnonzero(record.histogram)
    if not len(filled):
        return [], []
    bins = slice(filled[0], filled[-1] + 1)
    edges = HISTOGRAM_EDGES.astype(np.float64)
    lower = np.concatenate([[0.0], edges])
    upper = np.concatenate([edges, [max(record.max_activation or 0.0, edges[-1])]])
    return record.histogram[bins], ((lower + upper) / 2)[bins].tolist()


def _activation(record: FeatureRecord, example: Example, tokens: int, keys: dict[str, str]) -> dict[str, Any]:
    largest = max(example.activations)  # of a random example, another token may have it
    own = example.activations[example.offset] == largest
    lower, upper, share = _interval(record, example, tokens)
    return {
        **keys,
        "index": str(record.index),
        "tokens": example.tokens,
        "values": example.activations,
        "maxValue": largest,
        "maxValueTokenIndex": example.offset if own else example.activations.index(largest),
        "minValue": min(example.activations),
        "qualifyingTokenIndex": example.offset,
        "binMin": lower,
        "binMax": upper,
        "binContains": share,
        "dataSource": example.source,
        "dataIndex": str(example.window),
        "creatorId": CREATOR,
    }


def _interval(record: FeatureRecord, example: Example, tokens: int) -> tuple[float, float, float]:
    """Interval of activations that an example stands for, and the share of all tokens with such an activation."""
    most = record.max_activation or 0.0
    if example.stratum is None:
        return TOP_BIN, most, TOP_BIN
    edges = stratum_edges()
    stratum = int(np.searchsorted(edges, example.stratum))
    upper = min(edges[stratum + 1], most) if stratum + 1 < len(edges) else most
    inside = stratum_of(np.arange(NUM_BINS)) == stratum
    return example.stratum, float(upper), int(np.array(record.histogram)[inside].sum()) / tokens


def _explanation(record: FeatureRecord, label: Label, keys: dict[str, str]) -> dict[str, Any]:
    """Row of a label. Its source and score stand in the notes, as other columns allow only names that are known."""
    told = {key: value for key, value in label.to_record().items() if key not in ("feature", "label")}
    row = {"index": str(record.index), "description": label.label, "notes": json.dumps(told)}
    return keys | row | {"authorId": CREATOR}


def _with_id(row: dict[str, Any]) -> dict[str, Any]:
    """Adds an id made from the content. An importer that meets the row again leaves it out."""
    content = json.dumps(row, sort_keys=True).encode()
    return {"id": "c" + hashlib.sha256(content).hexdigest()[:24], **row}


def _write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows as JSON lines; no file if there are none, since the importer reads columns from the first line."""
    content = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
    if content:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(content, mtime=0) if file.suffix == ".gz" else content)


__all__ = ["EXPORT_FILE", "export_neuronpedia"]
