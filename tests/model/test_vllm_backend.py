"""An MFN model in a stand-in for vLLM's transformers backend, which does what `models/transformers/base.py` does there.

The stand-in makes the headless model from its config on the meta device, replaces linear layers by the tensor parallel
plan, loads the checkpoint by its names, and calls the model on packed texts with its own attention.
"""

import pickle
import re

import pytest
import torch
from conftest import make_base, make_mfn, tokens
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LENGTHS = [5, 9]


class Replaced(nn.Linear):
    """A linear layer of the server."""

    style = None


def attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    """Attends within each text of a packed row, (1, heads, N, d) -> (N, heads * d), as vLLM's layer does."""
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    texts = zip(
        *(each.split(attention_instances[module.layer_idx], dim=2) for each in (query, key, value)), strict=True
    )
    outputs = [nn.functional.scaled_dot_product_attention(*text, is_causal=True, scale=scaling) for text in texts]
    return torch.cat(outputs, 2).transpose(1, 2).flatten(2)[0], None


def served(folder):
    """Makes the headless model of a folder as the server does."""
    config = AutoConfig.from_pretrained(folder)
    config.get_text_config()._attn_implementation = "stand_in"
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch.float64)
    assert model.is_backend_compatible()
    plan = {re.compile(f"model.{name}"): style for name, style in model.tp_plan.items()}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            new = Replaced(module.in_features, module.out_features, module.bias is not None, "meta", torch.float64)
            new.style = next((style for pattern, style in plan.items() if pattern.match(f"model.{name}")), "replicate")
            model.set_submodule(name, new)
    embedding = model.get_input_embeddings()
    model.set_input_embeddings(nn.Embedding(*embedding.weight.shape, device="meta", dtype=torch.float64))
    buffers = dict(AutoModel.from_config(config).named_buffers())
    model.to_empty(device="cpu")
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    weights = load_file(folder / "model.safetensors")
    parameters = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    assert weights.keys() - {"lm_head.weight"} == parameters.keys()
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])
    return model


@pytest.fixture
def stand_in():
    ALL_ATTENTION_FUNCTIONS["stand_in"] = attention
    yield
    del ALL_ATTENTION_FUNCTIONS["stand_in"]


def test_the_config_is_one_of_text_alone(family_base, tmp_path):
    """Another text config would make vLLM look for images."""
    make_mfn(family_base).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    for each in (config, pickle.loads(pickle.dumps(config))):
        for end in ({}, {"decoder": True}, {"encoder": True}):
            assert each == each.get_text_config(**end)
        for name in (
            "num_attention_heads",
            "num_hidden_layers",
            "hidden_size",
            "vocab_size",
            "max_position_embeddings",
        ):
            assert getattr(each.get_text_config(), name) == getattr(family_base.config, name)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("settings", [{}, {"codes": "update", "coding_rounds": 2, "refine_steps": 1}])
def test_packed_texts_have_the_hidden_states_of_each_text(settings, tmp_path):
    model = make_mfn(make_base("llama-tied").double(), layers=[0, 2], **settings)
    model.save_pretrained(tmp_path)
    server = served(tmp_path)
    styles = {name: module.style for name, module in server.named_modules() if isinstance(module, Replaced)}
    assert len(styles) == 7 * 3
    assert set(styles.values()) == {"colwise", "rowwise"}
    texts = [tokens(1, length, seed=length)["input_ids"] for length in LENGTHS]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    outputs = server(
        input_ids=torch.cat(texts, 1),
        inputs_embeds=None,
        use_cache=False,
        position_ids=positions,
        attention_instances=dict.fromkeys(range(3), LENGTHS),
        return_dict=False,
    )
    for text, found in zip(texts, outputs[0].split(LENGTHS, dim=1), strict=True):
        torch.testing.assert_close(found, model.model(text).last_hidden_state, atol=1e-9, rtol=0)
