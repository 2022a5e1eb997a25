"""Schema of an atlas on disk: version, files, columns. `docs/reference/atlas_files.md` describes it to readers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 1
FOLDER = "features"
METADATA_FILE, FEATURES_FILE = "atlas.json", "features.parquet"
EXAMPLES_FILE, LABELS_FILE = "examples.parquet", "labels.json"
HARVEST_FILES = "harvest-*-of-*.safetensors"
"""Names of the files, one per process, that keep the state of a harvest."""

BINS_PER_OCTAVE, FIRST_OCTAVE, LAST_OCTAVE = 4, -12, 16
HISTOGRAM_EDGES = np.exp2(
    np.arange(FIRST_OCTAVE * BINS_PER_OCTAVE, LAST_OCTAVE * BINS_PER_OCTAVE + 1) / BINS_PER_OCTAVE
).astype(np.float32)
"""Edges e_0 ... e_112 between histogram bins: 2^-12 to 2^16, four bins per octave. Bin b counts activations in
[e_(b-1), e_b), bin 0 those below e_0, bin 113 those from e_112 on. All atlases have the same edges, so that counts of
two harvests add up exactly."""
NUM_BINS = len(HISTOGRAM_EDGES) + 1
NUM_STRATA = LAST_OCTAVE - FIRST_OCTAVE + 2
"""Strata of examples: the octaves [2^n, 2^(n+1)) of the histogram, one stratum below them and one above."""


def bin_of(activations: np.ndarray) -> np.ndarray:
    """Histogram bin of each activation, 0 to `NUM_BINS` - 1."""
    return np.searchsorted(HISTOGRAM_EDGES, activations, side="right")


def stratum_of(bins: np.ndarray) -> np.ndarray:
    """Stratum of each histogram bin, 0 to `NUM_STRATA` - 1."""
    return (bins + BINS_PER_OCTAVE - 1) // BINS_PER_OCTAVE


def stratum_edges() -> np.ndarray:
    """Lower end of each stratum; 0 for the first."""
    return np.concatenate([[0.0], np.exp2(np.arange(FIRST_OCTAVE, LAST_OCTAVE + 1))])


def _field(name: str, kind: Any, description: str) -> pa.Field:
    return pa.field(name, kind, metadata={"description": description})


_TEXT = pa.dictionary(pa.int32(), pa.string())
_EFFECTS = pa.list_(pa.struct([("token_id", pa.int32()), ("token", pa.string()), ("effect", pa.float32())]))
_NEIGHBOURS = pa.list_(pa.struct([("index", pa.int32()), ("cosine", pa.float32())]))
_PARTNERS = pa.list_(pa.struct([("index", pa.int32()), ("jaccard", pa.float32()), ("count", pa.int64())]))

FEATURES = pa.schema(
    [
        _field("layer", pa.int32(), "block of the backbone, from 0"),
        _field("index", pa.int32(), "feature within its MFN layer, from 0"),
        _field("name", pa.string(), "`L<layer>/<index>`"),
        _field("status", pa.string(), "alive: active on a counted token; dead: on none; pruned: out of the model"),
        _field("firing_count", pa.int64(), "counted tokens on which the feature is active"),
        _field("source_counts", pa.list_(pa.int64()), "firing_count by source, ordered as data.sources in atlas.json"),
        _field("firing_rate", pa.float64(), "firing_count / data.tokens"),
        _field(
            "mean_activation",
            pa.float64(),
            "mean over the tokens on which the feature is active, or null",
        ),
        _field("max_activation", pa.float32(), "largest activation, or null if the feature is never active"),
        _field("histogram", pa.list_(pa.int64()), "number of activations in each bin of histogram_edges in atlas.json"),
        _field("promoted", _EFFECTS, "next tokens that the feature makes likelier, the most first"),
        _field("suppressed", _EFFECTS, "next tokens that the feature makes less likely, the most first"),
        _field("nearest", _NEIGHBOURS, "features of the same layer by cosine of their directions, the nearest first"),
        _field("co_active", _PARTNERS, "features of the same layer active on the same tokens, by Jaccard index"),
    ]
)
EXAMPLES = pa.schema(
    [
        _field("layer", pa.int32(), "as in features.parquet"),
        _field("index", pa.int32(), "as in features.parquet"),
        _field("kind", pa.string(), "top: largest activations, one per window; stratum: uniform sample of an octave"),
        _field("stratum", pa.float32(), "lower end of the octave of activations; null for top"),
        _field("rank", pa.int32(), "place within the kind, from 0; top: by activation; stratum: in random order"),
        _field("activation", pa.float32(), "activation on the token that the example is about"),
        _field("window", pa.int64(), "number of the window of text, in the order of the data, from 0"),
        _field("position", pa.int32(), "place of the token in its window, from 0"),
        _field("source", pa.string(), "source of the window's text; null if the data has no column `source`"),
        _field("offset", pa.int32(), "place of the token in the three lists below"),
        _field("token_ids", pa.list_(pa.int32()), "ids of the token and of the tokens around it"),
        _field("tokens", pa.list_(_TEXT), "these tokens as raw text: escape it wherever it is rendered"),
        _field(
            "activations",
            pa.list_(pa.float32()),
            "activation on each of these tokens; 0 where not counted",
        ),
    ]
)

NEURONPEDIA = {
    "layer": "layer",
    "index": "index",
    "frac_nonzero": "firing_rate",
    "maxActApprox": "max_activation",
    "pos_str": "promoted[].token",
    "pos_values": "promoted[].effect",
    "neg_str": "suppressed[].token",
    "neg_values": "suppressed[].effect",
    "freq_hist_data_bar_heights": "histogram",
    "freq_hist_data_bar_values": "middles between histogram_edges in atlas.json",
    "topkCosSimIndices": "nearest[].index",
    "topkCosSimValues": "nearest[].cosine",
    "tokens": "tokens in examples.parquet",
    "values": "activations in examples.parquet",
    "maxValue": "largest of activations in examples.parquet",
    "qualifyingTokenIndex": "offset in examples.parquet",
    "dataSource": "source in examples.parquet",
    "dataIndex": "window in examples.parquet",
}
"""Field of Neuronpedia -> place of the same content in an atlas."""


def check_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Checks a table that was read from a file, and returns its columns in the schema's order.

    Further columns are left out, so that a minor addition in later versions does not make a file unreadable.

    Raises:
        ValueError: If a column is missing or of another type, or a layer or an index is null.
    """
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise ValueError(f"it has no column {', '.join(missing)}, so it is not a table of an atlas")
    table = table.select(schema.names)
    for field in schema:
        if table.schema.field(field.name).type != field.type:
            found = table.schema.field(field.name).type
            raise ValueError(f"its column {field.name} holds {found}, not {field.type}")
    if table["layer"].null_count or table["index"].null_count:
        raise ValueError("it has rows without a layer or an index")
    return table.cast(schema)


__all__ = [
    "EXAMPLES",
    "FEATURES",
    "HARVEST_FILES",
    "HISTOGRAM_EDGES",
    "NEURONPEDIA",
    "NUM_BINS",
    "NUM_STRATA",
    "SCHEMA_VERSION",
    "bin_of",
    "check_schema",
    "stratum_edges",
    "stratum_of",
]
