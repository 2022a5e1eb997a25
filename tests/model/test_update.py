"""Models with `codes="update"`: the residual stream is the embeddings plus named features."""

import pytest
import torch
from conftest import make_base, make_mfn, tokens

from modeling_mfn import Ablate, Clamp, MFNConfig, MFNForCausalLM
from modeling_mfn.model.model_outputs import CACHE


@pytest.fixture
def model(family_base):
    return make_mfn(family_base.double(), codes="update")


def table(model, name):
    backbone = model.model.backbone
    return {"token": model.get_input_embeddings(), "position": getattr(backbone, "wpe", None)}[name].weight


def summed(model, out):
    """Sum of the embeddings and of what each MFN layer decodes, (B, T, d), up to the last MFN layer."""
    stream = sum(code.to_dense() @ table(model, name) for name, code in out.embedding_codes.items())
    for layer, code in out.codes.items():
        read = model.mfn_layers[layer].standardise(out.reconstructions[layer].residual)
        stream = stream + model.mfn_layers[layer].reconstruct(code, read)
    return stream


@torch.no_grad()
@pytest.mark.parametrize("layers", ["all", [2]])
def test_at_alpha_1_the_stream_is_embeddings_plus_features(family_base, layers):
    """Removes the last MLP, so that the last hidden state is the norm of the stream that the last MFN layer left."""
    model = make_mfn(family_base.double(), codes="update", layers=layers)
    backbone = model.model.backbone
    block = (backbone.layers if hasattr(backbone, "layers") else backbone.h)[2]
    block.mlp.forward = lambda x: torch.zeros_like(x)
    norm = backbone.norm if hasattr(backbone, "norm") else backbone.ln_f
    batch = tokens(2, 9)
    for interventions in ({}, {(2, 5): Clamp(3.0), (2, 6): Ablate()}):
        with model.steer(interventions):
            out = model.model(**batch, output_codes=True, output_reconstructions=True)
        torch.testing.assert_close(out.last_hidden_state, norm(summed(model, out)), atol=1e-9, rtol=0)
    assert torch.equal(out.embedding_codes["token"].indices[..., 0], batch["input_ids"])


def test_embedding_codes_follow_padding_and_the_cache(model):
    ids, mask = tokens(2, 6)["input_ids"], torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    first = model(ids[:, :4], mask[:, :4], positions[:, :4], output_codes=True, use_cache=True)
    then = model(ids[:, 4:], mask, positions[:, 4:], first[CACHE], output_codes=True)
    for start, out in ((0, first), (4, then)):
        names = {"token": ids} | ({"position": positions} if hasattr(model.model.backbone, "wpe") else {})
        assert out.embedding_codes.keys() == names.keys()
        for name, expected in names.items():
            code = out.embedding_codes[name]
            assert torch.equal(code.indices[..., 0], expected[:, start : start + code.indices.shape[1]])
            assert code.num_features == len(table(model, name))
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids), output_codes=True)
    assert "token" not in embedded.embedding_codes
    assert model(ids).embedding_codes is None


def test_conversions_code_updates_and_older_configs_streams(family_base):
    config = family_base.config
    assert MFNForCausalLM.from_base(family_base, num_features=8, k=2).config.codes == "update"
    assert MFNConfig(text_config=config, num_features=8, k=2).codes == "stream"
    assert MFNConfig.paper(config, num_features=8, k=2).codes == "stream"
    assert make_mfn(family_base)(**tokens(1, 3), output_codes=True).embedding_codes is None
    with pytest.raises(ValueError, match="codes is 'both'; it must be one of stream, update"):
        MFNConfig(text_config=config, num_features=8, k=2, codes="both")


def test_the_backbone_alone_says_what_to_call(model):
    with pytest.raises(ValueError, match="call the MFN model around it"):
        model.model.backbone(**tokens(1, 3))


def test_blocks_on_several_devices(model, tmp_path):
    """Keeps some blocks on the disk, so that hooks bring each block's inputs and weights together."""
    model.save_pretrained(tmp_path / "model")
    names = [name for name, module in model.named_modules() if hasattr(module, "mfn")]
    blocks = names[0].rpartition(".")[0]
    others = {
        name: "cpu"
        for parent in (model, model.model, model.model.backbone)
        for name, module in model.named_modules()
        if module in set(parent.children()) and name not in ("model", "model.backbone", blocks)
    }
    places = others | dict(zip(names, ("cpu", "disk", "disk"), strict=True))
    spread = MFNForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload", dtype=torch.float64
    )
    assert "disk" in spread.hf_device_map.values()
    batch = tokens(2, 9)
    torch.testing.assert_close(spread(**batch).logits, model(**batch).logits, atol=1e-12, rtol=0)
    u = torch.randn(2, 9, model.config.hidden_size, dtype=torch.float64)
    for name, layer in model.mfn_layers.items():  # read from outside of a forward
        code, other = (of.encode(u) for of in (layer, spread.mfn_layers[name]))
        torch.testing.assert_close(other.to_dense(), code.to_dense(), atol=1e-12, rtol=0)
        torch.testing.assert_close(spread.mfn_layers[name].reconstruct(code), layer.reconstruct(code))


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = MFNForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.codes == "update"
    assert torch.equal(loaded(**tokens(2, 9)).logits, model(**tokens(2, 9)).logits)
    stream = make_mfn(make_base("llama-tied").double())
    assert not torch.allclose(stream(**tokens(2, 9)).logits, model(**tokens(2, 9)).logits)
