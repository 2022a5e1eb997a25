"""MFN layers as SAEs of SAELens and sparsify: their forward passes, in float64, give the layer's codes."""

import json
import sys

import pytest
import torch
from conftest import HIDDEN, make_base, make_mfn, tokens
from dense_peers import saelens, sparsify
from safetensors.torch import load_file

from modeling_mfn import Scale, export_saes
from modeling_mfn.utils.extras import MissingExtra

FILES = {"saelens": "sae_weights.safetensors", "sparsify": "sae.safetensors"}
PEERS = {"saelens": saelens, "sparsify": sparsify}


def stream(rows=200, seed=5):
    """Tokens (N, d) of different lengths, with a mean and two large entries."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.rand(rows, 1, generator=generator, dtype=torch.float64).exp() * 4
    h = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64) * lengths + 1
    h[:, :2] *= 40
    return h


def read(place, format):
    return json.loads((place / "cfg.json").read_text()), load_file(place / FILES[format])


def of_layer(layer, h):
    with torch.no_grad():
        code = layer.encode(h)
        return code.to_dense(), layer.reconstruct(code, layer.standardise(h))


def assert_equal(model, layer, format, folder, without=()):
    """Compares an exported layer with the model's, on a stream. The codes of some features are left out."""
    place = export_saes(model, folder, format, [layer])[layer]
    h = stream()
    own, theirs = of_layer(model.mfn_layers[layer], h), PEERS[format](*read(place, format), h)
    kept = [feature for feature in range(model.config.num_features) if feature not in without]
    torch.testing.assert_close(theirs[0][:, kept], own[0][:, kept], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(theirs[1], own[1], rtol=1e-9, atol=1e-9)
    assert own[0].any()
    return place


SETTINGS = [
    ("saelens", {"input_norm": "layer"}),
    ("saelens", {"input_norm": "none", "decoder_bias": False}),
    ("saelens", {"input_norm": "layer", "codes": "update", "shared_decoder": True}),
    ("sparsify", {"input_norm": "none"}),
    ("sparsify", {"input_norm": "none", "codes": "update", "decoder_bias": False}),
]


@pytest.mark.parametrize(("format", "settings"), SETTINGS)
def test_an_exported_layer_has_the_same_codes_and_reconstructions(family_base, tmp_path, format, settings):
    model = make_mfn(family_base.double(), layers=[0, 2], **settings)
    for layer in (0, 2):
        place = assert_equal(model, layer, format, tmp_path)
        found = read(place, format)[0]["metadata"]
        blocks = "h" if model.config.text_config.model_type == "gpt2" else "layers"
        tap = f"model.backbone.{blocks}.{layer}.mfn.hook_in"
        of_stream = model.config.codes == "stream"
        assert found["hook_name"] == (f"blocks.{layer}.hook_resid_mid" if of_stream else tap)
        assert found["hf_hook_name"] == tap
        assert found["stream"] == (f"resid_mid.{layer}" if of_stream else None)
        assert model.get_submodule(tap) is model.mfn_layers[layer].hook_in
        assert model.base_model.get_submodule(tap.removeprefix("model.")) is model.mfn_layers[layer].hook_in
        assert place.name == (tap.removeprefix("model.") if format == "sparsify" else found["hook_name"])
        wanted = {"layer": layer, "alpha": 1.0, "k": 8, "features_digest": model.features_digest}
        assert wanted.items() <= found.items()


@pytest.mark.parametrize(("format", "input_norm"), [("saelens", "layer"), ("sparsify", "none")])
def test_edited_features_come_out_as_they_are(family_base, tmp_path, format, input_norm):
    model = make_mfn(family_base.double(), layers=[0, 2], input_norm=input_norm)
    codes = of_layer(model.mfn_layers[2], stream())[0]
    frequent = codes.count_nonzero(0).argsort(descending=True)[:6].tolist()
    model.bake({(2, feature): Scale(scale) for feature, scale in zip(frequent, (-0.5, 3.0, 0.0), strict=False)})
    assert_equal(model, 2, format, tmp_path)
    model.prune_features(2, pruned := frequent[3:])
    for _ in range(2):  # pruned features compete in both: they take places, and write nothing
        place = assert_equal(model, 2, format, tmp_path, without=pruned)
        theirs = PEERS[format](*read(place, format), stream())[0]
        assert theirs[:, pruned].any()
        assert not of_layer(model.mfn_layers[2], stream())[0][:, pruned].any()
        model.compact()
    model.compact(keep_competition=False)
    assert_equal(model, 2, format, tmp_path)
    config, tensors = read(place, format)
    assert config["metadata"]["pruned_features"] == sorted(pruned)
    assert not tensors["W_dec"][pruned].any()


def test_pruned_features_of_a_shared_decoder_write_nothing(tmp_path):
    model = make_mfn(make_base("gpt2-tied").double(), shared_decoder=True)
    model.prune_features(1, pruned := list(range(0, 80, 3)))
    assert_equal(model, 1, "saelens", tmp_path, without=pruned)
    assert_equal(model, 0, "saelens", tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_stay_exact(tmp_path, dtype):
    model = make_mfn(make_base("llama-tied"), input_norm="none").to(dtype)
    places = {format: export_saes(model, tmp_path, format, [1])[1] for format in PEERS}
    config, tensors = read(places["saelens"], "saelens")
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert torch.equal(tensors["W_enc"].T, model.mfn_layers[1].encoder.weight)
    model.double()
    own = of_layer(model.mfn_layers[1], stream())
    for format, place in places.items():
        for theirs, ours in zip(PEERS[format](*read(place, format), stream()), own, strict=True):
            assert (theirs - ours).abs().max() < 1e-6 * ours.abs().max()


@pytest.mark.parametrize(
    ("settings", "format", "layers", "message"),
    [
        ({"coding_rounds": 2}, "saelens", "all", "coding_rounds is 2 and refine_steps is 0"),
        ({"refine_steps": 3}, "saelens", "all", "coding_rounds is 1 and refine_steps is 3"),
        ({"input_norm": "layer"}, "sparsify", "all", "input_norm is 'layer', and sparsify's SAEs"),
        ({"layers": [0, 2]}, "saelens", [0, 1], r"block 1 has no MFN layer; blocks with one are \[0, 2\]"),
        ({}, "dictionary_learning", "all", "format is 'dictionary_learning'; it must be saelens or sparsify"),
    ],
)
def test_what_a_format_cannot_state_is_refused(tmp_path, settings, format, layers, message):
    model = make_mfn(make_base("gpt2-tied"), **settings)
    with pytest.raises(ValueError, match=message):
        export_saes(model, tmp_path, format, layers)
    assert not list(tmp_path.iterdir())


def test_without_saelens_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(MissingExtra, match="to_saelens needs SAELens, which is not installed; pip install sae-lens"):
        make_mfn(make_base("gpt2-tied")).to_saelens(1)


@pytest.mark.parametrize("codes", ["stream", "update"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_tap_passes_what_is_coded(family_base, codes, alpha):
    model = make_mfn(family_base, codes=codes, alpha=alpha)
    batch, seen = tokens(2, 7), {}
    with torch.no_grad():
        expected = model(**batch, output_reconstructions=True)
        for layer, mfn in model.mfn_layers.items():
            mfn.hook_in.register_forward_hook(lambda module, args, output, layer=layer: seen.update({layer: output}))
        logits = model(**batch).logits
    assert torch.equal(logits, expected.logits)
    for layer, reconstruction in expected.reconstructions.items():
        assert torch.equal(seen[layer], reconstruction.residual)
    assert not [name for name in model.state_dict() if "hook_in" in name]


def test_a_hook_that_changes_the_tap_changes_what_is_coded():
    model = make_mfn(make_base("llama-tied"))
    batch = tokens(2, 7)
    handle = model.mfn_layers[1].hook_in.register_forward_hook(lambda module, args, output: 2 * output + 1)
    with torch.no_grad():
        found = model(**batch, output_reconstructions=True).reconstructions[1].residual
        handle.remove()
        assert torch.equal(found, 2 * model(**batch, output_reconstructions=True).reconstructions[1].residual + 1)
