"""Steering and baking of models with pruned, removed, merged or reset features."""

import pytest
import torch
from conftest import make_mfn, tokens
from transformers import AutoModelForCausalLM
from transformers.utils.logging import warning_once

from modeling_mfn import Ablate, Add, Clamp, Scale


@pytest.fixture
def compacted(family_base):
    """Model whose features 5 and 70 of layer 1 were pruned and removed."""
    model = make_mfn(family_base.double())
    model.prune_features(1, [5, 70])
    model.compact(keep_competition=False)
    return model


@torch.no_grad()
def logits(model):
    return model(**tokens(3, 9)).logits


def test_pruned_features_are_not_steered_nor_waited_for(compacted):
    for interventions in ({(1, 5): Ablate()}, {(1, 6): Clamp(1.0, when="L1/70")}):
        with pytest.raises(ValueError, match=r"L1/(5|70) is pruned"):
            compacted.steer(interventions)
        with pytest.raises(ValueError, match=r"L1/(5|70) is pruned"):
            compacted.bake(interventions)


def test_what_is_baked_into_a_compacted_model_is_what_it_is_steered_to(compacted, tmp_path):
    interventions = {(1, 4): Clamp(2.0), (1, 6): Scale(0.5), (1, 71): Add(-1.5), (1, 79): Ablate(), (2, 5): Scale(3.0)}
    with compacted.steer(interventions):
        steered = logits(compacted)
    plain = logits(compacted)
    compacted.bake(interventions)
    torch.testing.assert_close(logits(compacted), steered, atol=1e-9, rtol=0)
    assert (steered - plain).abs().max() > 0.1
    before = [layer.decoder.weight.clone() for layer in compacted.mfn_layers.values()]
    for layer, weight in zip(compacted.mfn_layers.values(), before, strict=True):
        layer.normalise_directions()  # as after each training step: baked norms stay
        torch.testing.assert_close(layer.decoder.weight, weight, atol=1e-6, rtol=0)
    compacted.save_pretrained(tmp_path)
    again = type(compacted).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(compacted))


def test_a_direction_that_is_gone_has_no_norm_of_its_own(family_base):
    model = make_mfn(family_base)
    model.bake({(0, n): Scale(0.5) for n in (1, 2, 3, 4)})
    model.prune_features(0, [1])
    model.reset_features(0, [2])
    with torch.no_grad():
        model.mfn_layers[0].decoder.weight[4] = model.mfn_layers[0].decoder.weight[3]
    model.merge_features(0, 3, [4])
    assert model.config.direction_norms == {}
    model.compact()
    model.mfn_layers[0].normalise_directions()
    norms = model.mfn_layers[0].decoder.weight.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(78), atol=1e-6, rtol=0)


PRESET = {
    (1, 4): Clamp(2.0),
    (1, 6): Add(1.0, when="L0/3"),
    (1, 5): Clamp(3.0),
    (1, 70): Ablate(),
    (2, 8): Clamp(4.0, when="L1/5"),
}
"""Preset whose first two interventions remain when features 5 and 70 of layer 1 are pruned. Steering warns about the
third and the last. The fourth is what pruning does."""


@pytest.fixture
def preset(family_base):
    """Model with `PRESET` under the name "calm"."""
    warning_once.cache_clear()
    model = make_mfn(family_base.double())
    model.save_preset("calm", PRESET)
    return model


def prune(model):
    model.prune_features(1, [5, 70])


def compact(model):
    prune(model)
    model.compact()


def merge(model):
    directions = model.mfn_layers[1].decoder.weight.data
    directions[[5, 70]] = directions[4].clone()
    model.merge_features(1, 4, [5, 70])


@pytest.mark.parametrize("edit", [prune, compact, merge])
def test_a_preset_goes_on_without_what_is_pruned(preset, edit, tmp_path, caplog):
    edit(preset)
    written = preset.config.to_dict()["steering_presets"]
    preset.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    rest = {(1, 4): PRESET[1, 4], (1, 6): PRESET[1, 6]}
    with model.steer(rest):
        expected = logits(model)
    assert not torch.equal(expected, logits(model))
    for interventions in ("calm", [model.presets["calm"].interventions], "calm"):
        with model.steer(interventions):
            assert torch.equal(logits(model), expected)
    assert [record.message for record in caplog.records if "preset" in record.message] == [
        "preset 'calm' goes on with the rest: what it does to L1/5, L2/8 needs features that are pruned"
    ]
    assert model.config.steering_presets == written  # the config keeps the whole preset


@torch.no_grad()
def test_a_preset_is_baked_without_what_is_pruned(preset):
    preset.save_preset("for good", {(1, 4): Scale(0.5), (1, 5): Scale(3.0), (2, 7): Add(1.0)})
    prune(preset)
    with preset.steer({(1, 4): Scale(0.5), (2, 7): Add(1.0)}):
        expected = logits(preset)
    preset.bake("for good")
    torch.testing.assert_close(logits(preset), expected, atol=1e-9, rtol=0)
    assert preset.config.direction_norms == {"L1/4": 0.5}


def test_a_preset_that_is_done_by_pruning_is_no_error_and_one_with_nothing_left_is(preset, caplog):
    preset.save_preset("off", {(1, 5): Ablate(), (1, 70): Scale(2.0, when="L0/3")})
    preset.save_preset("loud", {(1, 5): Add(3.0), (1, 70): Ablate()})
    prune(preset)
    pruned = logits(preset)
    with preset.steer("off"):
        assert torch.equal(logits(preset), pruned)
    assert "preset" not in caplog.text
    for take in (preset.steer, preset.bake):
        with pytest.raises(ValueError, match="'loud' has nothing left: what it does to L1/5 needs features"):
            take("loud")
    for name in ("off", "loud"):
        assert preset.presets[name].interventions == {}
        preset.delete_preset(name)
    with pytest.raises(ValueError, match="no preset 'loud'; this model has calm"):
        preset.delete_preset("loud")
    for interventions in ({(1, 5): Clamp(1.0)}, {(1, 4): Clamp(1.0, when="L1/5")}, PRESET):
        with pytest.raises(ValueError, match="L1/5 is pruned"):
            preset.save_preset("new", interventions)


def test_a_preset_of_features_that_start_again(preset, caplog):
    """A reset brings a feature's interventions back. The log says that they were made for the old feature."""
    prune(preset)
    preset.reset_features(1, [5])
    assert (
        "preset 'calm' stays, but what it does to L1/5, L2/8 was made for the features before the reset" in caplog.text
    )
    assert set(preset.presets["calm"].interventions) == {"L1/4", "L1/5", "L1/6", "L2/8"}
    caplog.clear()
    preset.reset_features(0, [9])
    assert "preset" not in caplog.text
