"""Functions of sparse codes, each compared with torch on dense tensors."""

import pytest
import torch

from modeling_mfn.model.sparse_code import SparseCode, decode, encode, largest, pass_to_input, rank_features


@pytest.mark.parametrize("count", [1, 2, 4, 24])
@pytest.mark.parametrize("shape", [(48,), (5, 48), (24, 40), (1, 24, 40), (2, 3, 96), (3, 1, 2, 192)], ids=str)
def test_the_largest_values_are_those_of_topk(shape, count):
    size = torch.Size(shape).numel()
    values = torch.randperm(size, generator=torch.Generator().manual_seed(size)).view(shape).float()
    for ours, theirs in zip(largest(values, count), values.topk(count), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_a_mixture_gets_its_gradient_for_the_input(scale):
    """Active features of every size pass the gradient, and inactive ones do not."""
    generator = torch.Generator().manual_seed(0)
    x, encoder, directions = (torch.randn(*s, generator=generator).double() for s in ((2, 3, 4), (9, 4), (9, 4)))
    bias, x = torch.zeros(9).double(), (scale * x).requires_grad_()
    code = encode(x, encoder, bias, 7)
    assert (code.values == 0).any()
    expected = torch.autograd.grad(decode(code, directions).pow(3).sum(), x)[0]
    fixed = SparseCode(code.indices, code.values.detach(), 9)
    mixture = decode(fixed, directions)
    through = pass_to_input(mixture, x, fixed, encoder, fixed, directions)
    assert torch.equal(through, mixture)
    torch.testing.assert_close(torch.autograd.grad(through.pow(3).sum(), x)[0], expected)


def test_ranks_have_no_gradient():
    x, weight = torch.randn(3, 4), torch.randn(9, 4, requires_grad=True)
    assert not rank_features(x, weight, torch.zeros(9), 2).values.requires_grad
