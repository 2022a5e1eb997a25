"""The atlas as files: written and read whole, without torch, with any text in it."""

import json
import shutil

import pyarrow as pa
import pytest
from atlas_data import HOSTILE
from fresh_process import run_fresh

from modeling_mfn import FeatureAtlas
from modeling_mfn.features.atlas import schema
from modeling_mfn.hub.atlas_summary import read_atlas


def small_atlas(texts=("a", "b"), name="one"):
    """Atlas of two features with invented figures; the first has an example with the given texts as tokens."""
    row = {"layer": 1, "status": "alive", "firing_count": 3, "source_counts": [3], "firing_rate": 0.3}
    row |= {"mean_activation": 2.0, "max_activation": 4.0, "histogram": [0] * schema.NUM_BINS}
    row |= {"nearest": [{"index": 1, "cosine": 0.5}], "co_active": [{"index": 1, "jaccard": 0.25, "count": 1}]}
    row |= {"promoted": [{"token_id": 5, "token": text, "effect": 0.5} for text in texts], "suppressed": []}
    dead = {"status": "dead", "firing_count": 0, "firing_rate": 0.0, "mean_activation": None, "max_activation": None}
    rows = [row | {"index": 0, "name": "L1/0"}, row | {"index": 1, "name": "L1/1"} | dead]
    example = {"layer": 1, "index": 0, "kind": "top", "stratum": None, "rank": 0, "activation": 4.0, "window": 7}
    example |= {"position": 3, "source": texts[0], "offset": 0, "token_ids": list(range(len(texts)))}
    example |= {"tokens": list(texts), "activations": [4.0] + [0.0] * (len(texts) - 1)}
    model = {"layers": [1], "num_features": 2, "features_digest": name}
    metadata = {"schema_version": schema.SCHEMA_VERSION, "model": model}
    metadata |= {"data": {"sources": [{"name": texts[0], "tokens": 10}], "tokens": 10, "skip_first": 1}}
    metadata |= {"layers": {"1": {"dead_share": 0.5, "logit_scale": 1.0}}}
    features = pa.Table.from_pylist(rows, schema.FEATURES)
    return FeatureAtlas(metadata, features, pa.Table.from_pylist([example], schema.EXAMPLES))


def test_saved_and_loaded(tmp_path):
    atlas = small_atlas(HOSTILE)
    atlas.label("L1/0", "animals", score=0.75, examples=["cat"])
    atlas.label((1, 0), "pets", source="automatic", score=0.99)
    atlas.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.rglob("*")) == [
        "atlas.json", "examples.parquet", "features", "features.parquet", "labels.json",
    ]  # fmt: skip
    for folder in (tmp_path, tmp_path / "features"):
        again = FeatureAtlas.from_pretrained(folder)
        assert again.metadata == atlas.metadata
        assert again["L1/0"] == atlas[1, 0]
        assert again["L1/1"].mean_activation is None
        assert again["L1/0"].examples[0].tokens == HOSTILE
        assert [label.label for label in again["L1/0"].labels] == ["animals", "pets"]
        assert again["L1/0"].labels[0].details == {"examples": ["cat"]}
    again.label("L1/0", "cats")  # a new human label replaces the old; the automatic one stays
    again.save_pretrained(tmp_path)  # replaces the files that it was read from
    frame = FeatureAtlas.from_pretrained(tmp_path).to_pandas().set_index("name")
    assert (frame.loc["L1/0", "label"], frame["label"].isna().tolist()) == ("cats", [False, True])
    assert frame.loc["L1/0", "promoted"][0]["token"] == HOSTILE[0]
    assert list(again.to_pandas("examples")["tokens"][0]) == HOSTILE
    assert [label.label for label in FeatureAtlas.from_pretrained(tmp_path).labels] == ["cats", "pets"]


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "datasets", "accelerate", "tokenizers", "scipy", "sklearn", "matplotlib"):
    sys.modules[name] = None  # makes every import of the package fail
"""
WITHOUT_PANDAS = """
class WithoutPandas:  # pyarrow asks for pandas, and can do without
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pandas":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, WithoutPandas())
"""


def test_an_atlas_needs_neither_torch_nor_other_large_packages(tmp_path):
    """An atlas is read, labelled, searched and saved without large packages. Only data frames need pandas."""
    atlas = small_atlas(["king", "<b>"])
    atlas.label("L1/1", "royalty")
    atlas.save_pretrained(tmp_path)
    work = f"""
import modeling_mfn.features.atlas
from modeling_mfn import FeatureAtlas
atlas = FeatureAtlas.from_pretrained({str(tmp_path)!r})
assert atlas["L1/1"].label == "royalty" and atlas["L1/0"].examples[0].token == "king"
assert [found.feature for found in atlas.search("royalty")] == ["L1/1"]
assert atlas.search("KING")[0][:5] == ("L1/0", None, 0, 1.0, 1.0), atlas.search("KING")
assert atlas.group("Royalty") == ["L1/1"]
atlas.label("L1/0", "nothing")
atlas.save_pretrained({str(tmp_path)!r})
try:
    from modeling_mfn import MFNConfig
except ImportError as error:
    assert "needs transformers" in str(error), error
"""
    run_fresh(WITHOUT_TORCH + WITHOUT_PANDAS + work, tmp_path)
    read = f"from modeling_mfn import FeatureAtlas\nframe = FeatureAtlas.from_pretrained({str(tmp_path)!r}).to_pandas()"
    run_fresh(WITHOUT_TORCH + read + '\nassert list(frame["label"]) == ["nothing", "royalty"]', tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "atlas.json").unlink(), "has no features/atlas.json"),
        (lambda folder: (folder / "atlas.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "atlas.json").write_text('{"schema_version": 2}'), "newer than 1"),
        (lambda folder: (folder / "features.parquet").write_bytes(b"PAR1"), "cannot be read"),
        (lambda folder: (folder / "labels.json").write_text('[{"label": "x"}]'), "is not a label"),
        (lambda folder: (folder / "features.parquet").write_bytes((folder / "examples.parquet").read_bytes()), "name"),
    ],
)
def test_damage_is_named(tmp_path, spoil, message):
    small_atlas().save_pretrained(tmp_path)
    spoil(tmp_path / "features")
    with pytest.raises(ValueError, match=message):
        FeatureAtlas.from_pretrained(tmp_path)


def test_an_atlas_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    small_atlas().save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in (tmp_path / "features").iterdir()}
    other = small_atlas(["other", "text"])
    other.metadata["data"]["sources"] = object()  # not JSON: writing fails at the last file
    with pytest.raises(TypeError):
        other.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in (tmp_path / "features").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["features"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda atlas: atlas["L1/2"], "L1/2 does not exist; layers are .1., features 0 to 1"),
        (lambda atlas: atlas.label("L2/0", "x"), "L2/0 does not exist"),
        (lambda atlas: atlas.label("L1/0", "  "), "not empty"),
        (lambda atlas: atlas.label("L1/0", "x", source="me"), "must be human, imported, automatic or llm:MODEL"),
        (lambda atlas: atlas.label("L1/0", "x", score=float("nan")), "finite"),
        (lambda atlas: atlas.labels.remove("L1/0", "human"), "has no label of source 'human'"),
        (lambda atlas: atlas.to_pandas("tokens"), "must be"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_atlas())


def test_a_label_file_is_plain_json(tmp_path):
    atlas = small_atlas()
    atlas.label("L1/1", HOSTILE[3], source="llm:some/model", score=0.5, precision=0.25)
    atlas.save_pretrained(tmp_path)
    (record,) = json.loads((tmp_path / "features" / "labels.json").read_text())
    assert record == {
        "feature": "L1/1", "label": HOSTILE[3], "source": "llm:some/model", "score": 0.5, "precision": 0.25,
        "features_digest": "one",
    }  # fmt: skip


def test_labels_of_other_features_are_refused(tmp_path):
    """A file of labels that is copied into another atlas is noticed; one of an earlier version does not say."""
    first, second = small_atlas(name="one"), small_atlas(name="another")
    first.label("L1/1", "mine")
    for name, atlas in (("first", first), ("second", second)):
        atlas.save_pretrained(tmp_path / name)
    file = tmp_path / "second" / "features" / "labels.json"
    shutil.copy(tmp_path / "first" / "features" / "labels.json", file)
    for read in (FeatureAtlas.from_pretrained, read_atlas):
        with pytest.raises(ValueError, match=r"labels\.json cannot be read: its labels are of the features one,"):
            read(tmp_path / "second")
    assert second.import_labels(file) == 1
    assert "features_digest" not in second.labels.best("L1/1").details
    records = json.loads(file.read_text())
    for record in records:
        del record["features_digest"]
    file.write_text(json.dumps(records))
    assert FeatureAtlas.from_pretrained(tmp_path / "second").labels.best("L1/1").label == "mine"
