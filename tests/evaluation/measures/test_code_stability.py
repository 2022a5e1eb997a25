"""Stability of codes, compared with sets, dense codes and other ways to run the perturbations."""

import numpy as np
import pytest
import torch
from conftest import make_mfn, tokens
from datasets import Dataset

from modeling_mfn import SparseCode
from modeling_mfn.evaluation.intervals import mean
from modeling_mfn.evaluation.measures.code_stability import (
    CUT,
    REPLACED,
    UNRELATED,
    _other_tokens,
    agreement,
    code_stability,
    measure_stability,
)
from modeling_mfn.evaluation.result import MFN, RANDOM_SAE

ROWS, LENGTH = 5, 13


def windows(padded=False):
    data = {"input_ids": tokens(ROWS, LENGTH)["input_ids"].tolist()}
    if padded:
        data["attention_mask"] = [[1] * (LENGTH - row) + [0] * row for row in range(ROWS)]
    return Dataset.from_dict(data)


def compare(dense, other):
    """Agreement of two dense codes (m,) of one token, by sets."""
    a, b = (set(code.nonzero().flatten().tolist()) for code in (dense, other))
    if not a:
        return [np.nan] * 3
    norms = float(dense.norm() * other.norm())
    return [
        len(a & b) / len(a | b),
        float(dense @ other) / norms if norms else 0.0,
        sum(float(dense[i]) for i in a & b) / float(dense.sum()),
    ]


def of_windows(dense, other, counted):
    """Mean agreement in each window, (W, 3), of dense codes (W, T, m)."""
    rows = [
        [compare(dense[row, at], other[row, at]) for at in counted[row].nonzero().flatten()]
        for row in range(len(dense))
    ]
    return np.array([np.nanmean(row, axis=0) for row in rows])


def assert_agree(found, dense, other, counted):
    expected = of_windows(dense.double(), other.double(), counted)
    np.testing.assert_allclose(np.stack([found[name] for name in found], 1), expected, atol=1e-5)


def test_agreement_is_that_of_sets():
    """Covers shared features, an inactive pair with the index of an active one, and codes without an active feature."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(9, generator=generator)[:4] for _ in range(80)]).reshape(2, 8, 5, 4)
    values = torch.randn(2, 8, 5, 4, generator=generator).relu()
    values[0, 0, :3], values[1, 1] = 0, 0
    codes = [SparseCode(*pair, 9) for pair in zip(indices, values, strict=True)]
    found = agreement(*codes)
    assert torch.isnan(found["cosine"][0, :3]).all()
    assert (found["Jaccard index"][1] == 0).all()
    assert_agree({n: v.nanmean(1).numpy() for n, v in found.items()}, *(c.to_dense() for c in codes), torch.ones(8, 5))


@torch.no_grad()
def dense_codes(model, **inputs):
    codes = model(**inputs, output_codes=True).codes
    return {layer: code.to_dense() for layer, code in codes.items()}


@pytest.mark.parametrize("padded", [True, False])
def test_changed_contexts(family_base, padded):
    """Attention does not see a context that is cut off. A replaced context is that of the next window.

    The last window has the context of the first.
    """
    model = make_mfn(family_base, layers=[0, 2])
    data = windows(padded)
    found = measure_stability(model, data, strengths=(), batch_size=3)
    ids = torch.tensor(data["input_ids"])
    mask = torch.tensor(data["attention_mask"]) if padded else torch.ones_like(ids)
    counted, half = mask.bool(), LENGTH // 2
    clean = dense_codes(model, input_ids=ids, attention_mask=mask)
    hidden = mask.clone()
    hidden[:, :half] = 0
    cut = dense_codes(model, input_ids=ids, attention_mask=hidden)
    replaced_ids = torch.cat([ids.roll(-1, 0)[:, :half], ids[:, half:]], 1)
    replaced_mask = torch.cat([mask.roll(-1, 0)[:, :half], mask[:, half:]], 1)
    replaced = dense_codes(model, input_ids=replaced_ids, attention_mask=replaced_mask)
    for layer in (0, 2):
        for kind, codes in ((CUT, cut), (REPLACED, replaced)):
            parts = [each[layer][:, half:] for each in (clean, codes)]
            assert_agree(found[kind][layer], *parts, counted[:, half:])
            assert (found[kind][layer]["Jaccard index"] < 1).all()


def test_noise(family_base):
    """Strength 0 changes nothing, and more noise leaves less. In the first layer the encoder sees the noise on h."""
    model = make_mfn(family_base, layers=[0, 2]).train()
    before = torch.get_rng_state()
    found = measure_stability(model, windows(True), strengths=(0.0, 0.1, 0.5))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    again = measure_stability(model, windows(True), strengths=(0.0, 0.1, 0.5))
    assert len(found) == 3 + 2 * 3
    for place in ("h", "embeddings"):
        for layer in (0, 2):
            none, little, much = (found[f"noise {s} on {place}"][layer] for s in ("0", "0.1", "0.5"))
            for name in none:
                np.testing.assert_allclose(none[name], 1, atol=1e-6)
                assert none[name].mean() > little[name].mean() > much[name].mean() > 0
                np.testing.assert_array_equal(little[name], again[f"noise 0.1 on {place}"][layer][name])
    assert found[UNRELATED][2]["Jaccard index"].mean() < found["noise 0.5 on h"][2]["Jaccard index"].mean()


def test_noise_is_of_the_stated_share_of_the_rms(family_base, monkeypatch):
    """Recovers the noise on layers and embeddings from their inputs."""
    model = make_mfn(family_base, layers=[0])
    given = []
    layer = model.mfn_layers[0]
    encode = layer.encode
    monkeypatch.setattr(layer, "encode", lambda h: given.append(h) or encode(h))
    data = Dataset.from_dict(tokens(40, 32))
    measure_stability(model, data, strengths=(0.2,), batch_size=40)
    with torch.no_grad():
        clean = (
            model(input_ids=torch.tensor(data["input_ids"]), output_reconstructions=True).reconstructions[0].residual
        )
    noise = (given[0] - clean).norm(dim=-1) / clean.norm(dim=-1)
    assert len(given) == 1
    assert noise.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.01)


def test_another_token_is_another_one(family_base):
    """Each counted token is compared with another counted token of its window, or with itself if it is the only one."""
    torch.manual_seed(1)
    counted = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
    places = torch.stack([_other_tokens(counted) for _ in range(50)])
    for row, number in ((0, 6), (1, 3)):
        of_row = places[:, row, :number]
        assert (of_row.sort(-1).values == torch.arange(number)).all()
        assert (of_row != torch.arange(number)).all()
        assert len(of_row.unique(dim=0)) > 1
    assert (places[:, 2, 0] == 0).all()


def test_figures_are_means_over_layers_and_seeds(family_base):
    models = [make_mfn(family_base, layers=[0, 2], seed=seed) for seed in (1, 2)]
    found = code_stability({MFN: models, RANDOM_SAE: []}, windows(), strengths=(0.3,), seed=4)
    measured = [measure_stability(model, windows(), strengths=(0.3,), seed=4) for model in models]
    assert list(found.figures) == [MFN]
    kind, name = "noise 0.3 on h", "cosine"
    values = np.stack([[each[kind][layer][name] for layer in (0, 2)] for each in measured])
    assert found.figures[MFN][kind][name] == pytest.approx(mean(values.mean((0, 1))))
    assert found.by_layer[MFN][kind][2][name] == pytest.approx(mean(values[:, 1].mean(0)))
    assert found.figures[MFN][kind][name].low < found.figures[MFN][kind][name].value


def test_too_little_text(family_base):
    model = make_mfn(family_base, layers=[0])
    with pytest.raises(ValueError, match="there are 1 windows of 16 tokens"):
        measure_stability(model, Dataset.from_dict(tokens(1, 16)))
