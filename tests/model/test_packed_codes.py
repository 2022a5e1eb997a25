"""Packed rows, told apart by their position ids, next to the same rows one by one."""

import pytest
import torch
from conftest import make_mfn, tokens

ROWS = [tokens(1, length, seed=length)["input_ids"] for length in (41, 17, 30, 56, 25, 47)]


def codes_of_packed_and_single_rows(model):
    """Returns two maps, layer -> (active features (T, K) in order of their numbers, their activations)."""
    places = torch.cat([torch.arange(row.shape[1]) for row in ROWS])[None]
    with torch.no_grad():
        packed = model(torch.cat(ROWS, 1), position_ids=places, use_cache=False, output_codes=True).codes
        single = [model(row, output_codes=True).codes for row in ROWS]
    for layer in model.config.layers:
        yield layer, ordered(packed[layer]), ordered(*(codes[layer] for codes in single))


def ordered(*codes):
    indices, values = (torch.cat([getattr(code, name)[0] for code in codes]) for name in ("indices", "values"))
    order = indices.argsort(-1)
    return indices.gather(-1, order), values.gather(-1, order)


@pytest.mark.parametrize("codes", ["stream", "update"])
def test_packed_rows_have_the_codes_of_the_rows_alone(family_base, codes):
    model = make_mfn(family_base.double(), codes=codes)
    for _, (features, values), (alone, values_alone) in codes_of_packed_and_single_rows(model):
        assert torch.equal(features, alone)
        torch.testing.assert_close(values, values_alone, atol=1e-9, rtol=0)


@pytest.mark.parametrize("codes", ["stream", "update"])
def test_in_bfloat16_few_tokens_of_packed_rows_have_another_feature_and_it_is_a_weak_one(family_base, codes):
    """Products of another shape round differently, so that a token's K-th and next feature can change places."""
    model = make_mfn(family_base, codes=codes).bfloat16()
    for _, (features, values), (alone, _) in codes_of_packed_and_single_rows(model):
        swapped = (features[:, :, None] != alone[:, None]).all(-1)
        assert swapped.any(-1).float().mean() < 0.05
        weakest = values.amin(-1, keepdim=True).expand_as(values)
        assert (values[swapped] <= 1.25 * weakest[swapped]).all()
