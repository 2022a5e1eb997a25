"""A small atlas on disk, built from a model, with chosen labels."""

import copy
import functools
import json

import pyarrow as pa
from atlas_data import windows, word_tokenizer
from conftest import make_base, make_mfn

from modeling_mfn import FeatureAtlas
from modeling_mfn.features.atlas.schema import FEATURES


@functools.cache
def built():
    """Atlas of 80 features in blocks 0 and 2, from text of two sources."""
    model = make_mfn(make_base("llama-tied"), layers=[0, 2])
    return FeatureAtlas.build(model, word_tokenizer(), windows(), progress=False)


def write_features(folder, labels, sources=("somebody/texts:small", "drama.txt"), tokens=(" king", " queen")):
    """Writes the atlas with other names of sources and other promoted tokens. Returns its `metadata`."""
    metadata, features = copy.deepcopy(built().metadata), built().features
    for source, name in zip(metadata["data"]["sources"], sources, strict=True):
        source["name"] = name
    promoted = [{"token_id": place, "token": token, "effect": 1.0 - place} for place, token in enumerate(tokens)]
    column = pa.array([promoted] * len(features), FEATURES.field("promoted").type)
    features = features.set_column(FEATURES.names.index("promoted"), FEATURES.field("promoted"), column)
    FeatureAtlas(metadata, features, built().examples).save_pretrained(folder)
    (folder / "features" / "labels.json").write_text(json.dumps(labels))
    return metadata


def label(feature, text, source="automatic", score=0.9):
    return {"feature": feature, "label": text, "source": source, "score": score}
