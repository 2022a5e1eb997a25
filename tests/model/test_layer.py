"""The MFN layer compared with a dense float64 transcription of eqs. 1-3, and the invariants of a sparse code."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_base
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp

from modeling_mfn import MFNConfig, Scale, SparseCode
from modeling_mfn.model import mfn_layer
from modeling_mfn.model import pursuit as pursuit_rounds
from modeling_mfn.model.mfn_layer import MFNLayer
from modeling_mfn.model.mfn_pass import MFNPass, ReconstructionRequest
from modeling_mfn.model.pursuit import best, pursue, refine
from modeling_mfn.model.sparse_code import decode, encode, rank_features
from modeling_mfn.model.steering import Context, edits_in_force, steering

PURSUITS = [
    {},
    {"refine_steps": 2},
    {"coding_rounds": 3, "refine_steps": 1},
    {"coding_rounds": 4},
    {"coding_rounds": 9},
]
"""Settings of codes: eq. 1, its values refined, and features chosen in rounds: evenly, not evenly, one by one."""


def make_layer(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    config = MFNConfig(text_config=make_base("llama-tied").config, **({"num_features": 50, "k": 6} | settings))
    layer = MFNLayer(config, 0)
    layer.initialise()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer.to(dtype)


def dense_layer(layer, h, alpha, k, norm, rectify=True, scale=1):
    """Computes eqs. 1-3 with a dense z, completed and then multiplied by `scale`. Returns the blend, h_hat and z."""
    x, mean, std = h, 0, 1
    if norm == "layer":
        mean = h.mean(-1, keepdim=True)
        std = ((h - mean).square().sum(-1, keepdim=True) / (h.shape[-1] - 1)).sqrt()
        x = (h - mean) / (std + 1e-5)
    rounds, steps = min(layer.config.coding_rounds, k), layer.config.refine_steps
    bias = 0 if layer.decoder.bias is None else layer.decoder.bias
    z = x @ layer.encoder.weight.T + layer.encoder.bias
    z = torch.relu(z) if rectify else z
    first = k - (rounds - 1) * (k // rounds) if rectify else k
    chosen = z >= z.sort(-1, descending=True).values[..., first - 1 : first]
    z = torch.where(chosen, z, 0)
    if rectify:
        z = dense_refinement(z, x - bias, layer.decoder.weight, steps)
        for _ in range(rounds - 1):
            products = (x - bias - z @ layer.decoder.weight) @ layer.decoder.weight.T
            others = products.masked_fill(chosen, -torch.inf)
            added = others >= others.sort(-1, descending=True).values[..., k // rounds - 1 : k // rounds]
            z, chosen = z + torch.where(added, torch.relu(products), 0), chosen | added
            z = dense_refinement(z, x - bias, layer.decoder.weight, steps)
    z = scale * z
    h_hat = z @ layer.decoder.weight + bias
    h_hat = h_hat * std + mean
    return alpha * h_hat + (1 - alpha) * h, h_hat, z


def dense_refinement(z, x, directions, steps):
    """Moves the positive entries of z (..., m) by exact line searches down the slope of |x - z D|^2 / 2."""
    active = z > 0
    for _ in range(steps):
        slope = ((x - z @ directions) @ directions.T) * active
        z = z + slope.square().sum(-1, keepdim=True) / (slope @ directions).square().sum(-1, keepdim=True) * slope
    return torch.relu(z)


@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pursuit", PURSUITS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_layer_and_every_gradient_equal_the_dense_equations(norm, bias, pursuit, alpha):
    layer = make_layer(input_norm=norm, decoder_bias=bias, alpha=alpha, **pursuit)
    h = torch.randn(3, 7, 32, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(3, 7, size, dtype=torch.float64) for size in (32, 50)]

    def gradients(blend, z):
        loss = (blend * weights[0]).sum() + (z * weights[1]).sum()
        return torch.autograd.grad(loss, [h, *layer.parameters()])

    taken = MFNPass({}, {}, None)
    blend = layer(h, taken)
    expected, _, z = dense_layer(layer, h, alpha, 6, norm)
    torch.testing.assert_close(blend, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(taken.codes[0].to_dense(), z, atol=1e-10, rtol=0)
    for ours, dense in zip(gradients(blend, taken.codes[0].to_dense()), gradients(expected, z), strict=True):
        torch.testing.assert_close(ours, dense, atol=1e-10, rtol=0)


@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("pursuit", PURSUITS)
def test_feature_losses_reach_the_layer_and_stop_at_its_input(norm, pursuit):
    layer = make_layer(input_norm=norm, alpha=0.5, **pursuit)
    h = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    taken = MFNPass({}, None, {})
    layer(h, taken)
    found = taken.reconstructions[0]
    _, h_hat, z = dense_layer(layer, h.detach(), 0.5, 6, norm)
    torch.testing.assert_close(found.reconstructed, h_hat, atol=1e-10, rtol=0)
    ours = (found.reconstructed.square().sum() + found.code.to_dense().square().sum(),)
    dense = (h_hat.square().sum() + z.square().sum(),)
    for mine, theirs in zip(
        torch.autograd.grad(ours, list(layer.parameters()), retain_graph=True),
        torch.autograd.grad(dense, list(layer.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)
    assert torch.autograd.grad(ours, h, allow_unused=True) == (None,)


@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("edit", [None, Scale(2.0)])
@pytest.mark.parametrize("pursuit", PURSUITS)
def test_one_forward_serves_the_losses_and_the_model(norm, stop_gradient, edit, pursuit, monkeypatch):
    """Compares outputs and gradients with those of separate dense forwards.

    The loss depends on the output, the reconstruction, the code and the candidates together. The layer encodes
    and chooses once. The layer decodes once, or twice if its code is steered, or completed on two paths.
    """
    layer = make_layer(input_norm=norm, **pursuit)
    layer.config.alpha = 0.7
    h = torch.randn(3, 7, 32, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(3, 7, size, dtype=torch.float64) for size in (32, 32, 50, 50)]
    decoded = []
    monkeypatch.setattr(mfn_layer, "decode", lambda *given: decoded.append(given) or decode(*given))
    ranked = []
    monkeypatch.setattr(mfn_layer, "rank_features", lambda *given: ranked.append(given) or rank_features(*given))
    monkeypatch.setattr(mfn_layer, "encode", lambda *given: ranked.append(given) or encode(*given))
    chosen = []
    monkeypatch.setattr(pursuit_rounds, "best", lambda *given: chosen.append(given) or best(*given))
    edits = {}
    if edit is not None:
        context = Context(({(0, feature): edit for feature in range(50)},), "all")
        unsteered = SimpleNamespace(active_preset=None)
        model = SimpleNamespace(dtype=torch.float64, device=h.device, config=unsteered, active_preset=None)
        with steering(model, context):
            edits = edits_in_force(model, h, None)
    taken = MFNPass(edits, {}, {}, ReconstructionRequest(stop_gradient, candidates=12))
    blend = layer(h, taken)
    assert len(decoded) == (2 if edit or (pursuit and stop_gradient) else 1)
    assert len(ranked) == 1
    assert len(chosen) == min(pursuit.get("coding_rounds", 1), layer.config.k) - 1
    found = taken.reconstructions[0]
    results = [blend, found.reconstructed, found.code.to_dense(), found.candidates.to_dense()]

    seen = h.detach() if stop_gradient else h
    dense_blend, _, _ = dense_layer(layer, h, 0.7, 6, norm, scale=1 if edit is None else 2)
    _, h_hat, z = dense_layer(layer, seen, 0.7, 6, norm)
    pre_activations = dense_layer(layer, seen, 0.7, 12, norm, rectify=False)[2]
    expected = [dense_blend, h_hat, z, pre_activations]
    for ours, dense in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, dense, atol=1e-10, rtol=0)

    def gradients(outputs):
        loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        return torch.autograd.grad(loss, [h, *layer.parameters()])

    for ours, dense in zip(gradients(results), gradients(expected), strict=True):
        torch.testing.assert_close(ours, dense, atol=1e-10, rtol=0)
    taken = MFNPass(edits, {}, {}, ReconstructionRequest(stop_gradient))
    layer(h, taken)
    (through,) = torch.autograd.grad(taken.codes[0].to_dense().square().sum(), h)
    assert through.any()  # gradients of a returned code reach the input


def test_refined_values_approach_least_squares():
    """Compares with the values that least squares gives on the same features, where all of them are positive."""
    torch.manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(20, 40, dtype=torch.float64), dim=-1)
    indices = torch.stack([torch.randperm(20)[:5] for _ in range(30)])
    best = torch.rand(30, 5, dtype=torch.float64) + 1
    x = (best.unsqueeze(-1) * directions[indices]).sum(1)
    code, errors = SparseCode(indices, torch.rand(30, 5, dtype=torch.float64) + 0.5, 20), []
    for steps in (0, 1, 2, 4, 60):
        refined = refine(code, x - decode(code, directions), directions, steps)
        assert refined.indices is indices
        errors.append((x - decode(refined, directions)).norm(dim=-1))
    for before, after in itertools.pairwise(errors):
        assert (after < before).all()
    torch.testing.assert_close(refined.values, best, atol=1e-9, rtol=0)


def test_refinement_keeps_inactive_pairs_and_nonnegative_values():
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    code = SparseCode(torch.tensor([[0, 1, 2]]), torch.tensor([[1.0, 2.0, 0.0]]), 3)
    error = torch.tensor([[3.0, -1.0]]) - torch.tensor([[1.0, 2.0]])
    assert refine(code, error, directions, 1).values.tolist() == [[3.0, 0.0, 0.0]]
    exact = SparseCode(torch.tensor([[0, 1, 2]]), torch.zeros(1, 3), 3)
    assert refine(exact, torch.tensor([[3.0, -1.0]]), directions, 3).values.tolist() == [[0.0, 0.0, 0.0]]
    for name, value, least in (("refine_steps", -1, 0), ("coding_rounds", 0, 1), ("coding_rounds", 1.5, 1)):
        with pytest.raises(ValueError, match=f"{name} is {value}; it must be a whole number of at least {least}"):
            make_layer(**{name: value})


def test_each_round_adds_what_fits_best():
    """Compares with orthogonal matching pursuit of scikit-learn: one feature a round, least squares after each."""
    torch.manual_seed(4)
    directions = torch.nn.functional.normalize(torch.randn(60, 24, dtype=torch.float64), dim=-1)
    planted = torch.rand(40, 5, dtype=torch.float64) + 1
    rows = torch.stack([torch.randperm(60)[:5] for _ in range(40)])
    x = (planted.unsqueeze(-1) * directions[rows]).sum(1)
    code = encode(x, directions, torch.zeros(60, dtype=torch.float64), 1)
    code = pursue(code, x, directions, rounds=5, per_round=1, steps=200)
    theirs = torch.from_numpy(orthogonal_mp(directions.T.numpy(), x.T.numpy(), n_nonzero_coefs=5).T)
    positive = (theirs >= 0).all(-1)  # a negative value is where the two differ by design
    assert positive.sum() > 20
    torch.testing.assert_close(code.to_dense()[positive], theirs[positive], atol=1e-8, rtol=0)


def test_numerical_gradients_of_encode_and_decode():
    torch.manual_seed(1)
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 5), (9, 5), (9,)))
    directions = torch.randn(9, 5, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias, directions)]
    torch.autograd.gradcheck(lambda x, w, b, d: decode(encode(x, w, b, 3), d), inputs)


def test_non_contiguous_input_and_gradient():
    layer = make_layer(alpha=0.7)
    h = torch.randn(32, 7, 3, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    weight = torch.randn(32, 7, 3, dtype=torch.float64).permute(2, 1, 0)
    assert not h.is_contiguous()
    assert not weight.is_contiguous()
    (ours,) = torch.autograd.grad((layer(h) * weight).sum(), h)
    (dense,) = torch.autograd.grad((dense_layer(layer, h, 0.7, 6, "layer")[0] * weight).sum(), h)
    torch.testing.assert_close(ours, dense, atol=1e-10, rtol=0)


def test_autocast_keeps_the_residual_and_the_gradients_in_float32():
    layer = make_layer(torch.float32, alpha=1.0, k=50)
    layer.encoder.bias.data += 9  # every feature is active (k = m), so that rounding changes values only
    h = torch.randn(4, 16, 32, requires_grad=True)
    exact = torch.autograd.grad(layer(h).square().sum(), [h, *layer.parameters()])
    with torch.autocast("cpu", torch.bfloat16):
        blend = layer(h)
    assert blend.dtype == torch.float32
    rounded = torch.autograd.grad(blend.square().sum(), [h, *layer.parameters()])
    for ours, reference in zip(rounded, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_of_features_that_fire_on_every_token(dtype):
    """Sums the gradients of 4,000 tokens for one feature. Rounding at each addition would show."""
    torch.manual_seed(2)
    code = SparseCode(torch.zeros(4000, 1, dtype=torch.long), torch.ones(4000, 1, dtype=dtype), 3)
    directions = torch.randn(3, 8).to(dtype).requires_grad_()
    weight = (1 + 0.1 * torch.randn(4000, 8)).to(dtype)
    (ours,) = torch.autograd.grad((decode(code, directions) * weight).sum(), directions)
    torch.testing.assert_close(ours[0].double(), weight.double().sum(0), rtol=0.01, atol=0)


def test_a_constant_row_has_finite_gradients():
    layer = make_layer(alpha=0.5)
    h = torch.zeros(1, 2, 32, dtype=torch.float64, requires_grad=True)
    layer(h).sum().backward()
    assert h.grad.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    features=st.integers(1, 20),
    data=st.data(),
)
def test_codes_are_sparse_nonnegative_and_the_same_without_gradients(shape, features, data):
    k = data.draw(st.integers(1, features))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    x, weight = torch.randn(*shape, 6, generator=generator), torch.randn(features, 6, generator=generator)
    bias = torch.randn(features, generator=generator)
    with_gradient = encode(x, weight.requires_grad_(), bias, k)
    with torch.no_grad():
        code = encode(x, weight, bias, k)
    assert torch.equal(code.indices, with_gradient.indices)
    assert torch.equal(code.values, with_gradient.values)
    assert code.indices.shape == code.values.shape == (*shape, k)
    assert (code.values >= 0).all()
    assert all(len(set(row.tolist())) == k for row in code.indices.view(-1, k))
    dense = code.to_dense()
    assert dense.shape == (*shape, features)
    assert (dense != 0).sum(-1).max() <= k
    by_hand = torch.zeros_like(dense).view(-1, features)
    for row, (indices, values) in enumerate(zip(code.indices.view(-1, k), code.values.view(-1, k), strict=True)):
        for index, value in zip(indices, values, strict=True):
            by_hand[row, index] += value
    assert torch.equal(dense, by_hand.view_as(dense))


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    features=st.sampled_from([24, 64, 192, 1536, 1540]),
    kinds=st.sampled_from([3, 1000]),
    data=st.data(),
)
def test_the_features_of_a_code_are_the_largest(shape, features, kinds, data):
    """Covers ties, and numbers of features for which the search uses groups or does not."""
    count = data.draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    bias = torch.zeros(features)
    x = torch.randint(kinds, (*shape, features), generator=generator).float()
    found = rank_features(x, torch.eye(features), bias, count)
    ordered = x.numpy().copy()
    ordered.sort(axis=-1)
    assert np.array_equal(found.values, ordered[..., ::-1][..., :count])
    assert torch.equal(x.gather(-1, found.indices), found.values)
    assert all(len(set(row.tolist())) == count for row in found.indices.view(-1, count))


def test_decoder_rows_and_their_gradient():
    layer = make_layer()
    directions = layer.decoder.weight
    directions.grad = torch.randn_like(directions)
    sideways = torch.randn_like(directions)
    expected = directions.grad - (directions.grad * directions).sum(-1, keepdim=True) * directions
    layer.decoder.remove_parallel_gradient()
    torch.testing.assert_close(directions.grad, expected)
    directions.data = 3 * sideways
    layer.normalise_directions()
    torch.testing.assert_close(directions.data, sideways / sideways.norm(dim=-1, keepdim=True))
