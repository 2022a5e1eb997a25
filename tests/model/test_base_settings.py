"""Settings of the base model in an MFN config: what tools find at its top, and flags that act."""

import copy
import json

import pytest
import torch
from conftest import make_base, make_mfn, tokens
from transformers import AutoConfig, GenerationConfig

from modeling_mfn import MFNConfig, MFNForCausalLM

OF_THE_MODEL = {"architectures", "dtype", "model_type", "transformers_version", "_name_or_path"}


@pytest.fixture
def config(base):
    return MFNConfig(text_config=base.config, num_features=80)


def public(config):
    """Names of a config's settings, properties included."""
    return {name for name in dir(config) if not name.startswith("_") and name != "rope_scaling"}


def test_every_setting_of_the_base_is_at_the_top(base, config):
    theirs, ours = base.config.to_dict(), config.to_dict()
    names = public(base.config) | base.config.attribute_map.keys() | theirs.keys()
    for name in names - OF_THE_MODEL - {"torch_dtype", "use_return_dict", "attribute_map", "sub_configs"}:
        value = getattr(base.config, name, None)
        if callable(value) or name.startswith("base_model_") or name == "per_layer_config":
            continue
        assert hasattr(config, name), name
        assert getattr(config, name) == value, name
        assert name in config or name not in base.config, name
    assert {name: ours[name] for name in theirs.keys() - OF_THE_MODEL} == {
        name: theirs[name] for name in theirs.keys() - OF_THE_MODEL
    }
    assert config.get_text_config() is config
    ours, theirs = (GenerationConfig.from_model_config(each).to_dict() for each in (config, base.config))
    assert ours == theirs
    assert not hasattr(config, "no_such_setting")


def test_a_setting_at_the_top_is_that_of_the_base_and_is_kept_once(base, config, tmp_path):
    before = base.config.to_dict()
    of_the_family = {"gpt2": "n_inner", "llama": "intermediate_size"}[base.config.model_type]
    for name, value in (("use_cache", False), ("bos_token_id", 5), ("output_hidden_states", True), (of_the_family, 48)):
        setattr(config, name, value)
        assert getattr(config.text_config, name) == value
    config.text_config.tie_word_embeddings = not config.text_config.tie_word_embeddings
    assert config.tie_word_embeddings is config.text_config.tie_word_embeddings
    assert base.config.to_dict() == before
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not (written.keys() & written["text_config"].keys()) - OF_THE_MODEL
    loaded = AutoConfig.from_pretrained(tmp_path)
    for again in (loaded, copy.deepcopy(config), MFNConfig(**config.to_dict())):
        again.name_or_path = ""
        assert again.to_dict() == config.to_dict()
    changed = AutoConfig.from_pretrained(tmp_path, use_cache=True, output_hidden_states=False)
    assert (changed.text_config.use_cache, changed.text_config.output_hidden_states) == (True, False)
    given = MFNConfig(text_config=base.config, num_features=80, use_cache=False, output_hidden_states=True, k=3)
    assert (given.text_config.use_cache, given.text_config.output_hidden_states, given.k) == (False, True, 3)


@pytest.mark.parametrize("at_the_top", [True, False])
def test_flags_of_the_config_act_as_in_the_base(family_base, at_the_top):
    model, batch = make_mfn(family_base, alpha=0.0), tokens(2, 5)
    config = model.config if at_the_top else model.config.text_config
    for each in (model, family_base):
        each.set_attn_implementation("eager")
    for flag in ("output_hidden_states", "output_attentions", "use_cache"):
        found = []
        for owner, forward in ((config, model), (family_base.config, family_base)):
            was = getattr(owner, flag)
            setattr(owner, flag, not was)
            found.append(forward(**batch))
            setattr(owner, flag, was)
        ours, theirs = found
        assert ours.keys() == theirs.keys() - {"cross_attentions"}, flag  # of which GPT-2 has none
        for name in ("hidden_states", "attentions"):
            for one, other in zip(getattr(ours, name, None) or (), getattr(theirs, name, None) or (), strict=True):
                assert torch.equal(one, other)
    config.return_dict = False  # Llama of transformers 5.23 fails with it
    assert torch.equal(model(**batch)[0], ours.logits)


def test_flags_that_a_model_is_made_and_loaded_with_act(tmp_path):
    flags = {"output_hidden_states": True, "output_attentions": True}
    model = make_mfn(make_base("llama-tied", **flags, attn_implementation="eager"))
    model.save_pretrained(tmp_path)
    for each in (model, MFNForCausalLM.from_pretrained(tmp_path)):
        out = each(**tokens(1, 4))
        assert len(out.hidden_states) == 4
    off = MFNForCausalLM.from_pretrained(tmp_path, output_hidden_states=False)
    assert off(**tokens(1, 4)).hidden_states is None
