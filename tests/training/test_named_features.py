"""Named features: their loss against loops in float64, and what training makes of them."""

import math

import numpy as np
import pytest
import torch
from conftest import make_base, make_mfn
from datasets import Dataset
from trainings import arguments, history, train

from modeling_mfn import MFNTrainer
from modeling_mfn.training.activation_cache import CachedResiduals
from modeling_mfn.training.named_features import NamedFeatures

WORDS = {0: (5,), 1: (6,)}
"""Concept -> its tokens."""


def named_rows(number, seed=0):
    ids = np.random.default_rng(seed).integers(3, 33, (number, 16))
    concepts = np.full(ids.shape, -1)
    for concept, words in WORDS.items():
        concepts[np.isin(ids, words)] = concept
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "concepts": concepts})


@pytest.mark.parametrize("settings", [{}, {"codes": "update", "coding_rounds": 2, "refine_steps": 1}])
def test_the_loss_is_that_of_its_equation(settings):
    model = make_mfn(make_base("llama-tied").double(), k=4, **settings)
    batch = {name: torch.tensor(named_rows(3)[name]) for name in ("input_ids", "concepts")}
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 10:] = 0
    named = NamedFeatures(["L1/3", "L1/70"], model.config)
    items = model(input_ids=batch["input_ids"], attention_mask=mask, output_reconstructions=True).reconstructions
    layer, item = model.mfn_layers[1], items[1]
    of_features = []
    for feature, concept in ((3, 0), (70, 1)):
        parts = {True: [], False: []}
        for row, place in mask.nonzero().tolist():
            u = item.residual[row, place]
            x = (u - u.mean()) / (u.std() + 1e-5)
            a = (x @ layer.encoder.weight[feature] + layer.encoder.bias[feature]).item()
            t = item.code.values[row, place].min().item()
            wanted = batch["input_ids"][row, place].item() in WORDS[concept]
            parts[wanted].append(math.log1p(math.exp(t - a if wanted else a)))
        assert all(parts.values())
        of_features.append(sum(np.mean(losses) for losses in parts.values()) / 2)
    found = named.loss(layer, item, batch["concepts"], mask)
    assert found.item() == pytest.approx(np.mean(of_features), rel=1e-5)
    assert named.loss(model.mfn_layers[0], items[0], batch["concepts"], mask).item() == 0.0
    found.backward()
    moved = layer.encoder.weight.grad.abs().sum(-1).nonzero().flatten().tolist()
    assert moved == [3, 70]  # the rest of the model learns nothing from it
    assert layer.decoder.weight.grad is None


def test_a_named_feature_learns_to_fire_on_its_concept_alone(tmp_path):
    settings = {"max_steps": 200, "per_device_train_batch_size": 16, "learning_rate": 2e-2, "alpha_end": 0.0}
    settings |= {"lambda_named": 1.0, "named_features": ["L0/3", "L0/5"], "lambda_util": 0.0, "trainable": "mfn"}
    trainer = train(tmp_path, make_mfn(make_base("llama-tied"), alpha=0.0, k=8), named_rows(512), **settings)
    losses = history(trainer, "named_loss")
    assert losses[-1] < losses[0] / 2
    fresh = torch.tensor(named_rows(128, seed=1)["input_ids"])
    with torch.no_grad():
        code = trainer.model(input_ids=fresh, output_codes=True).codes[0]
    for concept, feature in enumerate((3, 5)):
        fires = ((code.indices == feature) & (code.values > 0)).any(-1)
        wanted = torch.isin(fresh, torch.tensor(WORDS[concept]))
        assert fires[wanted].float().mean() > 0.9
        assert fires[~wanted].float().mean() < 0.1


def test_settings_and_data_that_do_not_fit_are_named(tmp_path):
    model = make_mfn(make_base("llama-tied"))
    with pytest.raises(ValueError, match=r"lambda_named is 1\.0 and named_features is None"):
        arguments(tmp_path, lambda_named=1.0)
    with pytest.raises(ValueError, match="L1/3 more than once"):
        NamedFeatures(["L1/3", "L1/3"], model.config)
    with pytest.raises(ValueError, match="block 9 has no MFN layer"):
        NamedFeatures(["L9/3"], model.config)
    settings = arguments(tmp_path, lambda_named=1.0, named_features=["L1/3"], max_steps=1)
    unmarked = named_rows(4).remove_columns("concepts")
    with pytest.raises(ValueError, match="no column 'concepts'"):
        MFNTrainer(model, settings, train_dataset=unmarked).train()
    with pytest.raises(ValueError, match="concepts has 1; concepts are 0 to 0"):
        MFNTrainer(model, settings, train_dataset=named_rows(4)).train()
    with pytest.raises(ValueError, match=r"lambda_named is 1\.0; on cached residual streams it must be 0\.0"):
        MFNTrainer(CachedResiduals(model), arguments(
            tmp_path, lambda_named=1.0, named_features=["L1/3"], lambda_util=0.0, alpha_end=0.0
        ))  # fmt: skip
