"""The engine of steering, piece by piece: ranges, and mappings that rows share."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_base, make_mfn, tokens

from modeling_mfn import Clamp, Scale
from modeling_mfn.model.sparse_code import SparseCode
from modeling_mfn.model.steering import CodeEdit, activations, check_range, edits_in_force, generating


@pytest.mark.parametrize(
    ("dtype", "most"),
    [
        (torch.float16, 65504.0),
        (torch.bfloat16, math.sqrt(torch.finfo(torch.float32).max)),
        (torch.float64, math.sqrt(torch.finfo(torch.float32).max)),
    ],
    ids=str,
)
def test_the_largest_number_of_an_intervention(dtype, most):
    above = math.nextafter(most, math.inf)
    for number in (most, -most):
        check_range((1, 3), Clamp(number), dtype)
    check_range((1, 3), Clamp(1.0, when="L0/2", above=most), dtype)
    for intervention in (Clamp(-above), Scale(above), Clamp(1.0, when="L0/2", above=above)):
        with pytest.raises(ValueError, match=f"on L1/3: .* is too large for a model in {str(dtype)[6:]}; .* at most"):
            check_range((1, 3), intervention, dtype)


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4), (2, 1, 3, 4)], ids=str)
def test_an_edit_of_codes_of_every_shape(shape):
    """Compares with an edit of the dense code. The second feature is left alone."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(*shape[:-1], 9, generator=generator).argsort(-1)[..., :4]
    code = SparseCode(indices, torch.rand(*shape, generator=generator), 9)
    features, scale, shift = torch.tensor([2, 7, 0]), torch.tensor([2.0, 1.0, 1.0]), torch.tensor([0.5, 0.0, 3.0])
    dense = code.to_dense()
    torch.testing.assert_close(activations(code, features), dense[..., features])
    edited = CodeEdit(features, scale, shift).apply(code)
    dense[..., features] = dense[..., features] * scale + shift
    torch.testing.assert_close(edited.to_dense(), dense)
    alone = (code.indices == 7).nonzero(as_tuple=True)
    assert torch.equal(edited.values[..., :4][alone], code.values[alone])
    assert not edited.values[..., 5].any()


def test_mappings_are_shared_by_neighbouring_rows():
    model, batch = make_mfn(make_base("llama-tied"), layers=[1]), tokens(4, 5)
    with model.steer([{"L1/3": Clamp(5.0)}, {"L1/3": Clamp(7.0)}]), torch.no_grad():
        code = model(**batch, output_codes=True).codes[1]
        with pytest.raises(ValueError, match="a batch of 3 rows cannot be shared by 2 mappings"):
            model(**tokens(3, 5))
    assert (code.to_dense()[..., 3] == torch.tensor([5.0, 5.0, 7.0, 7.0])[:, None]).all()


def test_compiled_code_asks_whether_another_thread_steers(monkeypatch):
    model, ids = make_mfn(make_base("llama-tied"), layers=[1]).base_model, tokens(2, 5)["input_ids"]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(edits_in_force, model, ids, None).result() == {}
        with model.steer({"L1/3": Clamp(5.0)}):
            assert list(edits_in_force(model, ids, None)) == [1]
            with pytest.raises(ValueError, match="steered in another thread"):
                other.submit(edits_in_force, model, ids, None).result()


def test_a_model_without_memory_is_steered_where_codes_are():
    """Weights that accelerate keeps on disk are on the meta device between forwards."""
    model = make_mfn(make_base("llama-tied"), layers=[1]).to("meta")
    with model.steer({"L1/3": Clamp(5.0)}):
        (edit,) = edits_in_force(model.base_model, tokens(2, 5)["input_ids"], None).values()
    assert edit.plan.features.tolist() == [3]


def test_ids_and_embeddings_have_the_same_places():
    model, ids = make_mfn(make_base("llama-tied"), layers=[1]), tokens(2, 5)["input_ids"]
    mask = torch.rand(2, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    for positions, expected in ((mask, mask), ("prompt", torch.ones(1, 5)), ("generated", torch.zeros(1, 5))):
        with model.steer({"L1/3": Clamp(5.0)}, positions=positions):
            for inputs in (ids, model.get_input_embeddings()(ids)):
                (chosen,) = edits_in_force(model.base_model, inputs, None)[1].tokens
                assert torch.equal(chosen, expected.bool())


def test_a_mask_begins_with_the_prompt_of_generate():
    """Text of two tokens is in the cache, three are the prompt, and one is generated."""
    model, ids = make_mfn(make_base("llama-tied"), layers=[1]), tokens(1, 6)["input_ids"]
    with (
        model.steer({"L1/3": Clamp(5.0)}, positions=torch.tensor([[True, False, True]])),
        generating(model.base_model, ids[:, 2:5], torch.ones(1, 5)),
    ):
        (chosen,) = edits_in_force(model.base_model, ids, None)[1].tokens
    assert chosen.tolist() == [[False, False, True, False, True, False]]


@pytest.mark.parametrize("positions", ["prompt", "generated"])
def test_generation_without_a_prompt_starts_from_one_token(positions):
    model = make_mfn(make_base("llama-tied"), layers=[1])
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    bos = torch.tensor([[model.config.text_config.bos_token_id]])
    plain = torch.stack(model.generate(bos, **options).logits)
    with model.steer({"L1/3": Clamp(9.0)}, positions=positions):
        own, given = (torch.stack(model.generate(*start, **options).logits) for start in ((), (bos,)))
    assert torch.equal(own, given)
    assert torch.equal(own[0], plain[0]) == (positions == "generated")
