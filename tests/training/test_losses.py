"""Losses of section 4, compared with dense float64 transcriptions of their equations in value and gradient."""

import math

import pytest
import torch
import torch.nn.functional as F

from modeling_mfn import SparseCode
from modeling_mfn.model.sparse_code import attach_encoder, encode, rank_features, rectify
from modeling_mfn.training import losses
from modeling_mfn.training.losses import (
    WINDOW,
    competition_loss,
    distillation_loss,
    rate_loss,
    reconstruction_loss,
    stability_loss,
    token_mean,
)

TOKENS, HIDDEN, FEATURES, K, RHO = 30, 6, 20, 4, 0.15
MASK = torch.tensor([1, 1, 0, 1, 1, 0] * 5)


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    # falling biases: some of the last features are never active, and many tokens have fewer than K positive values
    bias = torch.linspace(1.5, -4.0, FEATURES, dtype=torch.float64)
    return draw(TOKENS, HIDDEN), draw(FEATURES, HIDDEN).requires_grad_(), bias.requires_grad_()


def dense_code(x, weight, bias):
    """Returns the dense z of eq. 1 and each token's threshold, the K-th largest value."""
    z = torch.relu(x @ weight.T + bias)
    kth = z.topk(K, dim=-1).values[:, -1:]
    return torch.where(z >= kth, z, 0), kth.detach()


def kl(p, rho):
    """Computes eq. 6 feature by feature, with 0 log 0 = 0."""
    total = 0.0
    for p_i in p:
        total = total + (p_i * torch.log(p_i / rho) if p_i > 0 else 0.0)
        total = total + ((1 - p_i) * torch.log((1 - p_i) / (1 - rho)) if p_i < 1 else 0.0)
    return total


def compare(ours, dense, parameters):
    assert ours.item() == pytest.approx(dense.item(), rel=1e-10)
    mine = torch.autograd.grad(ours, parameters)
    theirs = torch.autograd.grad(dense, parameters)
    assert any(gradient.abs().max() > 1e-6 for gradient in theirs)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


@pytest.fixture(params=["all tokens", "masked"])
def counted(request):
    return slice(None) if request.param == "all tokens" else MASK.bool()


def mask_of(counted):
    """Returns the mask of a batch, (5, 6), or None if all tokens count."""
    return None if isinstance(counted, slice) else MASK.view(5, 6)


def batch(code):
    """Reshapes the tokens of a code to a batch: (30, K) -> (5, 6, K)."""
    return code._replace(indices=code.indices.view(5, 6, -1), values=code.values.view(5, 6, -1))


@pytest.mark.parametrize("width", [WINDOW, 2.0])
def test_rate_is_eq_6_with_the_slope_of_a_rectangle(counted, width, monkeypatch):
    """The loss has the value of eq. 6 at the true rates.

    The gradient uses the rectangle's slope, at each token's 2K largest pre-activations.
    """
    monkeypatch.setattr(losses, "WINDOW", width)
    x, weight, bias = weights()
    candidates = attach_encoder(rank_features(x, weight, bias, 2 * K), x, weight, bias)
    code = rectify(candidates.first(K))
    ours = rate_loss(batch(code), RHO, mask_of(counted), batch(candidates))
    z, threshold = (part[counted] for part in dense_code(x, weight, bias))
    rates = (z > 0).double().mean(0)
    assert ours.item() == pytest.approx(kl(rates, RHO).item(), rel=1e-10)

    a = (x @ weight.T + bias)[counted].detach()
    w = width * (z.sum(-1) / (z > 0).sum(-1).clamp_min(1)).detach()[:, None]
    distance = (a - threshold) / w
    slope = (distance.abs() <= 0.5) / w
    slope = slope.masked_fill(a < a.topk(2 * K, dim=-1).values[:, -1:], 0)
    refined = code._replace(values=(code.values * torch.rand_like(code.values)).detach())
    again = rate_loss(batch(refined), RHO, mask_of(counted), batch(candidates))
    mine = torch.autograd.grad(again, [weight, bias], retain_graph=True)
    assert again == ours
    assert all(map(torch.equal, mine, torch.autograd.grad(ours, [weight, bias], retain_graph=True)))
    p = rates.clamp(0.5 / len(a), 1 - 0.5 / len(a))
    per_feature = (torch.log(p / RHO) - torch.log((1 - p) / (1 - RHO))) / len(a)
    grad_bias = (slope * per_feature).sum(0)
    grad_weight = (slope * per_feature).T @ x[counted]
    mine = torch.autograd.grad(ours, [weight, bias])
    torch.testing.assert_close(mine[0], grad_weight, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(mine[1], grad_bias, atol=1e-12, rtol=1e-9)
    if width == 2.0:
        assert (grad_bias[rates == 0] < 0).any(), "features that were not active but near it must be raised"


def test_a_feature_that_fires_on_every_token_has_the_gradient_just_below():
    values = torch.ones(4, 1, dtype=torch.float64, requires_grad=True)
    loss = rate_loss(SparseCode(torch.zeros(4, 1, dtype=torch.long), values, 3), RHO)
    assert loss.item() == pytest.approx(-math.log(RHO) - 2 * math.log(1 - RHO))
    (gradient,) = torch.autograd.grad(loss, values)
    p = 1 - 0.5 / 4
    of_rate = math.log(p / RHO) - math.log((1 - p) / (1 - RHO))
    torch.testing.assert_close(gradient, torch.full_like(gradient, of_rate / WINDOW / 4))


def test_the_window_has_its_edges():
    """Token with the value 2: its window reaches from 1.5 to 2.5."""
    code = SparseCode(torch.tensor([[0]]), torch.tensor([[2.0]]), 4)
    near = torch.tensor([[2.0, 1.5, 1.4]], requires_grad=True)
    loss = rate_loss(code, RHO, candidates=SparseCode(torch.tensor([[0, 1, 2]]), near, 4))
    assert loss.item() == pytest.approx(-math.log(RHO) - 3 * math.log(1 - RHO))
    (gradient,) = torch.autograd.grad(loss, near)
    assert (gradient != 0).tolist() == [[True, True, False]]


def test_competition_is_eq_7(counted):
    x, weight, bias = weights()
    z = dense_code(x, weight, bias)[0][counted]
    covariance = (z - z.mean(0)).T @ (z - z.mean(0)) / len(z)
    off_diagonal = covariance - torch.diag(covariance.diagonal())
    code = batch(encode(x, weight, bias, K))
    compare(competition_loss(code, mask_of(counted)), off_diagonal.square().sum(), [weight, bias])
    scale = z.square().sum(-1).mean().item() ** 2
    normalised = competition_loss(code, mask_of(counted), normalize=True)
    assert normalised.item() == pytest.approx(off_diagonal.square().sum().item() / scale)
    spread = code._replace(indices=code.indices * 5_000 + 4_999, num_features=FEATURES * 5_000)
    assert competition_loss(spread, mask_of(counted)).item() == pytest.approx(off_diagonal.square().sum().item())


def test_stability_is_eq_8(counted):
    x, weight, bias = weights()
    x_tilde = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    z, z_tilde = (dense_code(each, weight, bias)[0][counted] for each in (x, x_tilde))
    codes = [batch(encode(each, weight, bias, K)) for each in (x, x_tilde)]
    dense = (z - z_tilde).square().sum(-1).mean()
    compare(stability_loss(*codes, mask_of(counted)), dense, [weight, bias])
    normalised = stability_loss(*codes, mask_of(counted), normalize=True)
    assert normalised.item() == pytest.approx(dense.item() / z.square().sum(-1).mean().item())


def test_losses_of_one_small_token():
    code = SparseCode(torch.tensor([[0, 2]]), torch.tensor([[3e-4, 4e-4]], dtype=torch.float64), 3)
    perturbed = code._replace(indices=torch.tensor([[2, 1]]))
    difference = torch.tensor([3e-4, -4e-4, 4e-4 - 3e-4], dtype=torch.float64).square().sum().item()
    assert competition_loss(code).item() == pytest.approx(0, abs=1e-20)
    assert stability_loss(code, perturbed).item() == pytest.approx(difference)
    assert stability_loss(code, perturbed, normalize=True).item() == pytest.approx(difference / 25e-8)


def test_reconstruction_is_eq_5():
    torch.manual_seed(0)
    h, h_hat = torch.randn(2, 3, 8, dtype=torch.float64) * 5 + 1, torch.randn(2, 3, 8, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    raw, shares = [], []
    for row in range(2):
        for token in range(3):
            error = sum((h[row, token, i] - h_hat[row, token, i]) ** 2 for i in range(8))
            variance = sum((h[row, token, i] - h[row, token].mean()) ** 2 for i in range(8))
            raw.append(error)
            shares.append(error / variance)
    kept = [0, 1, 4, 5]
    assert reconstruction_loss(h, h_hat, normalize=False) == pytest.approx(float(sum(raw) / 6))
    assert reconstruction_loss(h, h_hat) == pytest.approx(float(sum(shares) / 6))
    assert reconstruction_loss(h, h_hat, mask) == pytest.approx(float(sum(shares[i] for i in kept) / 4))
    h_hat[0, 2] = float("nan")
    assert reconstruction_loss(h, h_hat, mask, normalize=False) == pytest.approx(float(sum(raw[i] for i in kept) / 4))
    assert token_mean(torch.ones(2), torch.zeros(2)) == 0
    assert token_mean(torch.tensor([3.0, 4.0]), torch.tensor([0, 1])) == 4
    assert reconstruction_loss(h.bfloat16(), h.bfloat16()).dtype == torch.float32


def test_distillation_is_the_divergence_from_the_base():
    torch.manual_seed(1)
    ours, base = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 7)
    counted = torch.tensor([[1, 0, 1], [0, 1, 1]])
    total = sum(
        torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=base[row, token]),
            torch.distributions.Categorical(logits=ours[row, token]),
        )
        for row, token in counted.nonzero().tolist()
    )
    loss = distillation_loss(ours, base, counted)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, ours)
    expected = (F.softmax(ours, -1) - F.softmax(base, -1)) * counted.unsqueeze(-1)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (4, 3)])
def test_codes_without_an_active_feature_or_a_token_give_finite_losses(shape):
    values = torch.zeros(shape, requires_grad=True)
    code = SparseCode(torch.arange(3).expand(shape), values, 5)
    mask = torch.ones(shape[0]) if shape[0] else None
    rate = rate_loss(code, 0.1, mask)
    found = [rate, competition_loss(code, mask, True), stability_loss(code, code, mask, True)]
    assert rate.item() == pytest.approx(-5 * math.log(0.9), rel=1e-5)
    for loss in found:
        (gradient,) = torch.autograd.grad(loss, values)
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("rho", [0, 1, 1.5])
def test_a_rate_that_is_none(rho):
    code = SparseCode(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), 2)
    with pytest.raises(ValueError, match=f"rho is {rho}; a firing rate lies between 0 and 1"):
        rate_loss(code, rho)
