"""A small atlas as it lies on disk, with labels to order."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

LAYERS = {
    "0": {"dead_share": 0.125, "firing_rate_mean": 0.1, "firing_rate_cv": 1.5},
    "2": {"dead_share": 0.0, "firing_rate_mean": 0.1, "firing_rate_cv": 0.75},
}


def write_features(folder, labels, sources=("somebody/texts:small", "drama.txt"), tokens=(" king", " queen")):
    features = folder / "features"
    features.mkdir()
    atlas = {"schema_version": 1, "data": {"sources": list(sources), "tokens": 98765}, "layers": LAYERS}
    (features / "atlas.json").write_text(json.dumps(atlas))
    promoted = [{"token_id": place, "token": token, "effect": 1.0 - place} for place, token in enumerate(tokens)]
    rows = [
        {"layer": layer, "index": index, "firing_rate": index / 1000, "max_activation": 2.5, "promoted": promoted}
        for layer in (0, 2)
        for index in range(80)
    ]
    pq.write_table(pa.Table.from_pylist(rows), features / "features.parquet")
    (features / "labels.json").write_text(json.dumps(labels))


def label(feature, text, source="automatic", score=0.9):
    return {"feature": feature, "label": text, "source": source, "score": score}
