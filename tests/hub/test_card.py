"""Tests of model cards: figures equal the files, the Hub accepts the card, and hostile text has no effect."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from atlas_data import windows, word_tokenizer
from conftest import make_base, make_mfn
from features_folder import built, label, write_features
from fresh_process import python_of, run_without_the_plugin
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig

from modeling_mfn import Ablate, Clamp, FeatureAtlas, MFNConfig
from modeling_mfn.hub.card import model_card, write_card
from modeling_mfn.hub.evaluation_file import add_perplexities, read_perplexities
from modeling_mfn.utils.display import for_table_cell, markdown_table, visible

EVALUATION = [
    {"data": "two plays", "tokens": 4096, "base": 40.625, "alpha_0": 40.625, "alpha_1": 54.1875},
    {"data": "a dictionary", "base": 21.5, "alpha_1": 30.25},
]
RECORD = {
    "versions": {"modeling_mfn": "0.1.0"},
    "arguments": {"lambda_recon": 10.0, "learning_rate": 0.004},
    "steps": 60,
    "planned_steps": 200,
    "tokens": 30720,
    "figures": {"recon_loss": 0.1055, "epoch": 3.0, "train_runtime": 71.5},
}
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a | b || c",
    "```\n# heading\n```",
    "`code`` ` and $x$ and :smile: and @somebody",
    "[click](javascript:alert(1)) ![](http://evil.example/x.png) http://evil.example www.evil.example",
    "one\nline\r\n---\nlicense: mit\n---\nmore\u2028and\u2029more\x85",
    "\x00\x07\x1b[31mred\x1b[0m",
    "\u202eabc\u2066\u200f\u200b\ufeff\u061c",
    "&lt;b&gt; &#60;b&#62; \\<b\\> {{ 7 * 7 }} {% raw %}",
    "*bold* _it_ ~~gone~~ # no heading > no quote - no list",
    "x" * 1_000_000,
]
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough")
TEXT = {"text", "text_special", "code_inline", "softbreak"}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tiny-mfn"
    make_mfn(make_base("llama-tied"), layers=[0, 2]).config.save_pretrained(folder)
    return folder


def tokens_of(markdown):
    return [inner for outer in MARKDOWN.parse(markdown) for inner in (outer.children or [outer])]


def cells(markdown):
    """Text of every cell of every table, one list per row."""
    rows, inside = [], False
    for token in MARKDOWN.parse(markdown):
        inside = {"tr_open": True, "tr_close": False}.get(token.type, inside)
        if token.type == "tr_open":
            rows.append([])
        if token.type == "inline" and inside:
            rows[-1].append("".join(child.content for child in token.children if child.type in TEXT))
    return rows


def test_the_hub_reads_back_every_figure(folder):
    (folder / "evaluation.json").write_text(json.dumps({"perplexity": EVALUATION}))
    (folder / "training_record.json").write_text(json.dumps(RECORD))
    metadata = write_features(folder, [label("L2/7", "royalty", score=0.97), label("L0/3", "weather")])
    write_card(folder, model_card(folder, "me/tiny", base_model="owner/base", license="apache-2.0"))
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "owner/base"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert (card.data.license, card.data.datasets) == ("apache-2.0", ["somebody/texts"])
    assert {"mfn", "interpretability", "sparse-autoencoder"} <= set(card.data.tags)
    assert card.data.model_name == "tiny"

    found = {(result.dataset_name, result.metric_name): result.metric_value for result in card.data.eval_results}
    titles = {"base": "perplexity, base model", "alpha_0": "perplexity, alpha 0", "alpha_1": "perplexity, alpha 1"}
    expected = {(row["data"], title): row[name] for row in EVALUATION for name, title in titles.items() if name in row}
    for layer, figures in metadata["layers"].items():
        for name, value in figures.items():
            expected["somebody/texts:small, drama.txt", f"{name.replace('_', ' ')}, block {layer}"] = value
    assert found == expected
    assert {result.task_type for result in card.data.eval_results} == {"text-generation"}

    # plain YAML without huggingface_hub, as the Hub's server reads it
    metadata = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    values = [metric["value"] for part in metadata["model-index"][0]["results"] for metric in part["metrics"]]
    assert sorted(values) == sorted(expected.values())

    rows = cells(card.text)
    assert ["two plays", "4,096", "40.62", "40.62", "54.19"] in rows
    assert ["a dictionary", "", "21.5", "", "30.25"] in rows
    royal = built()["L2/7"]
    strength = f"{royal.max_activation:.4g}"
    assert ["L2/7", "royalty", "automatic", "0.97", f"{royal.firing_rate:.2%}", strength, " king  queen"] in rows
    assert ["optimizer steps", "60 of 200 planned"] in rows
    assert ["lambda_recon", "10.0"] in rows
    assert ["recon_loss", "0.1055"] in rows
    assert not any(row[0] in ("epoch", "train_runtime") for row in rows)
    clamp = {"kind": "clamp", "value": float(f"{royal.max_activation:.3g}")}
    assert example(card) == {"L2/7": clamp, "L0/3": {"kind": "ablate"}}
    assert "missing" not in card.text


def test_what_no_file_says_is_said_to_be_missing(folder):
    card = model_card(folder)
    assert (card.data.base_model, card.data.license, card.data.datasets) == (None, None, None)
    assert "model-index" not in card.data.to_dict()
    for part in (
        "Perplexities: none are recorded (`evaluation.json`)",
        "Firing rates and dead features: none are recorded (`features/atlas.json`)",
        "is not recorded (`training_record.json`)",
        "no atlas of its features",
        "not named in this checkpoint",
        "The license of the base model is not known here",
        "- how close the model at alpha 1 comes to its base",
        "- how often each feature fires, on what, and how many are dead",
        "this repository has none of its own",
    ):
        assert part in card.text
    # all numbers in the text come from the config and the code
    numbers = set(re.findall(r"\d+(?:\.\d+)?", card.text))
    assert numbers <= {"0", "1", "2", "3", "4.0", "8", "32", "40", "80"}


def test_the_base_is_named_by_its_id_and_never_by_a_folder(tmp_path):
    base = make_base("gpt2-tied")
    for name, found in (
        ("owner/base", "owner/base"),
        ("gpt2", "gpt2"),
        (str(tmp_path), None),
        ("/no/such/folder", None),
    ):
        base.config._name_or_path = name
        make_mfn(base, layers=[1]).config.save_pretrained(tmp_path / "model")
        assert model_card(tmp_path / "model").data.base_model == found
    base.config._name_or_path = str(tmp_path)
    make_mfn(base, layers=[1]).config.save_pretrained(tmp_path / "model")
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()


def test_people_come_first_and_token_sets_last_and_the_rest_is_counted(folder):
    labels = [label(f"L0/{index}", f"label {index}", score=index / 100) for index in range(60)]
    labels += [label("L0/5", "ours", "human", None), label("L2/1", "theirs", "llm:some/model", 1.0)]
    labels += [label("L2/3", "fires on: ' x'", score=1.0) | {"method": "tokens"}]
    write_features(folder, labels)
    text = model_card(folder).text
    rows = [row for row in cells(text) if row and row[0].startswith("L")]
    assert rows[0][:3] == ["L0/5", "ours", "human"]
    assert [row[0] for row in rows[1:]] == [f"L0/{index}" for index in range(59, 10, -1)]
    assert "62 features have a label; the first 50" in text


def example(card):
    """Interventions in the card's example."""
    return json.loads(re.search(r"model\.steer\((\{.*\})\)", card.text)[1])


def test_the_example_steers_what_is_there_by_as_much_as_it_fires(folder):
    """The model has small activations and some pruned features. Its card is made without labels and with them."""
    model = make_mfn(make_base("llama-tied"), layers=[0, 2])
    model.prune_features(2, [0, 1, 7])
    model.config.save_pretrained(folder)
    assert example(model_card(folder)) == {"L2/2": {"kind": "clamp", "value": 4.0}}
    with model.steer(example(model_card(folder))):
        pass
    with torch.no_grad():
        for layer in model.mfn_layers.values():
            layer.encoder.weight *= 1e-3
            layer.encoder.bias *= 1e-3
    atlas = FeatureAtlas.build(model, word_tokenizer(), windows(), progress=False)
    alive = next(name for name in atlas if name.startswith("L2/") and atlas[name].status == "alive")
    strength = atlas[alive].max_activation
    assert strength < 0.05
    for name, score in (("L2/7", 1.0), (alive, 0.5)):
        atlas.label(name, "royalty", source="automatic", score=score)
    atlas.save_pretrained(folder)
    card = model_card(folder)
    assert example(card) == {alive: {"kind": "clamp", "value": pytest.approx(strength, rel=0.01)}}
    assert not any("L2/7" in row for row in cells(card.text))


CHECKS = """
assert model.config.layers == [0, 2] and set(codes) == {0, 2}
assert tokens.shape[1] > inputs["input_ids"].shape[1]
with model.steer(json.loads(sys.argv[1])), torch.no_grad():
    steered = model(**inputs).logits
expected = load_file("expected")["steered"]
assert torch.equal(steered, expected), (steered - expected).abs().max()
assert not torch.equal(steered, model(**inputs).logits), "unsteered"
assert not any(name.partition(".")[0] == "modeling_mfn" for name in sys.modules)
"""


@pytest.mark.parametrize(("base", "labelled"), [("llama-tied", True), ("gpt2-tied", False)])
def test_the_code_of_the_card_runs_where_the_plugin_is_not_installed(base, labelled, tmp_path):
    """The code of the card runs unchanged and does not ask for confirmation."""
    model, folder = make_mfn(make_base(base), layers=[0, 2]), tmp_path / "tiny-mfn"
    tokenizer = word_tokenizer(("The", "weather", "is"))
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if labelled:
        write_features(folder, [label("L2/7", "royalty", score=0.97), label("L0/3", "weather")])
    card = model_card(folder)
    wanted = example(card)
    objects = {"L2/0": Clamp(4.0)}
    if labelled:
        objects = {"L2/7": Clamp(wanted["L2/7"]["value"]), "L0/3": Ablate()}
    with model.steer(objects), torch.no_grad():
        steered = model(**tokenizer("The weather is", return_tensors="pt")).logits
    save_file({"steered": steered}, tmp_path / "expected")
    run_without_the_plugin(python_of(card.text) + "import json\n" + CHECKS, tmp_path, json.dumps(wanted))


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_shown_and_does_nothing(folder, hostile):
    plain = folder.parent / "plain"
    make_mfn(make_base("llama-tied"), layers=[0, 2]).config.save_pretrained(plain)
    for place, text in ((plain, "plain"), (folder, hostile)):
        parquet_text = text.encode("utf-8", "replace").decode()
        write_features(place, [label("L2/7", text, source=f"llm:{text}")], [text, "own/data"], [parquet_text])
        record = RECORD | {"arguments": {text: text}, "figures": {text: 1.5}}
        (place / "training_record.json").write_text(json.dumps(record))
        (place / "evaluation.json").write_text(json.dumps({"perplexity": [{"data": text, "base": 2.0}]}))
        write_card(place, model_card(place, "me/tiny"))
    expected, card = ModelCard.load(plain / "README.md"), ModelCard.load(folder / "README.md")

    # the structure equals that with a plain word: no text became a link, an image, HTML, a cell or a heading
    kinds = [[token.type for token in tokens_of(text) if token.type not in TEXT] for text in (expected.text, card.text)]
    assert kinds[0] == kinds[1]
    raw = (folder / "README.md").read_text(encoding="utf-8")
    assert len(raw) < 30_000
    assert not re.search(r"[^\n\x20-\x7e…⟨⟩]", raw)
    assert not re.search(r"http://|www\.|javascript:", raw.partition("\n---\n")[2])
    assert card.data.license is None
    assert card.data.datasets == ["own/data"]
    (row,) = (row for row in cells(card.text) if row[:1] == ["L2/7"])
    assert row[1].strip() == visible(hostile).strip()


@settings(deadline=None)
@given(st.text())
def test_escaped_text_reads_as_itself(text):
    rendered = cells(markdown_table(("a", "b"), [(for_table_cell(text, 10**6), "end")]))
    assert [cell.strip() for cell in rendered[1]] == [visible(text, 10**6).strip(), "end"]
    assert {token.type for token in tokens_of(for_table_cell(text))} <= TEXT | {"paragraph_open", "paragraph_close"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", '{"model_type": "llama"}', "a model of type 'llama'"),
        ("config.json", "{", "config.json is damaged"),
        ("evaluation.json", "[]", "evaluation.json is damaged: Input should be an object"),
        ("evaluation.json", '{"perplexity": [{"base": 2.0}]}', "must have `data`"),
        ("evaluation.json", '{"perplexity": [{"data": "x", "base": NaN}]}', "finite numbers"),
        ("evaluation.json", '{"perplexity": [{"data": "\\ud800", "base": 2.0}]}', "evaluation.json is damaged"),
        ("training_record.json", "nothing", "training_record.json is damaged"),
        ("features/atlas.json", '{"layers": {}}', "the atlas in .* cannot be read"),
        (
            "features/labels.json",
            '[{"feature": "first", "label": "x", "source": "human"}]',
            "the atlas in .* cannot be read",
        ),
        ("features/features.parquet", "PAR1", "the atlas in .* cannot be read"),
    ],
)
def test_damaged_files_are_named(folder, file, content, message):
    write_features(folder, [label("L0/1", "x")])
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        model_card(folder)
    assert not (folder / "README.md").exists()


def test_perplexities_belong_to_their_weights(tmp_path, caplog):
    """A card refuses those of other weights or another k. Measuring again drops them; what people wrote stays."""
    model = make_mfn(make_base("llama-tied"), k=8)
    model.save_pretrained(tmp_path)
    add_perplexities(tmp_path, [{"data": "old", "base": 2.0}, {"data": "again", "base": 2.0}])
    file = tmp_path / "evaluation.json"
    written = json.loads(file.read_text())
    assert {row["weights"] for row in written["perplexity"]} == {model.config.weights_digest}
    written["perplexity"].append({"data": "by hand", "base": 5.0})
    file.write_text(json.dumps(written))
    assert "5" in str(model_card(tmp_path, "me/model"))
    model.set_k(4)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a perplexity on 'old' of k 8, and the model has 4; measure it again"):
        model_card(tmp_path, "me/model")
    add_perplexities(tmp_path, [{"data": "again", "base": 3.0}])
    assert "loses the perplexity on 'old'" in caplog.text
    assert [(row["data"], row["base"]) for row in read_perplexities(tmp_path)] == [("by hand", 5.0), ("again", 3.0)]


def test_figures_that_are_not_numbers_stay_out(folder):
    write_features(folder, [label("L0/1", "x", score=None)])
    atlas = json.loads((folder / "features" / "atlas.json").read_text())
    atlas["layers"]["0"] |= {"dead_share": math.nan, "note": "text"}
    (folder / "features" / "atlas.json").write_text(json.dumps(atlas))
    names = [result.metric_name for result in model_card(folder).data.eval_results]
    assert "dead share, block 0" not in names
    assert "dead share, block 2" in names


def test_the_code_in_the_cards_of_this_repository_is_that_of_the_template(tmp_path):
    folder = tmp_path / "smollm2-135m-mfn-demo"
    base = LlamaConfig(num_hidden_layers=30, hidden_size=576)
    MFNConfig(text_config=base, layers=[8, 16], num_features=2304).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    card = ModelCard.load(Path(__file__).parents[2] / "model_cards" / f"{folder.name}.md")
    assert python_of(card.text) == python_of(model_card(folder).text) != ""


def test_the_reference_card_has_what_was_measured():
    root, name = Path(__file__).parents[2], "smollm2-135m-mfn-4-blocks"
    results = root / "benchmarks" / "results"
    record = json.loads((results / "reference_cards" / f"{name}.json").read_text())
    harvest = json.loads((results / "atlas.json").read_text())["atlas"]
    labels = {of["feature"]: of for of in json.loads((results / "labels.json").read_text())["features"]}
    card = ModelCard.load(root / "model_cards" / f"{name}.md")
    found = [result.metric_value for result in card.data.eval_results if result.metric_type == "perplexity"]
    assert found == [row[figure] for row in record["perplexity"] for figure in ("base", "alpha_0", "alpha_1")]
    rows = {row[0]: row for row in cells(card.text) if row}
    assert rows["blocks with an MFN layer, from 0"][1] == ", ".join(map(str, record["layers"]))
    assert f"an atlas of {harvest['tokens']:,} tokens" in card.text
    shown = {feature: rows[feature][1:4] for feature in labels if feature in rows}
    assert shown == {name: [labels[name]["concept"], "automatic", f"{labels[name]['score']:,.4g}"] for name in shown}
    assert len(shown) >= 5


def test_the_cards_of_this_repository_have_the_figures_of_their_runs():
    root = Path(__file__).parents[2]
    figures = json.loads((root / "benchmarks" / "results" / "demo.json").read_text())
    card = ModelCard.load(root / "model_cards" / "smollm2-135m-mfn-demo.md")
    names = ("base_perplexity", "perplexity_alpha_0", "perplexity_alpha_1")
    found = [result.metric_value for result in card.data.eval_results if result.metric_type == "perplexity"]
    assert found == [figures[name] for name in names]
    rows = dict(row for row in cells(card.text) if len(row) == 2)
    assert rows["blocks with an MFN layer, from 0"] == ", ".join(map(str, figures["layers"]))
    assert rows["features per layer, m"] == f"{figures['num_features']:,}"
    assert f"{sum(phase['tokens'] for phase in figures['training']):,} tokens" in card.text
