"""MFN models equal their base bit for bit at alpha = 0, and follow Figure 1 at other values."""

import copy

import pytest
import torch
from conftest import BASES, make_base, make_mfn, tokens
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from modeling_mfn import MFNForCausalLM


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [{}, {"layers": [1], "blend_into": "mlp", "input_norm": "none"}, {"codes": "update", "coding_rounds": 2}],
)
def test_alpha_0_gives_the_base_models_logits_to_the_bit(base, attention, dtype, settings):
    base = base.to(dtype)
    base.set_attn_implementation(attention)
    model = make_mfn(base, alpha=0.0, **settings)
    assert model.dtype == dtype
    assert model.config.text_config._attn_implementation == attention
    batch = tokens(3, 12) | {"attention_mask": torch.ones(3, 12, dtype=torch.long).index_fill_(1, torch.tensor([0]), 0)}
    labels = batch["input_ids"]
    assert torch.equal(model(**batch).logits, base(**batch).logits)
    assert torch.equal(model(**batch, labels=labels).loss, base(**batch, labels=labels).loss)
    assert torch.equal(model.eval()(**tokens(1, 5)).logits, base(**tokens(1, 5)).logits)


@pytest.mark.parametrize("blend_into", ["residual", "mlp"])
@pytest.mark.parametrize(("codes", "layers"), [("stream", [0, 2]), ("update", [0, 2]), ("update", [1, 2])])
@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_blocks_read_what_figure_1_shows(family_base, blend_into, codes, layers, alpha):
    """Recomputes each block with an MFN layer by hand: attention, MFN layer, MLP."""
    base = family_base.double()
    pursuit = {"coding_rounds": 2, "refine_steps": 1} if layers == [1, 2] else {}
    model = make_mfn(base, blend_into=blend_into, alpha=alpha, codes=codes, layers=layers, **pursuit)
    names = {
        LlamaForCausalLM: ("input_layernorm", "self_attn", "post_attention_layernorm"),
        GPT2LMHeadModel: ("ln_1", "attn", "ln_2"),
    }[type(base)]
    inner = base.model if isinstance(base, LlamaForCausalLM) else base.transformer
    blocks = inner.layers if isinstance(base, LlamaForCausalLM) else inner.h
    batch = tokens(2, 6)
    states = model(**batch, output_hidden_states=True).hidden_states
    stream = states[0] if codes == "update" else 0.0  # the embeddings, with GPT-2's positions
    for index in layers:
        block, h_in = blocks[index], states[index]
        one = copy.deepcopy(base)
        one_inner = one.model if isinstance(one, LlamaForCausalLM) else one.transformer
        one_blocks = one_inner.layers if isinstance(one, LlamaForCausalLM) else one_inner.h
        captured = {}
        getattr(one_blocks[index], names[1]).register_forward_hook(lambda _, __, out: captured.update(a=out[0]))  # noqa: B023
        one_blocks[index].register_forward_pre_hook(lambda _, args, h_in=h_in: (h_in, *args[1:]))
        one(**batch)
        h = h_in + captured["a"]
        layer, u = model.mfn_layers[index], h - stream
        mfn = (1 - alpha) * h + alpha * (stream + layer.reconstruct(layer.encode(u), layer.standardise(u)))
        stream = mfn if codes == "update" else 0.0
        residual = mfn if blend_into == "residual" else h
        expected = residual + block.mlp(getattr(block, names[2])(mfn))
        if index < 2:
            torch.testing.assert_close(states[index + 1], expected, atol=1e-10, rtol=0)
        else:
            norm = one_inner.norm if isinstance(one, LlamaForCausalLM) else one_inner.ln_f
            torch.testing.assert_close(states[-1], norm(expected), atol=1e-10, rtol=0)


def test_importing_and_converting_leaves_plain_models_untouched(family_base):
    before = {name: value.clone() for name, value in family_base.state_dict().items()}
    block_class = type((family_base.model.layers if hasattr(family_base, "model") else family_base.transformer.h)[0])
    forward, logits = block_class.forward, family_base(**tokens(2, 8)).logits
    model = make_mfn(family_base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    blocks = family_base.model.layers if hasattr(family_base, "model") else family_base.transformer.h
    assert {type(block) for block in blocks} == {block_class}
    assert block_class.forward is forward
    assert all(torch.equal(value, before[name]) for name, value in family_base.state_dict().items())
    assert torch.equal(family_base(**tokens(2, 8)).logits, logits)
    assert not any("mfn" in name for name in before)


def test_one_decoder_for_all_layers(family_base, tmp_path):
    model = make_mfn(family_base, shared_decoder=True, num_features=40)
    weights = {layer.decoder.weight.data_ptr() for layer in model.mfn_layers.values()}
    biases = {layer.decoder.bias.data_ptr() for layer in model.mfn_layers.values()}
    assert (len(weights), len(biases)) == (1, 3)
    model.save_pretrained(tmp_path)
    loaded = MFNForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**tokens(2, 8)).logits, model(**tokens(2, 8)).logits)
    loaded(**tokens(2, 8)).logits.sum().backward()
    assert len({layer.decoder.weight.grad.data_ptr() for layer in loaded.mfn_layers.values()}) == 1


@pytest.mark.parametrize("name", BASES)
def test_conversion_keeps_what_belongs_to_the_base(name):
    base = make_base(name)
    base.generation_config.max_new_tokens = 5
    model = make_mfn(base)
    assert model.generation_config.max_new_tokens == 5
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == name.endswith("-tied")
    assert model.config.vocab_size == base.config.vocab_size
    assert model.get_output_embeddings() is model.lm_head
    assert not model.training
