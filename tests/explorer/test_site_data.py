"""The explorer's data files, compared with the atlas as pandas reads it."""

import json
import re
from collections import Counter, defaultdict

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from features_folder import built
from unpacked import plain, unpacked

from benchmarks.explorer.invented_atlas import write_model
from benchmarks.explorer.invented_text import HOSTILE
from modeling_mfn import FeatureAtlas
from modeling_mfn.explorer import feature_pages
from modeling_mfn.explorer.site import write_site
from modeling_mfn.features.atlas.schema import EXAMPLES

PER_LAYER = 66
LAYERS = [2, 5, 8, 11]
ORDER = ("human", "imported", "automatic", "llm")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of an invented model: four layers of one full and one short chunk, hostile tokens and labels."""
    folder = tmp_path_factory.mktemp("invented") / "model"
    write_model(folder, PER_LAYER * len(LAYERS))
    return folder


@pytest.fixture(scope="module")
def site(model, tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    atlas = FeatureAtlas.from_pretrained(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_pages, "ROWS_PER_PART", 100)
        write_site(atlas, model, site, name="</script>\u2028\ud800<!--")
    assert "examples" not in vars(atlas), "all examples were read into memory"
    return site


@pytest.fixture(scope="module")
def pages(site):
    """Every feature's page, in order, and the number of features in each chunk."""
    sizes, found = [], []
    for layer in LAYERS:
        for number in range(-(-PER_LAYER // plain(site)["chunk"])):
            chunk = unpacked(site, f"features/L{layer}/{number}")
            assert {page["index"] // plain(site)["chunk"] for page in chunk} == {number}
            sizes.append(len(chunk))
            found += chunk
    assert sizes == [64, 2] * len(LAYERS)
    return found


def close(values):
    """The same numbers, to four significant digits; None for what is not there."""
    return [None if pd.isna(value) else pytest.approx(value, rel=6e-4, abs=0) for value in values]


def is_short(value):
    digits = re.sub(r"e.*", "", repr(value)).replace(".", "").strip("-0")
    return len(digits) <= 4


def test_pages_have_what_the_atlas_has(model, pages):
    table = pd.read_parquet(model / "features" / "features.parquet")
    assert [page["feature"] for page in pages] == list(table["name"])
    for page, (_, row) in zip(pages, table.iterrows(), strict=True):
        assert (page["layer"], page["index"], page["status"]) == (row["layer"], row["index"], row["status"])
        assert page["firing_count"] == row["firing_count"]
        assert page["source_counts"] == list(row["source_counts"])
        names = ("firing_rate", "mean_activation", "max_activation")
        assert [page[name] for name in names] == close(row[name] for name in names)
        assert page["histogram"] == [[at, n] for at, n in enumerate(row["histogram"]) if n]
        for name, fields in {
            "promoted": ("token", "effect"),
            "suppressed": ("token", "effect"),
            "nearest": ("index", "cosine"),
            "co_active": ("index", "jaccard", "count"),
        }.items():
            columns = [[entry[field] for entry in row[name]] for field in fields]
            expected = [each if isinstance(each[0], str) else close(each) for each in columns]
            assert list(map(list, zip(*page[name], strict=True))) == expected, name
    assert {page["status"] for page in pages} == {"alive", "dead", "pruned"}


def test_examples_are_those_of_the_atlas_in_their_order(model, pages):
    table = pd.read_parquet(model / "features" / "examples.parquet")
    by_name = defaultdict(list)
    for row in table.to_dict("records"):
        by_name[f"L{row['layer']}/{row['index']}"].append(row)
    seen, numbers = set(), set()
    for page in pages:
        rows = by_name[page["feature"]]
        assert len(page["examples"]) == len(rows)
        for example, row in zip(page["examples"], rows, strict=True):
            for name in ("kind", "rank", "window", "position", "source", "offset"):
                assert example[name] == row[name]
            assert [example["stratum"], example["activation"]] == close([row["stratum"], row["activation"]])
            assert example["tokens"] == list(row["tokens"])
            assert np.allclose(example["activations"], row["activations"], rtol=6e-4, atol=0)
            numbers |= set(example["activations"])
            seen |= set(example["tokens"])
    assert all(map(is_short, sorted(numbers)[:: max(1, len(numbers) // 1000)]))
    assert any(page["examples"] == [] for page in pages)  # of dead features
    assert len(set(HOSTILE) & seen) > len(HOSTILE) / 2


def test_the_list_has_every_feature_with_its_label_and_tokens(model, site, pages):
    about = plain(site)
    parts = [unpacked(site, f"index/{number}") for number in range(about["index_parts"])]
    assert [len(part["index"]) for part in parts] == [100, 100, 64]
    rows = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    labels = defaultdict(list)
    for label in json.loads((model / "features" / "labels.json").read_text()):
        labels[label["feature"]].append(label)
    assert about["labelled"] == len(labels)
    assert about["features"] == len(pages)
    for at, page in enumerate(pages):
        row = {name: values[at] for name, values in rows.items()}
        names = {"layer": "layer", "index": "index", "status": "status", "rate": "firing_rate"}
        names |= {"mean": "mean_activation", "max": "max_activation"}
        assert {name: row[name] for name in names} == {name: page[field] for name, field in names.items()}
        there = sorted(labels[page["feature"]], key=lambda each: ORDER.index(each["source"].partition(":")[0]))
        expected = [{n: v for n, v in each.items() if n not in ("feature", "features_digest")} for each in there]
        assert page["labels"] == expected
        best = there[0] if there else {"label": None, "source": None, "score": None}
        assert [row["label"], row["label_source"], row["score"]] == [best["label"], best["source"], best["score"]]
        assert row["auroc"] == next((each["auroc"] for each in there if "auroc" in each), None)
        top = [each["tokens"][each["offset"]] for each in page["examples"] if each["kind"] == "top"]
        counts = Counter(token if len(token) <= 40 else token[:40] + "…" for token in top)
        assert [counts[token] for token in row["fires_on"]] == [n for _, n in counts.most_common(3)]
        assert len(set(row["fires_on"])) == len(row["fires_on"])
        assert row["promotes"] == [token[:40] + "…" * (len(token) > 40) for token, _ in page["promoted"][:3]]
    assert any(row is not None for row in rows["auroc"])


def test_site_js_is_plain_and_cannot_end_a_script(model, site):
    text = (site / "data" / "site.js").read_text("ascii")
    assert "<" not in text
    about = plain(site)
    metadata = json.loads((model / "features" / "atlas.json").read_text())
    assert about["name"] == "</script>\u2028\ud800<!--"
    assert (about["schema"], about["live"], about["base"]) == (1, False, "somebody/invented-base")
    assert (about["k"], about["alpha"], about["codes"]) == (32, 1.0, "update")
    assert about["features_digest"] == metadata["model"]["features_digest"]
    assert about["histogram_edges"] == metadata["histogram_edges"]
    assert about["data"]["sources"] == metadata["data"]["sources"]
    for layer in about["layers"]:
        figures = metadata["layers"][str(layer.pop("layer"))]
        assert layer == {name: figures[name] for name in layer}
    listed = set(json.loads((site / "mfn_explorer.json").read_text())["files"])
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert files == listed | {"mfn_explorer.json"}


def test_the_page_of_the_model_has_records_next_to_it(model, site):
    page = unpacked(site, "model")
    facts = dict(map(tuple, page["facts"]))
    assert facts["base model"] == "somebody/invented-base"
    assert facts["features per layer, m"] == PER_LAYER
    assert facts["blocks with an MFN layer, from 0"] == "2, 5, 8, 11"
    assert "parameters" not in facts  # there are no weights
    config = json.loads((model / "config.json").read_text())
    assert page["presets"] == config["steering_presets"]
    history = json.loads((model / "trainer_state.json").read_text())["log_history"]
    curves = page["training"].pop("curves")
    assert curves["loss"] == [[each["step"], each["loss"]] for each in history]
    assert "epoch" not in curves
    assert page["training"] == json.loads((model / "training_record.json").read_text())
    assert page["fidelity"] == json.loads((model / "evaluation.json").read_text())["perplexity"]
    for verdict in page["verdicts"]:
        written = json.loads((model / "evaluation" / f"{verdict['prediction']}.json").read_text())
        assert verdict == {name: written[name] for name in verdict}
    assert [verdict["prediction"] for verdict in page["verdicts"]] == ["P1", "P2", "P3", "P4", "P5"]


@pytest.fixture
def bare(model, tmp_path):
    """Folder with a config for the atlas that a test builds, and nothing else."""
    folder = tmp_path / "bare"
    folder.mkdir()
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"layers": [0, 2], "num_features": 80, "steering_presets": {}})
    )
    return folder


def without_digest(metadata):
    model = {name: value for name, value in metadata["model"].items() if name != "features_digest"}
    return metadata | {"model": model}


def test_an_atlas_of_which_little_is_known(bare, tmp_path):
    """No label, no example, no name of a source, every feature dead; no file next to the config."""
    atlas, dead = built(), built().features
    for name, value in {"status": "dead", "firing_count": 0, "mean_activation": None, "max_activation": None}.items():
        at = dead.schema.get_field_index(name)
        dead = dead.set_column(at, dead.schema.field(at), pa.array([value] * len(dead), dead.schema.field(at).type))
    metadata = without_digest(atlas.metadata) | {"histogram_edges": None}
    metadata["data"] = metadata["data"] | {"sources": [{"name": None, "tokens": 5}]}
    site = tmp_path / "site"
    site.mkdir()
    write_site(FeatureAtlas(metadata, dead, EXAMPLES.empty_table()), bare, site)
    about, page = plain(site), unpacked(site, "features/L2/1")[3]
    assert (about["name"], about["labelled"], about["data"]["sources"]) == ("bare", 0, [{"name": None, "tokens": 5}])
    assert (page["feature"], page["status"], page["mean_activation"]) == ("L2/67", "dead", None)
    assert (page["examples"], page["labels"]) == ([], [])
    rows = unpacked(site, "index/0")
    assert set(map(str, rows["fires_on"])) == {"[]"}
    assert set(rows["label"]) == set(rows["max"]) == {None}
    model = unpacked(site, "model")
    assert [model[name] for name in ("training", "fidelity", "verdicts", "card")] == [None] * 4


def test_numbers_that_json_does_not_have_and_tokens_like_files(bare, tmp_path):
    atlas = built()
    example = atlas.examples.slice(0, 1).to_pylist()[0]
    long = "x" * 10_000_000
    example |= {"layer": 0, "index": 7, "kind": "top", "tokens": [long, "\x00\u202e"], "token_ids": [1, 2], "offset": 0}
    example |= {"activations": [float("nan"), 1e-7], "activation": float("inf")}
    labelled = FeatureAtlas(without_digest(atlas.metadata), atlas.features, pa.Table.from_pylist([example], EXAMPLES))
    labelled.label("L0/7", "inf", source="automatic", auroc=float("nan"), others=[float("inf"), 1])
    site = tmp_path / "site"
    site.mkdir()
    write_site(labelled, bare, site)
    page = unpacked(site, "features/L0/0")[7]
    assert page["labels"] == [
        {"label": "inf", "source": "automatic", "score": None, "auroc": None, "others": [None, 1]}
    ]
    (found,) = page["examples"]
    assert found["tokens"] == ["x" * 1000 + "…", "\x00\u202e"]
    assert (found["activation"], found["activations"]) == (0, [0, 1e-7])
    assert unpacked(site, "index/0")["fires_on"][7] == ["x" * 40 + "…"]


def test_files_next_to_the_model_that_do_not_fit(model, bare, tmp_path):
    """Perplexities of other weights or another k are left out, and points of long curves. A damaged file is named."""
    config = json.loads((bare / "config.json").read_text())
    own = {"weights": config["weights_digest"], "k": config["k"]}
    rows = [{"data": "a", "base": 3.0} | own, {"data": "b", "base": 3.0} | own | {"k": 8}, {"data": "c", "base": 4.0}]
    (bare / "evaluation.json").write_text(json.dumps({"perplexity": rows + [own | {"weights": "other"}]}))
    history = [{"step": step, "loss": float(step), "nan": float("nan")} for step in range(1, 5001)]
    (bare / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    atlas = FeatureAtlas(without_digest(built().metadata), built().features, built().examples)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    write_site(atlas, bare, first)
    page = unpacked(first, "model")
    assert [row["data"] for row in page["fidelity"]] == ["a", "c"]
    curve = np.array(page["training"]["curves"]["loss"])
    assert list(page["training"]["curves"]) == ["loss"]
    assert 250 < len(curve) <= 500
    assert (curve[:, 0] == curve[:, 1]).all()
    assert len(set(np.diff(curve[:, 0]))) == 1
    assert curve[-1, 0] == 5000
    second.mkdir()
    for name in ("evaluation.json", "trainer_state.json", "training_record.json"):
        (bare / name).write_text('{"perplexity": ')
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            write_site(atlas, bare, second)
        (bare / name).unlink()
    with pytest.raises(ValueError, match="the atlas is of layers"):
        write_site(atlas, model, second)
