"""Features found by a word, a text or a label; labels from files; strengths in units of typical activations."""

import contextlib
import gzip
import json

import planted
import pytest
import torch
from atlas_data import HOSTILE, windows
from conftest import make_mfn
from rich.console import Console
from test_atlas import small_atlas

from modeling_mfn import Ablate, Add, Clamp, FeatureAtlas, Scale
from modeling_mfn.cli.main import main
from modeling_mfn.features.atlas.label_files import read_label_file
from modeling_mfn.features.labelling.automatic import label_features
from modeling_mfn.model.features_digest import name_features_of


def shown(thing):
    console = Console(width=400)
    with console.capture() as captured:
        console.print(thing)
    return captured.get()


@pytest.fixture
def atlas():
    return FeatureAtlas.build(planted.model(), planted.tokenizer(), planted.text(48), progress=False)


def test_search_ranks_labels_before_tokens_and_tokens_by_their_share(atlas):
    labels = {10: "Kings", 11: "old kings of England", 12: "parking", 13: "queens"}
    for index, text in labels.items():
        atlas.label((0, index), text)
    atlas.label((0, 13), "KINGS", source="automatic")
    found = atlas.search(" kings ")
    assert {each.feature for each in found[:2]} == {"L0/10", "L0/13"}
    assert [(each.feature, each.label_match) for each in found[2:3]] == [("L0/11", 2)]
    found = atlas.search("King")
    assert all(each.label_match == 1 for each in found[:4])
    expected = []
    for name in atlas:
        record = atlas[name]
        top = [example.token for example in record.examples if example.kind == "top"]
        places = [1 / (at + 1) for at, each in enumerate(record.promoted) if each["token"].strip().startswith("king")]
        share = sum(token == " king" for token in top) / max(len(top), 1)
        match = int(any("king" in label.label.lower() for label in record.labels))
        expected.append((-match, -round(share + max(places, default=0), 6), name))
    expected = [each for each in sorted(expected) if each[:2] != (0, 0)][:20]
    assert [-each.label_match for each in found] == [match for match, *_ in expected]
    figures = [-each.fires_on - each.promotes for each in found]
    assert figures == pytest.approx([figure for _, figure, _ in expected], abs=1e-3)
    assert atlas.search("zebra") == []
    assert len(atlas.search("w", limit=3)) == 3


def test_top_is_what_dense_codes_and_the_linearised_norm_say(family_base):
    model, data, tokenizer = make_mfn(family_base, layers=[0, 2]), windows(6), planted.tokenizer()
    with torch.no_grad():
        norm = model.model.backbone.norm if hasattr(model.model.backbone, "norm") else model.model.backbone.ln_f
        norm.weight.copy_(torch.rand_like(norm.weight) + 0.5)
    atlas = FeatureAtlas.build(model, tokenizer, data, progress=False)
    atlas.label((0, 1), "one")
    words = "w5 w17 dog w60 w9 w41 w33 king"
    reading = atlas.top(words, model, tokenizer, k=6)
    ids = tokenizer(words, return_tensors="pt")["input_ids"]
    seen = []
    hook = norm.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()))
    out = model(ids, output_codes=True, output_reconstructions=True)
    hook.remove()
    h = seen[0][0].double()
    centred = h - h.mean(-1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else h
    divisor = (centred.square().mean(-1) + 1e-5).sqrt()
    head, weight = model.lm_head.weight.detach().double(), norm.weight.detach().double()
    assert [token.token.strip() for token in reading] == words.split()
    for position, token in enumerate(reading):
        following = int(out.logits[0, position].argmax())
        assert token.next_token.strip() == tokenizer.decode([following])
        active = {}
        for layer in (0, 2):
            z = out.codes[layer].to_dense()[0, position]
            for feature in z.nonzero()[:, 0].tolist():
                active[f"L{layer}/{feature}"] = z[feature].item()
        relative = {name: z / (atlas[name].max_activation or float("inf")) for name, z in active.items()}
        order = sorted(active, key=lambda name: (-relative[name], -active[name]))
        assert [each.feature for each in token.features] == order[:6]
        for each in token.features:
            record = atlas[each.feature]
            assert each.activation == pytest.approx(active[each.feature])
            if record.max_activation is not None:
                assert each.relative == pytest.approx(relative[each.feature])
            std = out.reconstructions[record.layer].residual[0, position].detach().double().std()
            added = (
                model.mfn_layers[record.layer].decoder.weight[record.index].detach().double() * std * each.activation
            )
            added = added - added.mean() if isinstance(norm, torch.nn.LayerNorm) else added
            effects = head @ (added * weight) / divisor[position]
            assert each.effect == pytest.approx(float(effects[following]), rel=1e-3, abs=1e-5)
            assert each.promotes.strip() == tokenizer.decode([int(effects.argmax())])
            assert each.promotes_effect == pytest.approx(float(effects.max()), rel=1e-3)
            assert each.label == ("one" if each.feature == "L0/1" else None)
    json.dumps(reading.to_records())
    assert reading[0].features[0].feature in shown(reading)


def test_strengths_are_multiples_of_typical_activations(atlas):
    model, data = planted.model(), planted.text(48)
    label_features(atlas, model, planted.tokenizer(), data, planted.CONCEPTS, min_occurrences=20, min_words=3,
                   progress=False)  # fmt: skip
    atlas.label((0, 9), "Animals")
    assert atlas.group("ANIMALS ") == ["L0/0", "L0/9"]
    atlas.label((0, 9), "something else")  # this label is shown first, and decides the group
    atlas.label((0, 9), "animals", source="imported")
    assert atlas.group("animals") == ["L0/0"]
    atlas.label((0, 10), "animals")
    chosen = {"animals": Clamp(2.0), "L0/10": Add(0.5), (0, 11): Ablate(), "L0/12": Scale(3.0)}
    ids = torch.tensor(data["input_ids"])
    z = model(ids, output_codes=True).codes[0].to_dense().detach()[:, 1:]  # the atlas does not count first tokens
    typical = z.sum((0, 1)) / (z > 0).sum((0, 1))
    with model.steer(atlas.steering(chosen)):
        steered = model(ids, output_codes=True).codes[0].to_dense().detach()[:, 1:]
    assert steered[..., 0].unique().tolist() == pytest.approx([2 * float(typical[0])])
    torch.testing.assert_close(steered[..., 10], z[..., 10] + 0.5 * typical[10])
    assert not steered[..., 11].any()
    torch.testing.assert_close(steered[..., 12], 3 * z[..., 12])
    assert atlas.steering(chosen, unit="activation")[0, 0] == Clamp(2.0)


def test_an_atlas_of_features_that_a_loop_trained_since_is_refused(atlas):
    """The loop never calls `model.train()`. An atlas made after it is of the new features."""
    model, data = planted.model(), planted.text(48)
    old = FeatureAtlas.build(model, planted.tokenizer(), data, progress=False)
    old.label((0, 1), "animals")
    assert old.group("animals", model) == ["L0/1"]
    ids = torch.tensor(data["input_ids"][:4])
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for use in (lambda: old.group("animals", model), lambda: old.top("a", model, planted.tokenizer())):
        with pytest.raises(ValueError, match="of another training, or trained since"):
            use()
    new = FeatureAtlas.build(model, planted.tokenizer(), data, progress=False)
    new.label((0, 1), "animals")
    assert new.group("animals", model) == ["L0/1"]
    assert len({made.metadata["model"]["features_digest"] for made in (old, new)} - {None}) == 2


def test_groups_leave_out_what_is_pruned(atlas):
    """Features are left out if they were pruned before or after the atlas was built."""
    for index in (0, 1, 2):
        atlas.label((0, index), "animals")
    model = planted.model()
    name_features_of(model)  # as a save does, before features are pruned
    model.prune_features(0, [1])
    assert atlas.group("animals") == ["L0/0", "L0/1", "L0/2"]
    assert atlas.group("animals", model) == ["L0/0", "L0/2"]
    later = FeatureAtlas.build(model, planted.tokenizer(), planted.text(48), progress=False)
    later.labels = atlas.labels
    assert later.group("animals") == ["L0/0", "L0/2"]
    ids = torch.tensor(planted.text(2)["input_ids"])
    chosen = atlas.steering({"animals": {"kind": "clamp", "value": 1.5}}, unit="activation", model=model)
    with model.steer(chosen):
        z = model(ids, output_codes=True).codes[0].to_dense()
    assert (z[..., [0, 2]] == 1.5).all()
    assert not z[..., 1].any()
    assert later.steering({"animals": Clamp(1.0)}) == atlas.steering({"animals": Clamp(1.0)}, model=model)
    model.prune_features(0, [0, 2])
    for call in (atlas.group, lambda label, model: atlas.steering({label: Ablate()}, model=model)):
        with pytest.raises(ValueError, match="labelled 'animals' are pruned: L0/0, L0/1, L0/2"):
            call("animals", model)
    with pytest.raises(ValueError, match="L0/1 is pruned"):
        model.steer(atlas.steering({"L0/1": Ablate()}, model=model))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda atlas: atlas.steering({"animal": Ablate()}), "no feature is labelled 'animal'; there are 'animals'"),
        (lambda atlas: atlas.steering({"L0/99": Ablate()}), "L0/99 does not exist"),
        (lambda atlas: atlas.steering({(0, 1): Ablate(), "L0/1": Ablate()}), "L0/1 is meant by"),
        (lambda atlas: atlas.steering({"animals": Ablate(), "Animals": Ablate()}), "is meant by 'animals' and by"),
        (lambda atlas: atlas.steering({"L0/4": Add(1.0)}), "L0/4 is never active"),
        (lambda atlas: atlas.steering({"L0/0": 2.0}), "is not an intervention"),
        (lambda atlas: atlas.steering({}, unit="max"), "unit is 'max'"),
        (lambda atlas: atlas.search("  "), "query is"),
        (lambda atlas: atlas.search("a", limit=0), "limit is 0"),
        (lambda atlas: atlas.top("", planted.model(), planted.tokenizer()), "no tokens"),
        (lambda atlas: atlas.top("dog", planted.model(), planted.tokenizer(), k=0), "k is 0"),
        (lambda atlas: atlas.top("dog " * 65, planted.model(), planted.tokenizer()), "66 tokens"),
    ],
)
def test_bad_input_is_named(atlas, call, message):
    atlas.label((0, 0), "animals")
    with pytest.raises(ValueError, match=message):
        call(atlas)


ROWS = [
    {"feature": "L1/0", "label": 'a, "quoted"\nlabel', "score": 0.5, "source": "me"},
    {"layer": "1", "index": "1", "label": "plain"},
]
NEURONPEDIA = [
    {
        "modelId": "gpt2-small",
        "layer": "1-res-jb",
        "index": "0",
        "description": "weaker",
        "score": 0.1,
        "embedding": [1],
    },
    {"modelId": "gpt2-small", "layer": "1-res-jb", "index": "0", "description": "stronger", "score": 0.9},
    {"modelId": "gpt2-small", "layer": "1-res-jb", "index": 1, "description": "other", "explanationModelName": "o4"},
]


def written(folder, name, rows):
    file = folder / name
    kind = name.removesuffix(".gz").rpartition(".")[2]
    if kind == "csv":
        import csv

        with open(file, "w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, sorted({key for row in rows for key in row}))
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text(json.dumps(rows, indent=1) if kind == "json" else "\n".join(map(json.dumps, rows)) + "\n")
    if name.endswith(".gz"):
        file.write_bytes(gzip.compress(file.read_bytes()))
    return file


@pytest.mark.parametrize("name", ["l.csv", "l.json", "l.jsonl", "l.jsonl.gz"])
def test_labels_are_imported(tmp_path, name):
    atlas = small_atlas()
    assert atlas.import_labels(written(tmp_path, name, ROWS)) == 2
    first, second = atlas["L1/0"].labels[0], atlas["L1/1"].labels[0]
    assert (first.label, first.source, first.score) == (ROWS[0]["label"], "imported", 0.5)
    assert first.details == {"source_of_label": "me"}
    assert (second.label, second.score, second.details) == ("plain", None, {})
    atlas.save_pretrained(tmp_path / "saved")
    again = small_atlas()  # labels.json of an atlas can be imported, too
    assert again.import_labels(tmp_path / "saved" / "features" / "labels.json") == 2
    if name != "l.csv":
        assert atlas.import_labels(written(tmp_path, name, NEURONPEDIA)) == 2
        label = atlas["L1/0"].label, atlas["L1/0"].labels[0].details
        assert label == ("stronger", {"modelId": "gpt2-small", "others": ["weaker"]})
        assert atlas["L1/1"].labels[0].details["explanationModelName"] == "o4"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", "", "must end in .csv, .json, .jsonl"),
        ("l.csv", "", "has no labels"),
        ("l.csv", "feature,label\nL1/0,a\nL1/1\n", "line 3: it does not have as many columns"),
        ("l.csv", "feature,label\nL1/0,a\n\nL1/1,b,c\n", "line 4: it does not have as many"),
        ("l.csv", 'feature,label\nL1/0,"a\n', "line 2: unexpected end"),
        ("l.csv", "feature,text\nL1/0,a\n", "line 2: it has neither a label"),
        ("l.json", "{}", "l.json, Input should be a valid (list|array)"),
        ("l.json", '[\n{"feature": "L1/0" "label": 3}]', "l.json, Invalid JSON: .* at line 2"),
        ("l.json", '[{"feature": "L1/0", "label": 3}]', "entry 1: label of L1/0 is 3"),
        ("l.jsonl", '{"feature": "L1/0", "label": "a"}\n\n{"label": "b"}', "line 3: it names no feature"),
        ("l.jsonl", '{"feature": "L1/0", "label": "a"}\n[1]', "line 2: .* is not an object"),
        ("l.jsonl", '{"layer": "x", "index": 1, "label": "a"}', "line 1: layer 'x' and index 1"),
        ("l.jsonl", '{"feature": "L1", "label": "a"}', "line 1: 'L1' names no feature"),
        ("l.jsonl", '{"feature": "L1/0", "label": "a", "score": "high"}', "line 1: score is 'high'"),
        ("l.jsonl", '{"feature": "L1/0", "label": "a", "score": NaN}', "line 1: score of the label of L1/0 is nan"),
        ("l.jsonl", '{"feature": "L1/0", "label": "a"}\n{"feature": "L7/0", "label": "a"}', "L7/0 does not exist"),
        ("l.jsonl.gz", "no gzip", "cannot be read"),
    ],
)
def test_a_bad_file_of_labels_is_named_by_line_and_nothing_is_taken_in(tmp_path, name, content, message):
    atlas, file = small_atlas(), tmp_path / name
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        atlas.import_labels(file)
    assert len(atlas.labels) == 0


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_labels_and_tokens_do_no_harm(tmp_path, text):
    atlas = small_atlas([text, "b"])
    file = tmp_path / "labels.jsonl"
    file.write_text(json.dumps({"feature": "L1/0", "label": text}), encoding="utf-8")
    atlas.import_labels(file)
    assert read_label_file(file)[0].label == text
    assert atlas.search(text)[0][:3] == ("L1/0", text, 3)
    table = shown(atlas.search(text))
    assert "\x1b" not in table
    assert "\u202e" not in table
    assert len(table) < 4000
    assert atlas.group(text) == ["L1/0"]
    with pytest.raises(ValueError, match="no feature is labelled") as error:
        atlas.steering({text + "!": Ablate()})
    assert len(str(error.value)) < 1000
    assert str(error.value).isprintable()


def test_the_command_labels_what_it_harvests(tmp_path, capsys):
    planted.model().save_pretrained(tmp_path / "model")
    planted.tokenizer().save_pretrained(tmp_path / "model")
    rows = planted.text(200)["input_ids"]
    text = " ".join(planted.tokenizer().decode([token]) for row in rows for token in row)
    files = {"text.txt": text, "concepts.json": json.dumps(planted.CONCEPTS), "bad.json": '{"animals": 3}'}
    files["labels.csv"] = "feature,label\nL0/9,mine\n"
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    base = ["atlas", tmp_path / "model", "--text", tmp_path / "text.txt", "--window", 16]
    with pytest.raises(SystemExit):
        main([str(part) for part in [*base, "--concepts", tmp_path / "bad.json"]])
    assert not (tmp_path / "model" / "features").exists()
    assert "concept 'animals' is '3'" in " ".join(capsys.readouterr().err.split())
    with contextlib.suppress(SystemExit):
        main(
            [
                str(part)
                for part in [*base, "--concepts", tmp_path / "concepts.json", "--labels", tmp_path / "labels.csv"]
            ]
        )
    atlas = FeatureAtlas.from_pretrained(tmp_path / "model")
    assert (atlas["L0/0"].label, atlas["L0/9"].label, atlas["L0/2"].label) == ("animals", "mine", None)
    assert "with shuffled words" in capsys.readouterr().out
