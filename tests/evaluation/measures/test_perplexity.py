"""Next-token losses, compared with those of transformers."""

import math

import numpy as np
import pytest
import torch
from conftest import make_mfn, tokens

from modeling_mfn.evaluation.measures.perplexity import next_token_losses, perplexity, window_losses


def windows(rows=5, length=12, padded=True):
    ids = tokens(rows, length)["input_ids"].numpy()
    mask = np.ones_like(ids)
    if padded:
        mask[1, 8:] = 0
        mask[3, 5:] = 0
    return [{"input_ids": row, "attention_mask": counted} for row, counted in zip(ids, mask, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_losses_of_windows_are_those_of_transformers(family_base, padded):
    rows, expected, weights = windows(padded=padded), [], []
    for row in rows:
        length = int(row["attention_mask"].sum())
        ids = torch.tensor(row["input_ids"][None, :length])
        expected.append(family_base(input_ids=ids, labels=ids).loss.item())
        weights.append(length - 1)
    model = make_mfn(family_base, alpha=0.0).train()
    for each in (family_base, model):
        assert window_losses(each, rows, batch_size=2) == pytest.approx(expected, rel=1e-5)
        assert perplexity(each, rows, 3) == pytest.approx(math.exp(np.average(expected, weights=weights)), rel=1e-5)
    assert model.training
    assert np.isnan(next_token_losses(model, rows)).sum() == sum(11 - weight for weight in weights)


def test_padding_on_the_left_is_no_context_of_what_follows(family_base):
    ids = tokens(2, 12)["input_ids"].numpy()
    mask = np.ones_like(ids)
    mask[0, :4] = 0
    rows = [{"input_ids": row, "attention_mask": counted} for row, counted in zip(ids, mask, strict=True)]
    assert np.isnan(next_token_losses(family_base, rows)[0]).tolist() == [True] * 4 + [False] * 7


def test_windows_without_a_token_to_predict(family_base):
    rows = windows()
    rows[2]["attention_mask"] = np.eye(12, dtype=int)[0]
    with pytest.raises(ValueError, match="window 2 has no token to predict"):
        window_losses(family_base, rows)
    with pytest.raises(ValueError, match="windows have no row"):
        perplexity(family_base, [])
