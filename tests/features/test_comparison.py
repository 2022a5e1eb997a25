"""Matchings compared with a planted permutation, dense correlations, and chance."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GPT2, make_base, make_mfn
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_mfn.features.comparison import compare_features


def windows(count=40, length=12, padded=False):
    generator = torch.Generator().manual_seed(4)
    data = {"input_ids": torch.randint(3, 96, (count, length), generator=generator).tolist()}
    if padded:
        data["attention_mask"] = [[1] * (length - row % 4) + [0] * (row % 4) for row in range(count)]
    return Dataset.from_dict(data)


def planted(base, noise, num_features=90, **settings):
    """Makes models a and b. Each feature of a equals a feature of b, apart from noise, and b has others, too.

    Returns:
        Both models, and for each feature of a the index of its feature of b.
    """
    a, b = (
        make_mfn(base, layers=[0, 1], num_features=m, seed=seed, **settings) for m, seed in ((80, 1), (num_features, 2))
    )
    place = torch.randperm(num_features, generator=torch.Generator().manual_seed(3))[:80]
    for ours, theirs in zip(a.mfn_layers.values(), b.mfn_layers.values(), strict=True):
        theirs.encoder.bias.data -= 1.0  # b's own features are rarely among the K
        for target, source in zip(theirs.parameters(), ours.parameters(), strict=True):
            if len(source) == 80:
                target.data[place] = source.data + noise * source.data.std() * torch.randn_like(source)
            else:
                target.data.copy_(source.data)
        theirs.decoder.weight.data = F.normalize(theirs.decoder.weight.data, dim=-1)
    return a, b, place.numpy()


def dense(model, data, layer):
    """Activations (N, m) of all tokens but padding."""
    inputs = {name: torch.tensor(data[name]) for name in data.column_names}
    code = model(**inputs, output_codes=True).codes[layer].to_dense().detach().double()
    return code[inputs["attention_mask"].bool()] if "attention_mask" in inputs else code.flatten(0, 1)


def test_a_planted_permutation_is_found(family_base):
    a, b, place = planted(family_base, noise=0.02)
    found = compare_features(a, b, windows(), layer=1, permutations=2)
    for matching in (found.directions, found.activations):
        of_a, of_b = matching.pairs.T
        assert (place[of_a] == of_b).all()
        assert (np.diff(matching.similarities) <= 0).all()
        left = [set(f) for f in (*matching.unmatched, *matching.left_out)]
        assert left[0] | left[2] | set(of_a) == set(range(80))
        assert left[1] | left[3] | set(of_b) == set(range(90))
        assert matching.shares[0.7] > 0.9
        assert matching.shares[0.7] >= matching.shares[0.8] >= matching.shares[0.9]
        assert matching.share_above(0.7) == np.mean(matching.similarities >= 0.7)
        assert len(matching.chance) == 2
        assert matching.chance_above(0.7) < 0.1
    assert len(found.directions.pairs) == 80
    assert len(found.activations.pairs) > 30
    assert found.tokens == 480


@pytest.mark.parametrize(("padded", "settings"), [(True, {}), (False, {"codes": "update", "coding_rounds": 2})])
def test_similarities_are_those_of_dense_matrices(padded, settings):
    """Similarities are cosines and Pearson's correlations, and no exchange of partners has a larger sum."""
    a, b, _ = planted(make_base("llama-tied"), noise=0.8, **settings)
    a.prune_features(0, [2, 5])
    b.prune_features(0, [7, 8, 9])
    b.compact(keep_competition=False)
    data = windows(padded=padded)
    found = compare_features(a, b, iter(data), layer=0, batch_size=7)
    za, zb = dense(a, data, 0).numpy(), dense(b, data, 0).numpy()
    assert found.tokens == len(za)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = np.corrcoef(za, zb, rowvar=False)[:80, 80:]
    of_a, of_b = found.activations.pairs.T
    np.testing.assert_allclose(found.activations.similarities, correlations[of_a, of_b], atol=1e-9)
    assert set(found.activations.left_out[0]) == set(np.flatnonzero(za.std(0) == 0))
    assert set(found.activations.left_out[1]) == set(np.flatnonzero(zb.std(0) == 0))
    assert {2, 5} <= set(found.activations.left_out[0])
    assert set(found.directions.left_out[1]) == {7, 8, 9}
    directions = np.zeros((90, 32))
    directions[[f for f in range(90) if f not in (7, 8, 9)]] = b.mfn_layers[0].decoder.weight.detach()
    cosines = a.mfn_layers[0].decoder.weight.detach().numpy() @ directions.T
    of_a, of_b = found.directions.pairs.T
    np.testing.assert_allclose(found.directions.similarities, cosines[of_a, of_b], atol=1e-6)
    swapped = cosines[np.ix_(of_a, of_b)]
    both = swapped.diagonal()[:, None] + swapped.diagonal()
    assert (both >= swapped + swapped.T - 1e-9).all()  # no two pairs gain by exchanging partners
    with pytest.raises(ValueError, match="chance was not measured"):
        found.directions.chance_above(0.7)


def test_without_text_directions_alone_are_compared():
    a, b, place = planted(make_base("gpt2-tied"), noise=0.0)
    found = compare_features(a, b, layer=0)
    assert (found.activations, found.tokens) == (None, 0)
    assert found.directions.similarities == pytest.approx(1.0)
    assert (place[found.directions.pairs[:, 0]] == found.directions.pairs[:, 1]).all()


def test_what_cannot_be_compared():
    model = make_mfn(make_base("gpt2-tied"), layers=[0, 1])
    wider = make_mfn(GPT2LMHeadModel(GPT2Config(**(GPT2 | {"n_embd": 40}))))
    other = make_mfn(make_base("gpt2-tied"), layers=[0, 1])
    other.resize_token_embeddings(100)
    for second, layer, message in (
        (wider, 0, "hidden_size 32 and 40: directions lie in different spaces"),
        (other, 0, "vocab_size 96 and 100: tokens differ"),
        (model, 2, "block 2 has no MFN layer"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_features(model, second, layer=layer)
    with pytest.raises(ValueError, match="windows have no token"):
        compare_features(model, model, [], layer=0)
    uneven = [{"input_ids": [3, 4]}, {"input_ids": [3, 4, 5]}]
    with pytest.raises(ValueError, match=r"windows of one batch have lengths \[2, 3\]"):
        compare_features(model, model, uneven, layer=0)
    assert compare_features(model, model, uneven, layer=0, batch_size=1).tokens == 5
