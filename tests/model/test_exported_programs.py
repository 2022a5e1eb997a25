"""Exported models: torch.export with any number of rows and tokens, and the form of the layer that ONNX gets."""

import pytest
import torch
from conftest import make_mfn, tokens
from torch.export import Dim

from modeling_mfn import Clamp

SETTINGS = [{}, {"codes": "update", "coding_rounds": 2, "refine_steps": 1}]


def batch(rows, length):
    """Makes a batch of which the first row is padded on the left."""
    ids = tokens(rows, length, seed=length)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.halved
@pytest.mark.parametrize("settings", SETTINGS, ids=["stream", "update"])
def test_an_exported_model_takes_batches_of_any_size(family_base, settings):
    """The program has the interventions in force when it was exported, and those alone."""
    model = make_mfn(family_base, layers=[1], **settings)
    sizes = {0: Dim("rows"), 1: Dim("tokens")}
    shapes = {"input_ids": sizes, "attention_mask": sizes, "use_cache": None}
    with torch.no_grad(), model.steer({(1, 5): Clamp(9.0)}):
        program = torch.export.export(model, (), batch(2, 9) | {"use_cache": False}, dynamic_shapes=shapes)
        wanted = {size: model(**batch(*size)).logits for size in ((1, 4), (3, 17), (5, 40))}
    exported = program.module()
    for size, logits in wanted.items():
        found = exported(**batch(*size), use_cache=False).logits
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=0)
        assert not torch.allclose(found, model(**batch(*size)).logits, atol=1e-2)


@pytest.mark.parametrize("settings", SETTINGS, ids=["stream", "update"])
def test_the_form_for_onnx_computes_the_same(family_base, settings, monkeypatch):
    model = make_mfn(family_base.double(), **settings)
    expected = model(**batch(2, 9)).logits
    used = []
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: used.append(True) or True)
    torch.testing.assert_close(model(**batch(2, 9)).logits, expected, atol=1e-10, rtol=0)
    assert used
