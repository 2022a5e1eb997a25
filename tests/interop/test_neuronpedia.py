"""Export for Neuronpedia, read back and compared with the atlas, and with the text run through the model by hand."""

import gzip
import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from atlas_data import HOSTILE, windows, word_tokenizer
from conftest import make_base, make_mfn

from modeling_mfn import FeatureAtlas
from modeling_mfn.cli.main import main
from modeling_mfn.features.atlas import schema
from modeling_mfn.interop.neuronpedia import export_neuronpedia

TEXT, NUMBER, NUMBERS, TEXTS, WHOLE, MAYBE = str, float, list[float], list[str], int, None
MODEL = {
    "id", "displayName", "displayNameShort", "owner", "layers", "neuronsPerLayer", "dimension", "visibility",
    "creatorId",
}  # fmt: skip
SOURCE_SET = {"modelId", "name", "description", "creatorName", "allowInferenceSearch", "visibility", "creatorId"}
SOURCE = {
    "id", "modelId", "setName", "dataset", "num_prompts", "num_tokens_in_prompt", "hfRepoId", "notes", "visibility",
    "creatorId",
}  # fmt: skip
FEATURE = {
    "modelId": TEXT, "layer": TEXT, "index": TEXT, "sourceSetName": TEXT, "hookName": TEXT, "creatorId": TEXT,
    "maxActApprox": NUMBER, "frac_nonzero": NUMBER,
    "freq_hist_data_bar_heights": NUMBERS, "freq_hist_data_bar_values": NUMBERS,
    "pos_str": TEXTS, "pos_values": NUMBERS, "neg_str": TEXTS, "neg_values": NUMBERS,
    "topkCosSimIndices": NUMBERS, "topkCosSimValues": NUMBERS,
}  # fmt: skip
ACTIVATION = {
    "id": TEXT, "modelId": TEXT, "layer": TEXT, "index": TEXT, "tokens": TEXTS, "values": NUMBERS,
    "maxValue": NUMBER, "minValue": NUMBER, "maxValueTokenIndex": WHOLE, "qualifyingTokenIndex": WHOLE,
    "binMin": NUMBER, "binMax": NUMBER, "binContains": NUMBER, "dataSource": MAYBE, "dataIndex": TEXT,
    "creatorId": TEXT,
}  # fmt: skip
EXPLANATION = {
    "id": TEXT, "modelId": TEXT, "layer": TEXT, "index": TEXT, "description": TEXT, "notes": TEXT, "authorId": TEXT,
}  # fmt: skip
"""Columns of Neuronpedia's tables Model, SourceSet, Source, Neuron, Activation and Explanation that are filled.

They contain every column that is required and has no default."""


@pytest.fixture(scope="module")
def model():
    model = make_mfn(make_base("llama-tied"), layers=[0, 2])
    model.prune_features(0, [3, 4])
    return model


@pytest.fixture(scope="module")
def atlas(model):
    made = FeatureAtlas.build(model, word_tokenizer(), windows(), progress=False)
    made.label("L0/1", HOSTILE[0], score=0.5)
    made.label("L0/1", "pets", source="automatic", score=0.25, precision=0.75)
    made.label("L0/3", "of a pruned feature")
    made.label("L2/79", "last", source="llm:some/model")
    return made


@pytest.fixture(scope="module")
def exported(model, atlas, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export_neuronpedia(atlas, model.config, folder, "Some.Body/My GPT")
    return folder


def read(file):
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in content.splitlines()]


def rows(folder, table):
    return [row for file in sorted(folder.glob(f"*-mfn/{table}/batch-*.jsonl.gz")) for row in read(file)]


def is_of(value, kind):
    if kind in (NUMBERS, TEXTS):
        inner = str if kind is TEXTS else (int, float)
        return isinstance(value, list) and all(isinstance(each, inner) for each in value)
    return kind is MAYBE or isinstance(value, kind)


def test_rows_have_the_columns_of_neuronpedias_tables(exported):
    for table, columns in (("features", FEATURE), ("activations", ACTIVATION), ("explanations", EXPLANATION)):
        found = rows(exported, table)
        assert found
        for row in found:
            assert list(row) == list(found[0])  # the importer takes its columns from the first line
            assert {name for name, kind in columns.items() if is_of(row.get(name), kind)} == set(row)
    ids = [row["id"] for table in ("activations", "explanations") for row in rows(exported, table)]
    assert len(set(ids)) == len(ids)


def test_model_and_sources(exported, atlas):
    assert sorted(folder.name for folder in exported.iterdir()) == ["0-mfn", "2-mfn", "mfn_export.json"]
    for layer in (0, 2):
        (of_model,), (of_set,), (source,) = (
            read(exported / f"{layer}-mfn" / f"{name}.jsonl") for name in ("model", "sourceset", "source")
        )
        assert (set(of_model), set(of_set), set(source)) == (MODEL, SOURCE_SET, SOURCE)
        assert (of_model["id"], of_model["owner"], of_model["layers"], of_model["dimension"]) == (
            "my-gpt", "Some.Body", 3, 32,
        )  # fmt: skip
        assert (of_set["modelId"], of_set["name"]) == (source["modelId"], source["setName"]) == ("my-gpt", "mfn")
        assert (source["id"], source["num_prompts"], source["num_tokens_in_prompt"]) == (f"{layer}-mfn", 13, 16)
        assert (source["dataset"], source["hfRepoId"]) == ("alpha, beta", "Some.Body/My GPT")
        assert json.loads(source["notes"])["features_digest"] == atlas.metadata["model"]["features_digest"]


def test_features_are_those_of_the_atlas(exported, atlas):
    found = {f"L{row['layer'].removesuffix('-mfn')}/{row['index']}": row for row in rows(exported, "features")}
    assert set(found) == set(atlas) - {"L0/3", "L0/4"}
    edges = [0.0, *schema.HISTOGRAM_EDGES.tolist()]
    for name, row in found.items():
        record = atlas[name]
        assert row["hookName"] == f"blocks.{record.layer}.hook_resid_mid"
        assert (row["frac_nonzero"], row["maxActApprox"]) == (record.firing_rate, record.max_activation or 0)
        for side, effects in (("pos", record.promoted), ("neg", record.suppressed)):
            told = list(zip(row[f"{side}_str"], row[f"{side}_values"], strict=True))
            assert told == [(effect["token"], effect["effect"]) for effect in effects]
        near = list(zip(row["topkCosSimIndices"], row["topkCosSimValues"], strict=True))
        assert near == [(each["index"], each["cosine"]) for each in record.nearest]
        bars = list(zip(row["freq_hist_data_bar_values"], row["freq_hist_data_bar_heights"], strict=True))
        assert sum(height for _, height in bars) == record.firing_count
        assert {place: height for place, height in bars if height} == {
            (edges[b] + edges[b + 1]) / 2: count for b, count in enumerate(record.histogram) if count
        }


def test_figures_are_those_of_the_text(exported, model):
    """Activations, rates and the shares of intervals, counted by hand on the windows that the atlas was made of."""
    data = windows()
    ids, mask = (torch.tensor(data[name]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        codes = model(input_ids=ids, attention_mask=mask, output_codes=True).codes
    counted = mask.bool()
    first = counted.int().argmax(1)
    counted[torch.arange(len(ids)), first] = False
    counted &= (ids != 2) & (ids != 0)
    dense = {layer: (code.to_dense() * counted[..., None]).numpy() for layer, code in codes.items()}
    tokens = int(counted.sum())
    texts = np.array([f"w{token}" for token in range(96)])[ids.numpy()]
    for row in rows(exported, "features"):
        z = dense[int(row["layer"][0])][..., int(row["index"])]
        assert row["frac_nonzero"] == pytest.approx((z > 0).sum() / tokens)
        assert row["maxActApprox"] == pytest.approx(z.max(), rel=1e-5)
    by_kind = defaultdict(int)
    for row in rows(exported, "activations"):
        z = dense[int(row["layer"][0])][..., int(row["index"])]
        window, values = int(row["dataIndex"]), row["values"]
        assert row["dataSource"] == data[window]["source"]
        assert any(
            row["tokens"] == texts[window, at : at + len(values)].tolist()
            and np.allclose(z[window, at : at + len(values)], values, rtol=1e-4, atol=1e-6)
            for at in range(17 - len(values))
        )
        assert (row["maxValue"], row["minValue"]) == (max(values), min(values))
        assert values[row["maxValueTokenIndex"]] == row["maxValue"]
        own = values[row["qualifyingTokenIndex"]]
        assert row["binMax"] <= z.max() * (1 + 1e-5)
        by_kind[row["binMin"] == -1] += 1
        if row["binMin"] == -1:
            assert (row["binContains"], own) == (-1, row["maxValue"])
            assert row["binMax"] == pytest.approx(z.max(), rel=1e-5)
        else:
            assert row["binMin"] <= own <= row["binMax"]
            inside = (z >= row["binMin"] * (1 - 1e-5)) & (z <= row["binMax"] * (1 + 1e-5)) & (z > 0)
            assert row["binContains"] == pytest.approx(inside.sum() / tokens)
    assert min(by_kind.values()) > 100


def test_every_example_and_label_is_there_and_labels_come_back(exported, atlas):
    examples = sum(len(atlas[name].examples) for name in atlas)
    assert len(rows(exported, "activations")) == examples
    told = {
        (row["layer"], row["index"], row["description"]): json.loads(row["notes"])
        for row in rows(exported, "explanations")
    }
    assert told == {
        ("0-mfn", "1", HOSTILE[0]): {"source": "human", "score": 0.5},
        ("0-mfn", "1", "pets"): {"source": "automatic", "score": 0.25, "precision": 0.75},
        ("2-mfn", "79", "last"): {"source": "llm:some/model", "score": None},
    }
    again = FeatureAtlas(atlas.metadata, atlas.features, atlas.examples)
    assert again.import_labels(exported / "2-mfn" / "explanations" / "batch-0.jsonl.gz") == 1
    assert again["L2/79"].label == "last"


def test_batches_and_empty_tables(model, atlas, tmp_path, monkeypatch):
    """A table without rows has no file: the importer reads the first line of each file."""
    monkeypatch.setattr("modeling_mfn.interop.neuronpedia.FEATURES_PER_FILE", 30)
    export_neuronpedia(FeatureAtlas(atlas.metadata, atlas.features, atlas.examples), model.config, tmp_path)
    files = sorted((tmp_path / "0-mfn" / "features").iterdir())
    assert [(file.name, len(read(file))) for file in files] == [
        ("batch-0.jsonl.gz", 30), ("batch-1.jsonl.gz", 30), ("batch-2.jsonl.gz", 18),
    ]  # fmt: skip
    assert not (tmp_path / "0-mfn" / "explanations").exists()


def test_on_the_command_line(model, atlas, tmp_path, capsys):
    model.save_pretrained(tmp_path / "mfn")
    out = tmp_path / "out"

    def run(*options):
        with pytest.raises(SystemExit) as leaving:
            main(["export", str(tmp_path / "mfn"), str(out), "--format", "neuronpedia", *options])
        return leaving.value.code or 0

    assert run() == 2
    assert "has no features/atlas.json" in capsys.readouterr().err
    atlas.save_pretrained(tmp_path / "elsewhere")
    assert run("--atlas", str(tmp_path / "elsewhere")) == 0
    files = {file.relative_to(out): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert {row["modelId"] for row in rows(out, "features")} == {"mfn"}
    atlas.save_pretrained(tmp_path / "mfn")
    assert run() == 2  # the output is not empty
    assert run("--overwrite") == 0
    assert {file.relative_to(out): file.read_bytes() for file in out.rglob("*") if file.is_file()} == files
    other = make_mfn(make_base("llama-tied"), layers=[0, 1])
    FeatureAtlas.build(other, word_tokenizer(), windows(4), progress=False).save_pretrained(tmp_path / "other")
    assert run("--atlas", str(tmp_path / "other"), "--overwrite") == 2
    assert "take the atlas of this model" in capsys.readouterr().err
    (out / "notes.txt").touch()
    assert run("--overwrite") == 2
    assert (out / "notes.txt").exists()
