"""Explanations compared with dense equations, finite differences and ablations by hooks; explanations as documents."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import VOCABULARY, make_base, make_mfn, stream_before
from datasets import Dataset
from tokenizers_for_tests import numbered_words
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from modeling_mfn import Add, Clamp, Explanation, FeatureAtlas, Scale, explain
from modeling_mfn.cli.main import main

TEXT = "w9 w33 w5 w71 w20 w9 w60"
HOSTILE = ["\u202e", "\x1b[31m", "$x^2$", "[red]", "<script>", "\n", "\u0000", "$", "[/]", "x" * 3000, "\u05d0", "\\"]
"""Texts of words 20 and following in a tokenizer for hostile text."""


TOKENIZER = numbered_words()


def exact_norm(self, h):
    """Computes Llama's norm in the precision of its input. The original uses float32, too coarse for differences."""
    return self.weight * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.variance_epsilon)


CASES = {
    "llama": ("llama-tied", {}),
    "gpt2": ("gpt2-tied", {}),
    "gpt2 updates": ("gpt2-tied", {"codes": "update"}),
    "llama pursuit": ("llama-tied", {"codes": "update", "coding_rounds": 3, "refine_steps": 1}),
}


@pytest.fixture(params=CASES)
def model(request, monkeypatch):
    base, settings = CASES[request.param]
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    return make_mfn(make_base(base).double(), layers=[0, 1, 2], k=6, **settings)


def dense_value(model, edits, text=TEXT, position=-1, contrast=lambda logits: logits.mean()):
    """Logit of the likeliest token minus `contrast`, with the dense code of each layer edited by a hook.

    The token is the likeliest without edits.
    """
    ids = torch.tensor([TOKENIZER(text)["input_ids"]])
    best = model(ids).logits[0, position].argmax()

    def replace(module, arguments, _):
        h, before = arguments[0], stream_before(module, arguments)
        std, mean = torch.std_mean(h - before, dim=-1, keepdim=True)
        z = edits[module.layer_index](module.encode(h - before).to_dense())
        h_hat = (z @ module.decoder.weight + module.decoder.bias) * std + mean
        return (1 - model.config.alpha) * h + model.config.alpha * (before + h_hat)

    handles = [model.mfn_layers[layer].register_forward_hook(replace) for layer in edits]
    try:
        logits = model(ids).logits[0, position]
    finally:
        for handle in handles:
            handle.remove()
    return logits[best] - contrast(logits)


@pytest.mark.halved
@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_attributions_are_derivatives_and_ablations_are_real(model, alpha):
    """Attributions equal (v(1 + e) - v(1 - e)) / 2e, where v(c) is the value with a feature's activations times c."""
    model.set_blend(alpha)
    explanation = explain(model, TOKENIZER, TEXT, 4, top=4, verify=6, trace=0)
    assert len(explanation.tokens) == 5
    value = dense_value(model, {}, position=4)
    assert explanation.target.value == pytest.approx(value.item(), abs=1e-9)
    small = 1e-6
    for feature in explanation.features:

        def scaled(factor, feature=feature):
            def edit(z):
                factors = torch.ones(z.shape[-1], dtype=z.dtype)
                factors[feature.index] = factor
                return z * factors

            return dense_value(model, {feature.layer: edit}, position=4)

        slope = (scaled(1 + small) - scaled(1 - small)) / (2 * small)
        assert feature.attribution == pytest.approx(slope.item(), rel=1e-5, abs=1e-7)
        if feature.ablation is not None:
            assert feature.ablation == pytest.approx((value - scaled(0.0)).item(), abs=1e-9)
    assert [f.ablation is not None for f in explanation.features] == [True] * 6 + [False] * 6


@pytest.mark.halved
@pytest.mark.parametrize("method", ["gradient", "integrated"])
def test_every_layer_accounts_for_the_whole_value(model, method):
    """Attributions of all features, the measured value without features, and a remainder add up to the value."""
    explanation = explain(model, TOKENIZER, TEXT, method=method, top=1000, trace=0, verify=0)
    value = dense_value(model, {})
    for layer in explanation.layers:
        without = dense_value(model, {layer.layer: torch.zeros_like})
        assert layer.baseline == pytest.approx(without.item(), abs=1e-9)
        total = sum(feature.attribution for feature in layer.features)
        assert (layer.attribution, layer.others) == pytest.approx((total, 0), abs=1e-9)
        assert layer.baseline + total + layer.remainder == pytest.approx(value.item(), abs=1e-9)
        assert layer.active == len(layer.features)
        by_token = torch.zeros(len(explanation.tokens), dtype=torch.float64)
        for feature in layer.features:
            by_token[feature.positions] += torch.tensor(feature.attributions, dtype=torch.float64)
        torch.testing.assert_close(by_token, torch.tensor(layer.by_token, dtype=torch.float64), atol=1e-9, rtol=0)


def test_integrated_attributions_leave_nothing_where_nothing_jumps(family_base):
    """A single MFN layer has no TopK on the path, so that remainders fall as 1 / steps^2."""
    model = make_mfn(family_base.double(), layers=[1], k=6)
    left = {}
    for steps in (12, 48):
        explanation = explain(model, TOKENIZER, TEXT, method="integrated", steps=steps, top=2, trace=2, verify=0)
        remainders = [explanation.layers[0].remainder, *(f.inputs.remainder for f in explanation.features)]
        assert len(remainders) == 3
        left[steps] = sum(map(abs, remainders))
    assert left[48] < min(0.01, left[12] / 8)


def slope_along(number, embeddings, mean, place):
    """Returns the slope of a number as one token's embedding moves away from the mean embedding."""
    ends = []
    for step in (1e-6, -1e-6):
        moved = embeddings.clone()
        moved[0, place] += step * (embeddings[0, place] - mean)
        ends.append(number(moved))
    return (ends[0] - ends[1]) / 2e-6


def test_inputs_account_for_a_features_pre_activation(model):
    """Input attributions equal finite differences along each token's embedding, seen by a hook on the layer's input."""
    explanation = explain(model, TOKENIZER, TEXT, top=2, trace=6, verify=0)
    table = model.get_input_embeddings().weight
    embeddings, mean = table[torch.tensor(explanation.token_ids)].unsqueeze(0), table.mean(0)

    def number(feature, given):
        if model.config.coding_rounds > 1:  # the activation itself
            code = model(inputs_embeds=given, output_codes=True).codes[feature.layer]
            return code.to_dense()[0, feature.position, feature.index].item()
        seen = []
        layer = model.mfn_layers[feature.layer]
        handle = layer.register_forward_pre_hook(
            lambda module, arguments: seen.append(arguments[0] - stream_before(module, arguments))
        )
        model(inputs_embeds=given)
        handle.remove()
        h = seen[0][0, feature.position]
        x = (h - h.mean()) / (h.std() + layer.epsilon)
        return (x @ layer.encoder.weight[feature.index] + layer.encoder.bias[feature.index]).item()

    assert len(explanation.features) == 6
    for feature in explanation.features:
        inputs = feature.inputs
        assert inputs.value == pytest.approx(feature.activation, abs=1e-9)  # active and not steered
        assert inputs.value == pytest.approx(number(feature, embeddings), abs=1e-9)
        assert inputs.baseline == pytest.approx(number(feature, mean.expand_as(embeddings)), abs=1e-9)
        assert inputs.baseline + sum(inputs.by_token) + inputs.remainder == pytest.approx(inputs.value, abs=1e-9)
        for place, share in enumerate(inputs.by_token):
            slope = slope_along(lambda given, feature=feature: number(feature, given), embeddings, mean, place)
            assert share == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_embeddings_account_for_the_value_of_updates(model):
    """Compares with finite differences along each token's embedding."""
    explanation = explain(model, TOKENIZER, TEXT, token="w44", against=None, top=1, trace=0, verify=0)
    account = explanation.embeddings
    if model.config.codes == "stream":
        assert account is None
        return
    table = model.get_input_embeddings().weight
    embeddings, mean = table[torch.tensor(explanation.token_ids)].unsqueeze(0), table.mean(0)

    def value(given):
        return model(inputs_embeds=given).logits[0, -1, 44].item()

    assert account.value == pytest.approx(value(embeddings), abs=1e-9)
    assert account.baseline == pytest.approx(value(mean.expand_as(embeddings)), abs=1e-9)
    assert account.baseline + sum(account.by_token) + account.remainder == pytest.approx(account.value, abs=1e-9)
    for place, share in enumerate(account.by_token):
        assert share == pytest.approx(slope_along(value, embeddings, mean, place), rel=1e-4, abs=1e-7)


def test_what_is_explained_can_be_chosen(model):
    logits = model(torch.tensor([TOKENIZER(TEXT)["input_ids"]])).logits[0, 2]
    probability = logits.softmax(-1)
    few = {"top": 1, "trace": 0, "verify": 0}
    best = explain(model, TOKENIZER, TEXT, 2, against=None, **few).target
    assert (best.token_id, best.against) == (logits.argmax().item(), None)
    assert (best.value, best.probability) == pytest.approx((logits.max().item(), probability.max().item()))
    for token in ("w44", 44):
        held = explain(model, TOKENIZER, TEXT, -5, token=token, against="w50", **few).target
        assert (held.token, held.against, held.against_id, held.against_token) == ("w44", "token", 50, "w50")
        assert held.value == pytest.approx((logits[44] - logits[50]).item(), abs=1e-9)
    whole, cut = explain(model, TOKENIZER, TEXT, 2), explain(model, TOKENIZER, "w9 w33 w5")
    assert whole == cut  # later tokens are not read


def test_steering_holds_and_the_model_stays_as_it_was(model):
    """Attributions, baselines and ablations are those of the steered model."""
    model.train()
    model.mfn_layers[1].encoder.bias.requires_grad_(False)
    before = explain(model, TOKENIZER, TEXT, top=80, verify=0, trace=0)
    clamped = before.layers[1].features[0]
    changes = {(1, clamped.index): Clamp(2.5), "L0/3": Add(1.5), "L2/7": Scale(0.0)}
    with model.steer(changes):
        steered = explain(model, TOKENIZER, TEXT, token=before.target.token_id, top=80, verify=200, trace=0)
    model.eval()
    with model.steer(changes):
        logits = model(torch.tensor([TOKENIZER(TEXT)["input_ids"]])).logits[0, -1]
    model.train()
    value = logits[before.target.token_id] - logits.mean()
    assert steered.target.value == pytest.approx(value.item(), abs=1e-9)
    assert steered.target.value != pytest.approx(before.target.value, abs=1e-3)
    (found,) = (f for f in steered.layers[1].features if f.index == clamped.index)
    assert found.activations == [2.5] * len(steered.tokens)
    assert not any(f.name == "L2/7" for f in steered.features)
    for layer in steered.layers:
        assert layer.baseline + layer.attribution + layer.remainder == pytest.approx(value.item(), abs=1e-9)
    assert all(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "model.backbone.layers.1.mfn.encoder.bias" if "llama" in model.config.text_config.model_type
        else "model.backbone.h.1.mfn.encoder.bias"
    ]  # fmt: skip
    assert all(parameter.grad is None for parameter in model.parameters())
    assert explain(model, TOKENIZER, TEXT, top=80, verify=0, trace=0) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.mfn_layers.values())


def test_a_planted_cause_is_found(family_base):
    """Token 33 activates feature 5 of block 1. This feature writes the direction of token 70.

    Nothing else in the model has an effect: attention and MLPs write 0, and the layer reads no other token.
    """
    model = make_mfn(family_base.double(), layers=[1], k=4, num_features=40)
    layer, head = model.mfn_layers[1], model.get_output_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "c_proj", "wpe")):
                parameter.zero_()
        head.copy_(torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64))[0][:, :32] * 4)
        head -= head.mean(1, keepdim=True)
        layer.encoder.weight.zero_()
        layer.encoder.bias.fill_(-1.0)
        layer.decoder.bias.zero_()
        layer.encoder.weight[5] = head[33] / head[33].norm()
        layer.encoder.bias[5] = -3.0
        layer.decoder.weight[5] = head[70] / head[70].norm()
    expected = layer.encode(head[33]).to_dense()[5].item()
    text = "w9 w5 w20 w33"
    assert (layer.encode(head[[9, 5, 20]]).values == 0).all()
    assert expected > 1
    explanation = explain(model, TOKENIZER, text)
    assert explanation.target.token == "w70"
    (feature,) = explanation.features
    assert (feature.name, feature.position, feature.activation) == ("L1/5", 3, pytest.approx(expected))
    assert feature.ablation == pytest.approx(explanation.target.value - explanation.layers[0].baseline)
    assert feature.ablation > 0.9 * explanation.target.value
    assert feature.inputs.by_token[:3] == [0.0, 0.0, 0.0]
    assert feature.inputs.by_token[3] != 0


def test_half_precision_is_explained_as_it_runs(family_base):
    """Accounts in bfloat16 add up, and are close to those in float32."""
    model = make_mfn(family_base, layers=[1])
    exact = explain(model, TOKENIZER, TEXT, top=5)
    rough = explain(model.bfloat16(), TOKENIZER, TEXT, token=exact.target.token_id, top=80)
    assert model.dtype == torch.bfloat16
    assert rough.target.value == pytest.approx(exact.target.value, abs=0.2)
    (layer,) = rough.layers
    assert layer.baseline + layer.attribution + layer.remainder == pytest.approx(rough.target.value, abs=1e-6)
    found = {feature.name: feature.attribution for feature in rough.features}
    for feature in exact.features[:3]:
        assert found[feature.name] == pytest.approx(feature.attribution, rel=0.2, abs=0.1)


WINDOW = 40


def build_atlas(model, sources):
    """Builds an atlas of random windows, one per source, that are longer than an example's context."""
    rows = torch.randint(3, VOCABULARY, (len(sources), WINDOW), generator=torch.Generator().manual_seed(0)).tolist()
    text = Dataset.from_dict({"input_ids": rows, "source": sources})
    return text, FeatureAtlas.build(model, TOKENIZER, text, progress=False)


def test_an_atlas_says_where_features_fire(family_base):
    """Entries equal the codes of the windows. The atlas lacks the model's third layer, and one window has no source."""
    older = make_mfn(family_base, layers=[0, 1], k=6)
    text, atlas = build_atlas(older, ["drama"] * 2 + ["code"] * 5 + [None])
    atlas.label("L1/3", "[red]kings")
    codes = older(torch.tensor(text["input_ids"]), output_codes=True).codes
    model = make_mfn(family_base, layers=[0, 1, 2], k=6)
    for layer in older.mfn_layers:
        model.mfn_layers[layer].load_state_dict(older.mfn_layers[layer].state_dict())
    features = explain(model, TOKENIZER, TEXT, top=80, atlas=atlas, trace=0, verify=0).features
    assert {feature.layer for feature in features if feature.atlas is None} == {2}
    entries = {(f.layer, f.index): f.atlas for f in features if f.layer != 2}
    assert len(entries) > 10
    examples = 0
    for (layer, index), entry in entries.items():
        fires = codes[layer].to_dense()[..., index].clone()
        fires[:, 0] = 0  # first tokens are not counted
        by_window = (fires > 0).sum(1).tolist()
        counts = {"drama": sum(by_window[:2]), "code": sum(by_window[2:7])}
        assert entry.sources == {source: count for source, count in counts.items() if count}
        assert list(entry.sources.values()) == sorted(entry.sources.values(), reverse=True)
        assert entry.firing_rate == pytest.approx(sum(by_window) / (8 * (WINDOW - 1)))
        assert entry.label == ("[red]kings" if (layer, index) == (1, 3) else None)
        best = fires.max(1).values.sort(descending=True)
        for rank, example in enumerate(entry.examples):  # the strongest places of different windows
            if best.values[rank] == 0:
                break
            window = best.indices[rank]
            place = fires[window].argmax()
            assert example.tokens[example.position] == f"w{text[window.item()]['input_ids'][place]}"
            assert example.activations[example.position] == pytest.approx(best.values[rank].item(), rel=1e-4)
            assert example.source == ("drama" if window < 2 else "code" if window < 7 else None)
            examples += 1
    assert examples > 10
    shown = render(explain(model, TOKENIZER, TEXT, atlas=atlas, trace=4, verify=4), width=80)
    assert "fires in" in shown
    assert "…" not in shown  # nothing is cut on a narrow terminal


def render(explanation, width=160):
    from rich.console import Console

    console = Console(width=width, color_system=None, force_terminal=True)
    with console.capture() as capture:
        console.print(explanation.table())
    return capture.get()


def test_hostile_text_does_no_harm_and_everything_comes_back(tmp_path):
    """Control characters, marks of direction, markup and mathtext are shown as text, and saved unchanged."""
    model = make_mfn(make_base("gpt2-tied"), layers=[0, 2])
    tokenizer = numbered_words(HOSTILE)
    _, atlas = build_atlas(model, ["\x1b]0;title\x07[red]"] * 8)
    for name in atlas:
        atlas.label(name, "$\\frac{[bold]\u202e")
    explanation = explain(model, tokenizer, "|".join(HOSTILE), token=22, against=21, atlas=atlas)
    assert explanation.tokens == HOSTILE
    shown = render(explanation)
    assert not any(mark in shown for mark in ("\u202e", "\x1b", "\x00", "\x07"))
    assert all(mark in shown for mark in ("\\u202e", "\\x1b", "[bold]", "$x^2$"))
    assert "x" * 100 not in shown

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explanation.save(tmp_path / "out")
        explanation.save(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "explanation.json", "explanation.png", "explanation.svg", "graph.json", "graph-metadata.json",
    }  # fmt: skip
    assert (tmp_path / "out" / "explanation.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "<script>" not in (tmp_path / "out" / "explanation.svg").read_text()
    assert (tmp_path / "out" / "explanation.json").read_text().isascii()
    assert Explanation.load(tmp_path / "out") == explanation
    table = explanation.to_pandas()
    assert list(table["attribution"]) == [feature.attribution for feature in explanation.features]
    assert list(table["token"]) == [HOSTILE[feature.position] for feature in explanation.features]


def test_the_figure_shows_the_numbers(model):
    """Colours show attributions by token and layer, bars the strongest features, and marks their ablations.

    Earlier tokens of a long text share one column.
    """
    explanation = explain(model, TOKENIZER, " ".join([TEXT] * 8), top=4, verify=5)
    heat, bars, _ = explanation.figure().axes
    shown = torch.tensor(heat.images[0].get_array())
    values = torch.tensor([layer.by_token for layer in explanation.layers], dtype=torch.float64)
    expected = torch.cat([values[:, :17].sum(1, keepdim=True), values[:, 17:]], 1)
    torch.testing.assert_close(shown, expected, atol=1e-12, rtol=0)
    assert [label.get_text() for label in heat.get_xticklabels()][:2] == ["(17 earlier)", explanation.tokens[17]]
    assert [bar.get_width() for bar in bars.patches] == [f.attribution for f in explanation.features]
    (marks,) = (line for line in bars.lines if line.get_label() == "measured by ablation")
    assert list(marks.get_xdata()) == [f.ablation for f in explanation.features[:5]]


def test_a_foreign_or_later_document_is_refused(model):
    text = explain(model, TOKENIZER, TEXT, top=1, trace=0, verify=0).to_json()
    for wrong, message in (
        (text.replace('"schema_version": 1', '"schema_version": 2'), "schema version 2"),
        (text[:-9], "not an explanation"),
        ("[]", "not an explanation"),
        (json.dumps({**json.loads(text), "extra": 1}), "not an explanation"),
    ):
        with pytest.raises(ValueError, match=message):
            Explanation.from_json(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position": 7}, "position is 7; the text has 7 tokens, counted from 0"),
        ({"position": -8}, "position is -8"),
        ({"position": 1.0}, "position is 1.0"),
        ({"text": "\ud800"}, "text is .*; it must be text, in UTF-8"),
        ({"token": "\ud800"}, "token is .*; it must be text, in UTF-8"),
        ({"text": ""}, "the text has 0 tokens"),
        ({"text": " ".join(["w5"] * 65)}, "the text has 65 tokens up to the position; the model reads 64"),
        ({"token": "w5 w6"}, r"token 'w5 w6' is 2 tokens \('w5', 'w6'\)"),
        ({"token": 96}, "token is 96; it must be a text, or a token's id from 0 to 95"),
        ({"against": -1}, "against is -1"),
        ({"method": "shapley"}, "method is 'shapley'"),
        ({"steps": 0}, "steps is 0"),
        ({"top": 0}, "top is 0"),
        ({"trace": -1}, "trace is -1"),
        ({"verify": 1.5}, "verify is 1.5"),
    ],
)
def test_bad_input_is_named(arguments, message):
    model = make_mfn(make_base("llama-tied"), layers=[1])
    with pytest.raises(ValueError, match=message):
        explain(model, TOKENIZER, **{"text": TEXT} | arguments)


def test_models_that_read_no_features_are_refused(family_base):
    with pytest.raises(ValueError, match="has no MFN layers; convert the model first"):
        explain(family_base, TOKENIZER, TEXT)
    model = make_mfn(family_base, layers=[1])
    with pytest.raises(ValueError, match="MFNModel is not an MFN model with an LM head"):
        explain(model.model, TOKENIZER, TEXT)
    model.set_blend(0.0)
    with pytest.raises(ValueError, match="alpha is 0: the model reads no features"):
        explain(model, TOKENIZER, TEXT)
    model.set_blend(1.0)
    with torch.no_grad():
        model.mfn_layers[1].decoder.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        explain(model, TOKENIZER, TEXT)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_on_the_command_line(tmp_path, capsys):
    model = make_mfn(make_base("llama-tied"), layers=[0, 2])
    model.save_pretrained(tmp_path / "mfn")
    TOKENIZER.save_pretrained(tmp_path / "mfn")
    out = tmp_path / "out"

    def run(*options):
        with pytest.raises(SystemExit) as leaving:
            main(["explain", str(tmp_path / "mfn"), TEXT, "--output", str(out), *options])
        return leaving.value.code or 0

    assert run("--position", "4", "--token", "w44", "--top", "2") == 0
    explanation = Explanation.load(out)
    assert explanation == replace(explain(model, TOKENIZER, TEXT, 4, token="w44", top=2), model="mfn")
    assert json.loads((out / "graph.json").read_text()) == explanation.to_graph()
    assert explanation.features[0].name in capsys.readouterr().out
    before = (out / "explanation.json").read_bytes()
    assert run() == 2
    rows = torch.randint(3, 96, (6, 16), generator=torch.Generator().manual_seed(0)).tolist()
    atlas = FeatureAtlas.build(model, TOKENIZER, Dataset.from_dict({"input_ids": rows, "source": ["tales"] * 6}))
    atlas.save_pretrained(tmp_path / "mfn")
    assert run("--overwrite") == 0
    told = {f.name: f.atlas for f in Explanation.load(out).features}
    assert {name: entry.firing_rate for name, entry in told.items()} == {n: atlas[n].firing_rate for n in told}
    assert {source for entry in told.values() for source in entry.sources} == {"tales"}
    before = (out / "explanation.json").read_bytes()
    assert run("--token", "w5 w6", "--overwrite") == 2
    assert (out / "explanation.json").read_bytes() == before
