"""Steering and baking on models some of whose features are pruned, removed or reset."""

import pytest
import torch
from conftest import make_mfn, tokens

from modeling_mfn import Ablate, Add, Clamp, Scale


@pytest.fixture
def compacted(family_base):
    """Without the features 5 and 70 of layer 1."""
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
        layer.normalise_directions()  # as after each step of training: the norms are those that were baked
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
