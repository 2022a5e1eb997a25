"""Baking: an ordinary checkpoint gives the logits of the steered model, and training keeps the baked norms."""

import pytest
import torch
from conftest import make_base, make_mfn, tokens
from test_steering import active_feature
from trainings import arguments, rows
from transformers import AutoModelForCausalLM

from modeling_mfn import Ablate, Add, Clamp, MFNForCausalLM, MFNTrainer, Scale


def interventions(model, batch):
    """Returns interventions of all four kinds, two per layer. One feature per layer fires on some tokens only."""
    first, second = (active_feature(model, layer, batch) for layer in (0, 2))
    return {
        (0, first): Clamp(2.5),
        (0, (first + 1) % 80): Add(-1.25),
        (2, second): Scale(-0.5),
        f"L2/{(second + 1) % 80}": Ablate(),
    }


@pytest.mark.parametrize(("blend_into", "codes"), [("residual", "stream"), ("mlp", "stream"), ("residual", "update")])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_baked_model_gives_the_logits_of_the_steered_one(family_base, tmp_path, blend_into, codes, alpha):
    model = make_mfn(family_base.double(), layers=[0, 2], alpha=alpha, blend_into=blend_into, codes=codes)
    batch = tokens(3, 9)
    wanted = interventions(model, batch)
    plain = model(**batch, output_codes=True)
    with model.steer(wanted):
        steered = model(**batch).logits
        generated = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert not torch.allclose(steered, plain.logits)
    model.save_preset("mine", wanted)
    model.bake("mine")
    baked = model(**batch, output_codes=True)
    torch.testing.assert_close(baked.logits, steered, atol=1e-10, rtol=0)
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), generated)
    assert torch.equal(baked.codes[0].to_dense(), plain.codes[0].to_dense())  # baking leaves the encoder alone
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded(**batch).logits, baked.logits)
    assert set(loaded.config.direction_norms.values()) == {0.0, 0.5}


def test_baking_twice_and_steering_a_baked_model(family_base):
    """Further interventions start from the directions and the bias that were baked before."""
    model = make_mfn(family_base.double(), layers=[0, 2])
    batch = tokens(2, 9)
    feature = active_feature(model, 0, batch)
    with model.steer({(0, feature): Scale(0.5)}), model.steer({(0, feature): Add(3.0)}):
        expected = model(**batch).logits
    model.bake({(0, feature): Scale(0.5)})
    second = {(0, feature): Add(6.0)}  # in units of the direction, whose norm is now 0.5
    with model.steer(second):
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-10, rtol=0)
    model.bake(second)
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-10, rtol=0)
    assert model.config.direction_norms == {f"L0/{feature}": 0.5}
    model.bake({(0, feature): Scale(2.0)})
    assert model.config.direction_norms == {}


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({}, {(0, 1): Scale(2.0), (2, 1): Ablate(when=(0, 1))}, "L2/1 has a condition"),
        ({}, [{(0, 1): Ablate()}, {}], "not a mapping of features"),
        ({}, "late", "positions are 'generated'"),
        ({}, "none", "no preset 'none'"),
        ({}, {(0, 1): Scale(2.0), (1, 1): Ablate()}, "block 1 has no MFN layer"),
        ({"decoder_bias": False}, {(0, 1): Scale(2.0), (2, 1): Clamp(1.0)}, "block 2 has no decoder bias"),
        ({"shared_decoder": True}, {(0, 1): Scale(2.0)}, "decoder of block 0 is shared"),
        ({"refine_steps": 2}, {(0, 1): Scale(2.0)}, "coding_rounds 1 and refine_steps 2 codes follow the decoder"),
        ({"half": True}, {(0, 1): Scale(2.0), (2, 1): Scale(1e7)}, r"L2/1: 1e\+07 is too large for a model in float16"),
    ],
)
def test_what_weights_cannot_hold_changes_nothing(settings, given, message):
    half = settings.pop("half", False)
    model = make_mfn(make_base("llama-tied"), layers=[0, 2], **settings)
    model = model.half() if half else model
    model.save_preset("late", {(0, 1): Ablate()}, positions="generated")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.bake(given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.direction_norms == {}


def test_without_a_decoder_bias_directions_can_be_scaled():
    model = make_mfn(make_base("gpt2-tied").double(), layers=[0, 2], decoder_bias=False)
    batch = tokens(2, 9)
    wanted = {(0, active_feature(model, 0, batch)): Scale(3.0), (2, active_feature(model, 2, batch)): Ablate()}
    with model.steer(wanted):
        expected = model(**batch).logits
    model.bake(wanted)
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-10, rtol=0)


def test_training_keeps_what_was_baked(tmp_path):
    """An ablated direction stays zero and a scaled one keeps its norm, in a resumed training too.

    The scaled direction still turns. All other directions have unit norm.
    """
    model = make_mfn(make_base("llama-tied"), layers=[0, 2])
    batch = {"input_ids": torch.tensor([row["input_ids"] for row in rows(8)])}
    off, short = active_feature(model, 0, batch), active_feature(model, 2, batch)
    model.bake({(0, off): Ablate(), (2, short): Scale(-0.5)})
    before = {layer: mfn.decoder.weight.detach().clone() for layer, mfn in model.mfn_layers.items()}
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01, "weight_decay": 0.1}
    MFNTrainer(model, arguments(tmp_path, **options), train_dataset=rows(16)).train()
    again = MFNForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    MFNTrainer(again, arguments(tmp_path, **options), train_dataset=rows(16)).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    for trained in (model, again):
        assert all(torch.isfinite(value).all() for value in trained.state_dict().values())
        assert not trained.mfn_layers[0].decoder.weight[off].any()
        for layer, norms in ((0, {off: 0.0}), (2, {short: 0.5})):
            expected = torch.ones(80)
            expected[list(norms)] = torch.tensor(list(norms.values()))
            weight = trained.mfn_layers[layer].decoder.weight.detach()
            torch.testing.assert_close(weight.norm(dim=-1), expected, atol=1e-6, rtol=0)
        assert torch.dist(weight[short], before[2][short]) > 0.01
        assert torch.cosine_similarity(weight[short], before[2][short], 0) > 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_config_with_norms_that_cannot_be():
    config = make_mfn(make_base("llama-tied"), layers=[0, 2]).config
    for norms, message in (
        ({"L0/80": 1.0}, "L0/80 does not exist"),
        ({"L0/1": -1.0}, "norm of L0/1 in direction_norms is -1.0"),
        ({"L0/1": float("nan")}, "norm of L0/1 in direction_norms is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            type(config).from_dict(config.to_dict() | {"direction_norms": norms})
