"""Derivatives that users take: second ones, per-sample gradients, Jacobians of features, by autograd and torch.func."""

import pytest
import torch
from conftest import make_base, make_mfn, tokens
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from modeling_mfn.model.sparse_code import SparseCode, decode, encode, project

TOKENS, FEATURES, SIZE, K = 3, 24, 6, 4


@pytest.fixture(params=[{}, {"codes": "update", "coding_rounds": 2, "refine_steps": 1}], ids=["stream", "update"])
def model(request):
    base = make_base("llama-tied").double()
    base.set_attn_implementation("eager")  # the fused kernel has no second derivatives
    return make_mfn(base, layers=[0, 2], **request.param)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def leaves(*shapes):
    return tuple(random(*shape).requires_grad_() for shape in shapes)


INDICES = torch.tensor([[0, 5, 5, 9], [23, 1, 0, 5], [2, 3, 4, 5]])
EQUATIONS = {
    "encode": (lambda x, w, b: encode(x, w, b, K).values, leaves((TOKENS, SIZE), (FEATURES, SIZE), (FEATURES,))),
    "decode": (lambda v, w: decode(SparseCode(INDICES, v, FEATURES), w), leaves((TOKENS, K), (FEATURES, SIZE))),
    "project": (lambda x, w: project(x, INDICES, w), leaves((TOKENS, SIZE), (FEATURES, SIZE))),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_first_and_second_derivatives_are_those_of_finite_differences(name):
    equation, inputs = EQUATIONS[name]
    assert torch.autograd.gradcheck(equation, inputs)
    assert torch.autograd.gradgradcheck(equation, inputs)
    # third ones: the gradient of a squared gradient, and its own
    first = torch.autograd.grad(equation(*inputs).pow(3).sum(), inputs, create_graph=True)
    assert torch.autograd.gradgradcheck(
        lambda *given: torch.autograd.grad(equation(*given).pow(3).sum(), given, create_graph=True)[0], inputs
    )
    plain = grad(lambda *given: equation(*given).pow(3).sum(), tuple(range(len(inputs))))(*inputs)
    for ours, theirs in zip(first, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def of_features(model):
    return {name: p.detach() for name, p in model.named_parameters() if ".mfn." in name}


def loss(model, parameters, embeddings, labels):
    arguments = {"inputs_embeds": embeddings[None], "labels": labels[None], "use_cache": False}
    return functional_call(model, parameters, kwargs=arguments).loss


def test_second_derivatives_of_a_model_are_those_of_the_dense_equations(model):
    """Compares a Hessian-vector product by autograd with one by torch.func, which has the dense equations."""
    ids = tokens(1, 6)["input_ids"][0]
    inputs = of_features(model) | {"embeddings": model.get_input_embeddings()(ids).detach()}
    along = {name: random(*value.shape) for name, value in inputs.items()}

    def by_inputs(values):
        return loss(model, {n: v for n, v in values.items() if n != "embeddings"}, values["embeddings"], ids)

    expected = jvp(grad(by_inputs), (inputs,), (along,))[1]
    required = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    first = torch.autograd.grad(by_inputs(required), list(required.values()), create_graph=True)
    product = sum((each * direction).sum() for each, direction in zip(first, along.values(), strict=True))
    second = torch.autograd.grad(product, list(required.values()))
    for (name, value), ours in zip(expected.items(), second, strict=True):
        assert value.abs().max() > 0
        torch.testing.assert_close(ours, value, atol=1e-5, rtol=0, msg=name)  # RMSNorm and loss are in float32


def test_gradients_per_sample(model):
    ids, parameters = tokens(3, 6)["input_ids"], of_features(model)
    embeddings = model.get_input_embeddings()(ids).detach()

    def by_parameters(parameters, embeddings, labels):
        return loss(model, parameters, embeddings, labels)

    found = vmap(grad(by_parameters), (None, 0, 0))(parameters, embeddings, ids)
    for row in range(3):
        model.zero_grad()
        model(input_ids=ids[row : row + 1], labels=ids[row : row + 1]).loss.backward()
        for name, value in found.items():
            torch.testing.assert_close(value[row], model.get_parameter(name).grad, atol=1e-10, rtol=0)


def test_jacobians_of_features(model):
    layer, h = model.mfn_layers[2], random(3, model.config.hidden_size)

    def features(h):
        return layer.encode(h).to_dense()

    expected = torch.stack(
        [
            torch.autograd.grad(each, point, retain_graph=True)[0]
            for point in [h.clone().requires_grad_()]
            for each in features(point).flatten()
        ]
    ).view(3, model.config.num_features, *h.shape)
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(features)(h), expected)
    squares = hessian(lambda h: layer.reconstruct(layer.encode(h)).square().sum())(h[0])
    torch.testing.assert_close(squares, squares.T)


def test_second_derivatives_that_would_lack_a_part_are_refused(model):
    batch = tokens(2, 6)
    out = model(**batch, labels=batch["input_ids"], output_reconstructions=True)
    parameters = list(of_features(model))
    weights = [model.get_parameter(name) for name in parameters]
    if model.config.codes_by_pursuit:
        torch.autograd.grad(out.loss, weights, create_graph=True)
        return
    for derive in (
        lambda: torch.autograd.grad(out.loss, weights, create_graph=True),
        lambda: out.loss.backward(create_graph=True),
    ):
        with pytest.raises(RuntimeError, match="output_reconstructions has no second derivatives"):
            derive()
