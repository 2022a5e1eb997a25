"""Activations and residuals compared with the model's own dense codes."""

import numpy as np
import pytest
import torch
from conftest import make_base, make_mfn
from datasets import Dataset

from modeling_mfn import Ablate, Add
from modeling_mfn.evaluation.measures.perplexity import next_token_losses
from modeling_mfn.features.activations import token_activations


def windows():
    ids = torch.randint(3, 96, (7, 12), generator=torch.Generator().manual_seed(4))
    mask = [[1] * (12 - row) + [0] * row for row in range(7)]
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask})


@pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied"])
def test_batches_are_the_dense_codes_and_residuals_of_the_tokens_that_count(name):
    model = make_mfn(make_base(name), layers=[0, 2], alpha=0.5).train()
    data = windows()
    inputs = {name: torch.tensor(data[name]) for name in data.column_names}
    with model.steer({(2, 3): Add(2.0), (2, 5): Ablate()}), torch.no_grad():
        found = list(token_activations(model, data, residuals=True, batch_size=3))
        plain = list(token_activations(model, iter(data), layers=[2], batch_size=3))
        model.eval()
        out = model(**inputs, output_codes=True, output_reconstructions=True)
        model.train()
    mask = inputs["attention_mask"].bool()
    assert [len(batch.input_ids) for batch in found] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([batch.counted for batch in found]), mask)
    np.testing.assert_array_equal(np.concatenate([batch.input_ids for batch in found]), data["input_ids"])
    for layer in (0, 2):
        codes = np.concatenate([batch.codes[layer].toarray() for batch in found])
        np.testing.assert_allclose(codes, out.codes[layer].to_dense()[mask], atol=1e-4)
        residuals = np.concatenate([batch.residuals[layer] for batch in found])
        np.testing.assert_allclose(residuals, out.reconstructions[layer].residual[mask], atol=1e-4)
    for batch in found:
        assert batch.codes[2].nnz == np.count_nonzero(batch.codes[2].toarray())
    assert [list(batch.codes) for batch in plain] == [[2]] * 3
    assert (plain[1].residuals, plain[1].codes[2].nnz) == ({}, found[1].codes[2].nnz)
    assert model.training


@pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied"])
def test_padding_on_either_side_changes_neither_codes_nor_losses(name):
    model, plain = make_mfn(make_base(name), layers=[0, 2]), windows().remove_columns("attention_mask")
    (expected,) = token_activations(model, plain, residuals=True)
    losses = next_token_losses(model, plain)
    for before, after in ((5, 0), (0, 5), (2, 3)):
        rows = [
            {"input_ids": [9] * before + ids + [9] * after, "attention_mask": [0] * before + [1] * 12 + [0] * after}
            for ids in plain["input_ids"]
        ]
        (found,) = token_activations(model, rows, residuals=True)
        for layer in (0, 2):
            np.testing.assert_allclose(found.codes[layer].toarray(), expected.codes[layer].toarray(), atol=1e-4)
            np.testing.assert_allclose(found.residuals[layer], expected.residuals[layer], atol=1e-4)
        np.testing.assert_allclose(next_token_losses(model, rows)[:, before : before + 11], losses, atol=1e-4)


def test_a_missing_layer_is_named():
    with pytest.raises(ValueError, match="block 1 has no MFN layer"):
        next(token_activations(make_mfn(make_base("gpt2-tied"), layers=[0]), windows(), layers=[1]))
