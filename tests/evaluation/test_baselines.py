"""Post-hoc SAEs equal the base model bit for bit, and recover a planted dictionary."""

import numpy as np
import pytest
import torch
from conftest import HIDDEN, make_base, tokens
from datasets import Dataset
from torch.nn.functional import normalize

from modeling_mfn.evaluation.baselines import saes as baselines
from modeling_mfn.evaluation.baselines.saes import fine_tune_sae, post_hoc_sae, random_sae, train_sae, training_order
from modeling_mfn.evaluation.measures.reconstruction import reconstruction_errors
from modeling_mfn.model.modes import at_alpha
from modeling_mfn.training.activation_cache import ActivationCache

SIZE = {"num_features": 128, "k": 4, "layers": [0, 2]}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(baselines, "BATCH_TOKENS", 256)


def text(rows=160, length=32, low=3, high=96, seed=0):
    """Windows of tokens from a part of the vocabulary, the domain."""
    ids = np.random.default_rng(seed).integers(low, high, (rows, length))
    return Dataset.from_dict({"input_ids": ids.tolist()})


def explained(sae, windows):
    errors, distances = reconstruction_errors(sae, windows)
    return 1 - errors.sum(0) / distances.sum(0)


@pytest.fixture(params=["llama-tied", "gpt2-tied"])
def base(request):
    return make_base(request.param)


def test_an_sae_is_its_base_to_the_bit_and_explains_more_than_before(base, tmp_path):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    train, held_out = text(), text(20, seed=1)
    start, sae = random_sae(base, train, **SIZE), post_hoc_sae(base, train, epochs=4, folder=tmp_path, **SIZE)
    logits = base(**tokens(2, 9)).logits
    for model in (start, sae):
        assert (model.config.alpha, model.config.layers, model.training) == (0.0, [0, 2], False)
        assert torch.equal(model(**tokens(2, 9)).logits, logits)
    with at_alpha(sae, 1.0):
        assert not torch.allclose(sae(**tokens(2, 9)).logits, logits, atol=0.1)
    assert sae.config.alpha == 0.0
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert (explained(sae, held_out) > explained(start, held_out) + 0.2).all()
    rows = torch.cat([layer.decoder.weight for layer in sae.mfn_layers.values()])
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(rows)))
    assert list(tmp_path.iterdir()) == []


def test_a_seed_and_a_cache(base, tmp_path):
    """Equal seeds are equal bit for bit, also from an existing cache. Other seeds differ in directions and order."""
    train = text(40)
    sae = post_hoc_sae(base, train, seed=1, **SIZE)
    cache = ActivationCache.write(sae, train, tmp_path)
    again, other = (post_hoc_sae(base, train, seed=seed, cache=cache, **SIZE) for seed in (1, 2))
    for ours, same, different in zip(*(model.mfn_layers[2].parameters() for model in (sae, again, other)), strict=True):
        assert torch.equal(ours, same)
        assert not torch.allclose(ours, different, atol=1e-2)
    with pytest.raises(ValueError, match=r"cache has 40 windows of layers \[0, 2\]; it must be of the 40 windows and"):
        post_hoc_sae(base, train, cache=cache, num_features=64, k=4, layers=[1])


@pytest.mark.halved
def test_a_fine_tuned_sae_is_another_one_that_knows_the_new_domain(base):
    source, target, held_out = text(high=50), text(low=50), text(20, low=50, seed=1)
    sae = post_hoc_sae(base, source, epochs=4, **SIZE)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    tuned = fine_tune_sae(sae, target, epochs=4)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    assert (explained(tuned, held_out) > explained(sae, held_out) + 0.05).all()
    assert torch.equal(tuned(**tokens(2, 9)).logits, base(**tokens(2, 9)).logits)


class Planted(torch.utils.data.Dataset):
    """Cache of residual streams, each the sum of a few of 48 directions."""

    def __init__(self, rows, length=32, active=3, seed=0):
        generator = torch.Generator().manual_seed(5)
        self.directions = normalize(torch.randn(48, HIDDEN, generator=generator), dim=-1)
        generator.manual_seed(seed)
        chosen = torch.rand(rows, length, 48, generator=generator).topk(active).indices
        z = torch.zeros(rows, length, 48).scatter(-1, chosen, 1 + torch.rand(chosen.shape, generator=generator))
        self.residuals = z @ self.directions + 0.5

    def __len__(self):
        return len(self.residuals)

    def __getitem__(self, row):
        ids = torch.zeros(self.residuals.shape[1], dtype=torch.long)
        return {"input_ids": ids, "residuals": self.residuals[row, None]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_planted_dictionary_is_found(dtype):
    base, cache = make_base("llama-tied").to(dtype), Planted(1200)
    sae = random_sae(base, text(4), num_features=64, k=3, layers=[1], input_norm="none")
    layer, held_out = sae.mfn_layers[1], Planted(20, seed=1).residuals
    layer.calibrate(cache.residuals[:16].flatten(0, 1).to(dtype))
    train_sae(sae, cache, training_order(1200, 8, 64), learning_rate=1e-2, batch_size=64)
    assert sae.dtype == layer.decoder.weight.dtype == dtype
    cosines = cache.directions @ normalize(layer.decoder.weight.float(), dim=-1).T
    assert (cosines.max(1).values > 0.95).float().mean() > 0.9
    layer.float()
    error = held_out - layer.reconstruct(layer.encode(held_out))
    assert 1 - error.square().sum() / (held_out - held_out.mean((0, 1))).square().sum() > 0.9


def test_the_order_is_a_permutation_an_epoch_in_whole_batches():
    order = training_order(10, 3, 4, seed=2)
    assert len(order) == 28
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert order == training_order(10, 3, 4, seed=2) != training_order(10, 3, 4, seed=3)


def test_padding_is_refused(base):
    windows = text(4).add_column("attention_mask", [[1] * 32] * 2 + [[1] * 31 + [0]] * 2)
    with pytest.raises(ValueError, match="window 2 is padded"):
        random_sae(base, windows, **SIZE)
