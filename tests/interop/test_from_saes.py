"""SAEs of SAELens, sparsify and OpenAI as MFN layers: codes and reconstructions are those of the peer's forward."""

import html
import json
import sys
import types

import pytest
import torch
from conftest import HIDDEN, make_base, make_mfn, tokens
from dense_peers import openai, saelens, sparsify, top
from family_bases import family_base as base_of
from safetensors.torch import load_file, save_file
from test_export import of_layer, stream

from modeling_mfn import MFNForCausalLM, export_saes
from modeling_mfn.hub.card import model_card
from modeling_mfn.interop.sources import find_saes
from modeling_mfn.utils.extras import MissingExtra

M, K = 72, 6
SAELENS = {
    "architecture": "topk",
    "d_in": HIDDEN,
    "d_sae": M,
    "k": K,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": False,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "rescale_acts_by_decoder_norm": False,
    "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.1.hook_resid_mid", "model_name": "gpt2"},
}
BEFORE_6 = {
    "architecture": "standard",
    "d_in": HIDDEN,
    "d_sae": M,
    "dtype": "torch.float32",
    "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": K},
    "apply_b_dec_to_input": True,
    "normalize_activations": "layer_norm",
    "hook_name": "blocks.1.hook_resid_mid",
    "hook_layer": 1,
    "lr": 1e-4,
}
SPARSIFY = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": M,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": HIDDEN,
}


def random(*shape):
    return torch.randn(shape) / 4


def directions(unit=False):
    """Random directions (M, d), by default with norms from 0.5 to 2."""
    rows = torch.nn.functional.normalize(torch.randn(M, HIDDEN), dim=-1)
    return rows if unit else rows * (0.5 + 1.5 * torch.rand(M, 1))


def saelens_folder(folder, unit=False, more=None, seed=1, **changes):
    """Writes an SAE as SAELens does. Returns its folder, its config and its tensors."""
    torch.manual_seed(seed)
    config = (BEFORE_6 if changes.pop("before_6", False) else SAELENS) | changes
    tensors = {"W_enc": random(HIDDEN, M), "b_enc": random(M), "W_dec": directions(unit), "b_dec": random(HIDDEN)}
    tensors = {name: tensor.contiguous() for name, tensor in (tensors | (more or {})).items()}
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder, config, tensors


def sparsify_folder(folder, **changes):
    torch.manual_seed(2)
    config = SPARSIFY | changes
    tensors = {
        "encoder.weight": random(M, HIDDEN),
        "encoder.bias": random(M),
        "W_dec": directions(),
        "b_dec": random(HIDDEN),
    }
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, folder / "sae.safetensors")
    return folder, config, tensors


def openai_state(seed=3, **changes):
    torch.manual_seed(seed)
    statistics = {name: torch.ones(M) for name in ("latents_activation_frequency", "latents_mean_square")}
    return {
        "pre_bias": random(HIDDEN),
        "latent_bias": random(M),
        "encoder.weight": random(M, HIDDEN),
        "decoder.weight": directions(unit=True).T.contiguous(),
        "stats_last_nonzero": torch.zeros(M, dtype=torch.long),
        **statistics,
        "activation": "TopK",
        "activation_state_dict": {"k": K, "postact_fn": "ReLU"},
    } | changes


def openai_file(folder, layer=1, **changes):
    place = folder / "resid_post_attn_v5_32k" / "autoencoders"
    place.mkdir(parents=True, exist_ok=True)
    torch.save(state := openai_state(**changes), place / f"{layer}.pt")
    return place / f"{layer}.pt", state


def assert_equal(model, expected, layer=1):
    for own, theirs in zip(of_layer(model.mfn_layers[layer], stream()), expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-9)
        assert own.any()


KINDS = [
    {},
    {"apply_b_dec_to_input": True, "normalize_activations": "layer_norm"},
    {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": True},
    {"rescale_acts_by_decoder_norm": True, "normalize_activations": "layer_norm", "aux_loss_coefficient": 1.0},
    {"dtype": "bfloat16", "apply_b_dec_to_input": True},
]


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_a_topk_sae_of_saelens(family_base, tmp_path, changes):
    place, config, tensors = saelens_folder(tmp_path / "sae", **changes)
    model = MFNForCausalLM.from_saes(family_base.double(), {1: place}, alpha=0.5)
    cast = {name: tensor.to(getattr(torch, config["dtype"])) for name, tensor in tensors.items()}
    assert_equal(model, saelens(config, cast, stream()))
    assert (model.config.num_features, model.config.k, model.config.alpha) == (M, K, 0.5)
    assert (model.config.codes, model.config.other_sites) == ("stream", {})
    model.save_pretrained(tmp_path / "saved")
    loaded = MFNForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    assert torch.equal(loaded(**tokens(2, 5)).logits, model(**tokens(2, 5)).logits)
    before = model.mfn_layers[1].decoder.weight.clone()
    model.mfn_layers[1].normalise_directions()  # as each step of a training does
    torch.testing.assert_close(model.mfn_layers[1].decoder.weight, before, rtol=0, atol=1e-6)


def test_an_sae_of_saelens_before_version_6(tmp_path):
    ones = {"scaling_factor": torch.ones(M)}
    place, config, tensors = saelens_folder(tmp_path / "v5_32k_layer_1", before_6=True, more=ones)
    model = MFNForCausalLM.from_saes(make_base("gpt2-tied").double(), {1: place})
    assert_equal(model, saelens(config | {"architecture": "topk", "k": K}, tensors, stream()))
    assert model.config.input_norm == "layer"


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_a_relu_sae_is_exact_with_all_features(tmp_path, architecture, caplog):
    more = {"threshold": torch.zeros(M)} if architecture == "jumprelu" else None
    changes = {"architecture": architecture, "apply_b_dec_to_input": True, "more": more}
    place, config, tensors = saelens_folder(tmp_path / "sae", **changes)
    base = make_base("gpt2-tied").double()
    with pytest.raises(ValueError, match=f"the SAEs have a ReLU and no k; give k: {M}, all features, is exact"):
        MFNForCausalLM.from_saes(base, {1: place})
    assert_equal(MFNForCausalLM.from_saes(base, {1: place}, k=M), saelens(config, tensors, stream()))
    assert not caplog.records
    fewer = MFNForCausalLM.from_saes(base, {1: place}, k=3)
    largest = top(saelens(config, tensors, stream())[0], 3)
    torch.testing.assert_close(of_layer(fewer.mfn_layers[1], stream())[0], largest)
    assert f"with k 3 of {M} features the model is not exactly them" in caplog.text


def test_an_sae_of_sparsify(family_base, tmp_path):
    name = "layers.1" if family_base.config.model_type == "llama" else "h.1"
    place, config, tensors = sparsify_folder(tmp_path / name)
    with pytest.raises(ValueError, match=f"was trained at '{name}', and the MFN layer of block 1 stands at"):
        MFNForCausalLM.from_saes(family_base.double(), {1: place})
    model = MFNForCausalLM.from_saes(family_base.double(), {1: place}, allow_other_site=True)
    assert_equal(model, sparsify(config, tensors, stream()))
    assert model.config.other_sites == {"1": name}
    model.save_pretrained(tmp_path / "saved")
    card = html.unescape(str(model_card(tmp_path / "saved")))
    assert "**Trained at another place.**" in card
    assert f"| 1 | {name} |" in card


@pytest.mark.parametrize("activation", ["TopK", "ReLU"])
def test_an_sae_of_openai(family_base, tmp_path, activation):
    changes = {"activation": activation} | ({"activation_state_dict": {}} if activation == "ReLU" else {})
    place, state = openai_file(tmp_path, **changes)
    model = MFNForCausalLM.from_saes(family_base.double(), {1: place}, **({"k": M} if activation == "ReLU" else {}))
    assert_equal(model, openai(state, stream()))
    assert model.config.input_norm == ("layer" if activation == "TopK" else "none")
    assert (model.config.direction_norms, model.config.other_sites) == ({}, {})


@pytest.mark.parametrize("format", ["saelens", "sparsify"])
def test_what_goes_out_comes_back(family_base, tmp_path, format):
    model = make_mfn(family_base.double(), layers=[0, 2], input_norm="layer" if format == "saelens" else "none")
    places = export_saes(model, tmp_path, format)
    assert find_saes(tmp_path) == places
    again = MFNForCausalLM.from_saes(family_base, find_saes(tmp_path), alpha=1.0)
    assert (again.config.layers, again.config.input_norm) == ([0, 2], model.config.input_norm)
    torch.testing.assert_close(again(**tokens(2, 9)).logits, model(**tokens(2, 9)).logits, rtol=1e-9, atol=1e-9)


def test_an_update_is_not_taken_for_a_stream(tmp_path):
    model = make_mfn(make_base("gpt2-tied"), codes="update", input_norm="none")
    for format in ("saelens", "sparsify"):
        places = export_saes(model, tmp_path / format, format)
        with pytest.raises(ValueError, match="hook_in, without the stream before', and the MFN layer"):
            MFNForCausalLM.from_saes(make_base("gpt2-tied"), places)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gated"}, "'gated', which no MFN layer states: its gate is a second encoder"),
        ({"architecture": "matryoshka_batchtopk"}, "which features are active depends on the batch"),
        (
            {"architecture": "jumprelu", "more": {"threshold": torch.full((M,), 0.5)}},
            "JumpReLU with thresholds up to 0.5",
        ),
        ({"normalize_activations": "constant_norm_rescale"}, "cannot rescale a token to a constant norm"),
        ({"normalize_activations": "expected_average_only_in"}, "its scaling factor is not in the file"),
        ({"reshape_activations": "hook_z"}, "the SAE codes heads of an attention"),
        ({"surprise": 1}, "cfg.json: setting 'surprise' is unknown, and may change the function"),
        ({"more": {"W_skip": torch.zeros(2)}}, "tensor W_skip is unknown, and may change the function"),
        ({"more": {"scaling_factor": torch.full((M,), 2.0)}}, "scaling_factor is not 1 everywhere"),
        (
            {"before_6": True, "activation_fn_kwargs": [32]},
            r"activation_fn_kwargs is \[32\]; it must be a mapping",
        ),
        ({"before_6": True, "activation_fn_kwargs": {"k": 6, "signed": True}}, "an MFN layer has k alone"),
        ({"more": {"b_enc": torch.zeros(3)}}, r"b_enc is torch.float32 \(3,\); it must be .* of shape \(72,\)"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of float64, float32"),
        ({"k": 2.5}, "k is 2.5; it must be a whole number of at least 1"),
        ({"d_in": HIDDEN + 1}, f"the SAEs have d_in {HIDDEN + 1}, and the hidden size of the base model is {HIDDEN}"),
        ({"before_6": True, "activation_fn_str": "tanh-relu"}, "activation_fn is 'tanh-relu'"),
        (
            {"metadata": SAELENS["metadata"] | {"hook_name": "blocks.1.hook_resid_post"}},
            "'blocks.1.hook_resid_post', and",
        ),
        (
            {"metadata": SAELENS["metadata"] | {"hook_name": "blocks.2.hook_resid_mid"}},
            "stands at blocks.1.hook_resid_mid",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_sae_of_saelens_that_is_no_mfn_layer_is_refused(tmp_path, changes, message):
    k = {"k": M} if changes.get("architecture") == "jumprelu" else {}
    with pytest.raises(ValueError, match=message):
        MFNForCausalLM.from_saes(make_base("gpt2-tied"), {1: saelens_folder(tmp_path / "sae", **changes)[0]}, **k)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "groupmax"}, "activation is 'groupmax'; an MFN layer has topk alone"),
        ({"transcode": True}, "transcode is True, which no MFN layer states"),
        ({"skip_connection": True}, "skip_connection is True"),
        ({"num_latents": M + 1}, r"encoder.bias is torch.float32 \(72,\)|encoder.weight is torch.float32"),
        ({"k": "6"}, "cfg.json: k: Input should be a valid integer"),
        ({"surprise": 1}, "setting 'surprise' is unknown"),
    ],
)
def test_an_sae_of_sparsify_that_is_no_mfn_layer_is_refused(tmp_path, changes, message):
    place = sparsify_folder(tmp_path / "backbone.h.1.mfn.hook_in", **changes)[0]
    with pytest.raises(ValueError, match=message):
        MFNForCausalLM.from_saes(make_base("gpt2-tied"), {1: place})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "Identity"}, "activation is 'Identity'; an MFN layer has TopK or ReLU"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "postact_fn is 'Identity'"),
        ({"activation_state_dict": {"postact_fn": "ReLU"}}, "k is None; it must be a whole number"),
        ({"decoder.weight": torch.zeros(2, 2)}, r"decoder.weight is torch.float32 \(2, 2\); it must be"),
        ({"surprise": torch.zeros(1)}, "tensor surprise is unknown"),
        ({"surprise": types.SimpleNamespace()}, "cannot be read: UnpicklingError: Weights only load failed"),
    ],
)
def test_a_file_of_openai_that_is_no_mfn_layer_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        MFNForCausalLM.from_saes(make_base("gpt2-tied"), {1: openai_file(tmp_path, **changes)[0]})


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [(torch.nan, "float32"), (torch.inf, "float32"), (1e5, "float16")],
)
def test_weights_that_are_not_finite_are_refused(tmp_path, weight, dtype):
    base = make_base("gpt2-tied").to(getattr(torch, dtype))
    place = saelens_folder(tmp_path / "sae", more={"W_enc": torch.full((HIDDEN, M), weight)})[0]
    with pytest.raises(
        ValueError, match=f"{place}: encoder.weight is not finite in {dtype}, the base model's precision"
    ):
        MFNForCausalLM.from_saes(base, {1: place})


@pytest.mark.parametrize("before_6", [False, True])
def test_an_sae_of_centred_streams_was_trained_at_another_place(tmp_path, before_6):
    centred = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    more = centred if before_6 else {"metadata": SAELENS["metadata"] | centred}
    plain = saelens_folder(tmp_path / "plain", before_6=before_6, normalize_activations="none", **more)[0]
    assert find_saes(tmp_path) == {1: plain}
    with pytest.raises(ValueError, match=r"trained at 'blocks\.1\.hook_resid_mid, centred', and the MFN layer"):
        MFNForCausalLM.from_saes(make_base("gpt2-tied"), {1: plain})
    model = MFNForCausalLM.from_saes(make_base("gpt2-tied"), {1: plain}, allow_other_site=True)
    assert model.config.other_sites == {"1": "blocks.1.hook_resid_mid, centred"}
    # standardising takes the mean away itself
    normed = saelens_folder(tmp_path / "normed", before_6=before_6, normalize_activations="layer_norm", **more)[0]
    assert MFNForCausalLM.from_saes(make_base("gpt2-tied"), {1: normed}).config.other_sites == {}


def test_saes_of_one_model_must_agree(tmp_path):
    base = make_base("gpt2-tied")
    places = {}
    for layer, k in ((0, K), (2, K + 1)):
        metadata = SAELENS["metadata"] | {"hook_name": f"blocks.{layer}.hook_resid_mid"}
        places[layer] = saelens_folder(tmp_path / str(layer), k=k, metadata=metadata)[0]
    with pytest.raises(ValueError, match=r"k differs between the SAEs: \{0: 6, 2: 7\}; all MFN layers"):
        MFNForCausalLM.from_saes(base, places)
    only = {0: places[0]}
    for setting, message in {
        "codes": "codes is 'update', and with these SAEs it is 'stream'; leave it out",
        "k": "k is 'update', and with these SAEs it is 6; leave it out",
        "calibration": "unknown setting 'calibration'; with SAEs, give alpha, blend_into",
    }.items():
        with pytest.raises(ValueError, match=message):
            MFNForCausalLM.from_saes(base, only, **{setting: "update"})
    for saes in ({}, {"0": places[0]}, places[0]):
        with pytest.raises(ValueError, match="give a mapping of block indices to folders, files or releases"):
            MFNForCausalLM.from_saes(base, saes)
    for layer in (99, -1):
        with pytest.raises(ValueError, match=f"layers contains {layer}; the base model has blocks 0 to 2"):
            MFNForCausalLM.from_saes(base, {layer: places[0]})
    with pytest.raises(ValueError, match=f"{tmp_path} holds no SAE; it must be a folder with sae_weights"):
        MFNForCausalLM.from_saes(base, {0: tmp_path})


@pytest.mark.parametrize(
    ("name", "base", "differs"),
    [
        ("gpt2-small", "gpt2", True),
        ("gpt2", "openai-community/GPT2", False),
        ("EleutherAI/pythia-70m", "/models/pythia-70m", False),
        ("gpt2", "", False),
        (None, "gpt2", False),
    ],
)
@pytest.mark.parametrize("format", ["saelens", "before 6", "sparsify"])
def test_saes_of_another_model_bring_a_warning(tmp_path, caplog, format, name, base, differs):
    model = make_base("gpt2-tied")
    model.config._name_or_path = base
    hook = "blocks.1.hook_resid_mid"
    if format == "before 6":
        place = saelens_folder(tmp_path / hook, before_6=True, model_name=name)[0]
    else:
        write = saelens_folder if format == "saelens" else sparsify_folder
        place = write(tmp_path / hook, metadata={"sae_lens_version": "6.54.12", "model_name": name})[0]
    MFNForCausalLM.from_saes(model, {1: place})
    warned = f"the SAEs were trained on {name!r}, and the base model is {base!r}; features mean" in caplog.text
    assert warned == differs == bool(caplog.records)


def test_an_sae_on_a_parallel_blocks_output_codes_the_next_blocks_input(tmp_path):
    base = base_of("gpt_neox").double()
    place, config, tensors = sparsify_folder(tmp_path / "layers.1")
    found = find_saes(tmp_path, base.config)
    assert found == {2: place}
    model = MFNForCausalLM.from_saes(base, found)
    assert model.config.other_sites == {}
    seen = []
    model.mfn_layers[2].hook_in.register_forward_hook(lambda _, __, output: seen.append(output))
    output = base(**tokens(2, 5), output_hidden_states=True).hidden_states[2]  # of block 1
    model(**tokens(2, 5))
    assert torch.equal(seen[0], output)
    assert_equal(model, sparsify(config, tensors, stream()), layer=2)


def test_a_release_is_downloaded_by_saelens(tmp_path, monkeypatch):
    """A stub stands for SAELens, which is not installed here and has no network."""
    base, release = make_base("gpt2-tied").double(), {1: "gpt2-small-resid-mid-v5-32k:blocks.1.hook_resid_mid"}
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(
        MissingExtra, match=r"blocks\.1\.hook_resid_mid is no folder here, and SAELens downloads releases"
    ):
        MFNForCausalLM.from_saes(base, release)
    asked = []

    class SAE:
        @staticmethod
        def from_pretrained(release, sae_id):
            asked.append((release, sae_id))
            return SAE

        @staticmethod
        def save_model(folder):
            saelens_folder(folder / "made")
            for file in (folder / "made").iterdir():
                file.rename(folder / file.name)

    monkeypatch.setitem(sys.modules, "sae_lens", types.SimpleNamespace(SAE=SAE))
    model = MFNForCausalLM.from_saes(base, release)
    assert asked == [("gpt2-small-resid-mid-v5-32k", "blocks.1.hook_resid_mid")]
    assert_equal(model, saelens(*saelens_folder(tmp_path / "expected")[1:], stream()))
    with pytest.raises(
        ValueError, match=r"'nowhere' does not exist; give a folder, a \.pt file, or a release of SAELens"
    ):
        MFNForCausalLM.from_saes(base, {1: "nowhere"})


def test_the_code_that_travels_says_what_it_lacks(monkeypatch):
    model = make_mfn(make_base("gpt2-tied"))
    monkeypatch.setattr(MFNForCausalLM, "sae_importer", None)
    monkeypatch.setattr(MFNForCausalLM, "sae_exporter", None)
    with pytest.raises(ImportError, match="from_saes needs the package; import modeling_mfn"):
        MFNForCausalLM.from_saes("gpt2", {})
    with pytest.raises(ImportError, match="to_saelens needs the package; import modeling_mfn"):
        model.to_saelens(1)


def test_saes_are_found_by_what_names_their_block(tmp_path):
    for seed in (0, 1):
        sparsify_folder(tmp_path / "seeds" / "h.2" / f"seed{seed}")
    with pytest.raises(ValueError, match=r"seed0 and .*seed1 are both of block 2; leave one of them"):
        find_saes(tmp_path / "seeds")
    trained = saelens_folder(tmp_path / "all" / "runs" / "x7")[0]
    sparse = sparsify_folder(tmp_path / "all" / "layers.2.mlp")[0]
    file = openai_file(tmp_path / "all", layer=10)[0]
    assert find_saes(str(tmp_path / "all")) == {1: trained, 2: sparse, 10: file}
    unnamed = saelens_folder(tmp_path / "unnamed" / "sae", metadata={"sae_lens_version": "6.0.0"})[0]
    with pytest.raises(ValueError, match=f"nothing in {unnamed} names the block of the SAE"):
        find_saes(tmp_path / "unnamed")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no SAE of SAELens, sparsify or OpenAI in it"):
        find_saes(tmp_path / "empty")


@pytest.mark.parametrize("write", [saelens_folder, sparsify_folder])
def test_a_folders_name_is_a_place_only_if_it_names_a_block(tmp_path, write):
    base, metadata = make_base("gpt2-tied"), {"metadata": {"sae_lens_version": "6.0.0"}}
    place = write(tmp_path / "tmp-sae", **metadata)[0]
    with pytest.raises(ValueError, match=f"the SAE in {place} names no hook point, and the MFN layer of block 1"):
        MFNForCausalLM.from_saes(base, {1: place})
    assert MFNForCausalLM.from_saes(base, {1: place}, allow_other_site=True).config.other_sites == {"1": "unknown"}
    named = write(tmp_path / "blocks.1.hook_resid_mid", **metadata)[0]
    assert MFNForCausalLM.from_saes(base, {1: named}).config.other_sites == {}


def test_weights_come_in_in_the_base_models_precision(tmp_path):
    place, _, tensors = saelens_folder(tmp_path / "sae")
    model = MFNForCausalLM.from_saes(make_base("llama-tied").to(torch.bfloat16), {1: place})
    assert torch.equal(model.mfn_layers[1].encoder.weight, tensors["W_enc"].T.to(torch.bfloat16))
    export_saes(model, tmp_path / "out")
    assert (
        load_file(tmp_path / "out" / "blocks.1.hook_resid_mid" / "sae_weights.safetensors")["W_enc"].dtype
        == torch.bfloat16
    )
