"""Parts of the MFN layer, each compared with its equation in float64."""

import pytest
import torch
from conftest import make_base
from test_layer import dense_layer, make_layer

from modeling_mfn import MFNConfig
from modeling_mfn.model.mfn_layer import MFNLayer, _shortened, mfn_parameters
from modeling_mfn.model.mfn_pass import EMBEDDINGS, MFNPass, Reconstruction, ReconstructionRequest


def random(*shape, seed=5):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_a_layer_codes_what_came_after_the_stream_before(alpha):
    layer, h, before = make_layer(alpha=alpha), random(2, 7, 32), random(2, 7, 32, seed=6)
    mfn_pass = MFNPass(streams={EMBEDDINGS: before})
    _, u_hat, z = dense_layer(layer, h - before, 1.0, 6, "layer")
    expected = alpha * (before + u_hat) + (1 - alpha) * h
    close(layer(h, mfn_pass), expected)
    with torch.no_grad():
        close(layer(h, MFNPass(streams={EMBEDDINGS: before})), expected)
    close(layer.output_of(layer.encode(h - before), h, mfn_pass), expected)
    close(layer.encode(h - before).to_dense(), z)


def test_standardising_keeps_every_digit():
    """The factor that keeps squares of large entries finite is a power of two."""
    layer, h = make_layer(torch.float32), random(50, 32).float()
    centred = h - h.mean(-1, keepdim=True)
    std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / 31**0.5
    read, large = layer.standardise(h), layer.standardise(h * 2.0**80)
    assert torch.equal(read.std, std)
    assert torch.equal(read.x, centred / (std + 1e-5))
    assert torch.equal(large.std, std * 2.0**80)
    assert torch.equal(large.x, centred / std)


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_input_and_error_are_on_the_scale_of_the_encoder(norm):
    layer, h, h_hat = make_layer(input_norm=norm), 1e-4 * random(2, 7, 32), 1e-4 * random(2, 7, 32, seed=6)
    x, error = layer.input_and_error(Reconstruction(h.clone().requires_grad_(), h_hat, layer.encode(h)))
    assert not error.requires_grad
    mean, std = (h.mean(-1, keepdim=True), h.std(-1, keepdim=True) + 1e-5) if norm == "layer" else (0, 1)
    close(x, (h - mean) / std)
    close(error, (h - h_hat) / std)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_losses_that_reach_all_weights_change_no_output(alpha):
    layer, h = make_layer(alpha=alpha), random(2, 7, 32)
    mfn_pass = MFNPass(reconstructions={}, request=ReconstructionRequest(reaches_all=True))
    blend, h_hat, _ = dense_layer(layer, h, alpha, 6, "layer")
    close(layer(h, mfn_pass), blend)
    close(mfn_pass.reconstructions[0].reconstructed, h_hat)


def test_alpha_0_leaves_the_stream_alone_and_still_has_codes_and_gradients():
    layer, h = make_layer(alpha=0.0), random(2, 7, 32)
    with torch.no_grad():
        mfn_pass = MFNPass(codes={})
        assert torch.equal(layer(h), h)
        assert torch.equal(layer(h, mfn_pass), h)
        assert torch.equal(mfn_pass.codes[0].to_dense(), layer.encode(h).to_dense())
    layer(h).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in layer.parameters())
    with torch.no_grad():
        layer.decoder.weight.fill_(torch.nan)
        assert torch.equal(layer(h), h)  # nothing is computed


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_gradients_of_losses_stop_at_the_input_if_they_are_to(stop_gradient):
    layer, h = make_layer(), random(2, 7, 32).requires_grad_()
    mfn_pass = MFNPass(reconstructions={}, request=ReconstructionRequest(stop_gradient=stop_gradient))
    layer(h, mfn_pass)
    found = mfn_pass.reconstructions[0]
    assert found.residual.requires_grad != stop_gradient
    inputs = torch.autograd.grad(found.reconstructed.sum() + found.code.values.sum(), [h], allow_unused=True)
    assert (inputs[0] is None) == stop_gradient


def test_losses_get_the_code_of_perturbed_tokens_and_the_candidates():
    layer, h, chosen = make_layer(), random(2, 7, 32), torch.tensor([3, 11])
    request = ReconstructionRequest(perturb=lambda h: h.roll(1, -1) + 0.5 * h, chosen=chosen, candidates=9)
    mfn_pass = MFNPass(reconstructions={}, request=request)
    layer(h, mfn_pass)
    found, perturbed = mfn_pass.reconstructions[0], request.perturb(h.view(14, 32)[chosen])
    close(found.perturbed.to_dense(), dense_layer(layer, perturbed, 1.0, 6, "layer")[2])
    pre_activations = dense_layer(layer, h, 1.0, 9, "layer", rectify=False)[2]
    close(found.candidates.to_dense(), pre_activations)
    assert found.revived is None
    mfn_pass = MFNPass(reconstructions={}, request=ReconstructionRequest(chosen=chosen))
    layer(h, mfn_pass)
    assert mfn_pass.reconstructions[0].perturbed is None


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 32752.0), (torch.float32, 1e15), (torch.float64, 1e15)])
def test_long_streams_are_shortened_and_keep_their_direction(dtype, limit):
    rows = random(6, 6)
    rows = rows / rows.abs().amax(-1, keepdim=True)
    h = rows * limit * torch.tensor([1e-20, 1e-3, 0.9, 1.1, 7.0, 1e5])[:, None]
    found = _shortened(h.view(2, 3, 6), dtype).view(6, 6)
    torch.testing.assert_close(found[:3], h[:3])
    torch.testing.assert_close(found[3:], rows[3:] * limit)
    infinite = _shortened(torch.tensor([[torch.inf, 1.0]]), dtype)
    torch.testing.assert_close(infinite, torch.tensor([[limit, 0.0]]))


GONE = {"pruned_features": [0, 2, 5, 6], "removed_decoder_rows": [0, 5, 6], "removed_encoder_rows": [5]}


@pytest.fixture
def edited():
    """Layer 0, and layer 2, in which some of 8 features are gone."""
    by_layer = {name: {"2": features} for name, features in GONE.items()}
    settings = by_layer | {"direction_norms": {"L0/3": 2.0, "L2/4": 3.0}}
    config = MFNConfig(text_config=make_base("llama-tied").config, layers=[0, 2], num_features=8, k=2, **settings)
    layers = [MFNLayer(config, index) for index in (0, 2)]
    for layer in layers:
        layer.initialise()
    return layers


def test_a_layer_has_no_weights_of_features_that_are_gone(edited):
    sizes = [[len(layer.encoder.weight), len(layer.decoder.weight)] for layer in edited]
    assert sizes == [[8, 8], [7, 5]]


def test_directions_are_by_feature(edited):
    whole, compacted = edited
    assert whole.directions() is whole.decoder.weight
    found, kept = compacted.directions(), [1, 3, 4, 7]
    assert torch.equal(found[kept], compacted.decoder.weight[[0, 2, 3, 4]])
    assert not found[GONE["pruned_features"]].any()
    weights = compacted.rows_of(torch.tensor(kept))
    assert torch.equal(weights.decoder.values, found[kept])
    assert torch.equal(weights.encoder.values, compacted.encoder.weight[[1, 3, 4, 6]])


def test_directions_get_their_norm_back(edited):
    for layer, row, norm in zip(edited, (3, 3), (2.0, 3.0), strict=True):  # L2/4 is row 3 of its decoder
        with torch.no_grad():
            layer.decoder.weight *= 1.7
        layer.normalise_directions()
        expected = torch.ones(len(layer.decoder.weight))
        expected[row] = norm
        torch.testing.assert_close(layer.decoder.weight.norm(dim=-1), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_calibration_finds_the_least_squared_error(bias):
    """No other factor of the encoder gives a smaller one."""
    layer, h = make_layer(decoder_bias=bias), random(200, 32) + 2 * random(32, seed=6)
    layer.initialise()
    layer.calibrate(h)
    x = layer.standardise(h).x
    if bias:
        close(layer.decoder.bias, x.mean(0))
    close(layer.encoder.bias, -layer.encoder.weight @ x.mean(0))

    def error(factor):
        code = layer.encode(h)
        return (layer.reconstruct(code._replace(values=factor * code.values)) - x).square().sum()

    errors = [error(factor).item() for factor in (0.99, 1.0, 1.01)]
    assert min(errors) == errors[1]
    assert errors[1] < error(0)


def test_calibration_on_constant_rows_keeps_the_encoder():
    layer = make_layer()
    layer.initialise()
    weight = layer.encoder.weight.clone()
    layer.calibrate(torch.ones(5, 32, dtype=torch.float64))
    assert torch.equal(layer.encoder.weight, weight)
    assert not layer.encoder.bias.any()


@pytest.mark.parametrize("bias", [True, False])
def test_reset_features_have_short_rows_along_their_directions(bias):
    layer, features, directions = make_layer(decoder_bias=bias), torch.tensor([3, 40]), random(2, 32)
    before = layer.encoder.weight.clone()
    layer.reset_features(features, directions)
    close(layer.decoder.weight[features], directions)
    close(layer.encoder.weight[features], 0.2 * before.norm(dim=-1).mean() * directions)
    mean = layer.decoder.bias if bias else torch.zeros(32, dtype=torch.float64)
    close(layer.encoder.bias[features], -layer.encoder.weight[features] @ mean)
    others = [feature for feature in range(50) if feature not in (3, 40)]
    assert torch.equal(layer.encoder.weight[others], before[others])


def test_a_stream_that_is_not_steered_keeps_its_length():
    layer, h = make_layer(torch.float32, alpha=1.0), 1e20 * random(2, 7, 32).float()
    assert layer(h).abs().max() > 1e19


def test_a_layer_knows_whether_it_was_trained():
    layer = make_layer()
    assert not layer.was_trained
    layer.eval()
    assert not layer.was_trained
    layer.train()
    assert layer.training
    layer.eval()
    assert layer.was_trained
    layer.has_named_features()
    assert not layer.was_trained


def test_parameters_of_layers_have_the_names_of_the_model():
    layer = make_layer()
    names = ["encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"]
    assert sorted(mfn_parameters(layer)) == sorted(names)
    twice = torch.nn.ModuleDict({"a": layer, "b": layer, "original_module": layer})
    found = mfn_parameters(twice)
    assert sorted(found) == sorted(f"{place}.{name}" for place in "ab" for name in names)
    assert all(found[name] is layer.get_parameter(name[2:]) for name in found)
