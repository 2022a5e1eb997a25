"""Behaviour that users expect of a causal LM of transformers: generation, inputs, outputs, checkpointing, compilation.

The model is in float64, so that rounding cannot change which features are active.
"""

import pytest
import torch
import transformers
from conftest import HIDDEN, enable_checkpointing, make_base, make_mfn, tokens

from modeling_mfn import MFNForCausalLM
from modeling_mfn.model.model_outputs import CACHE


@pytest.fixture(params=[{}, {"codes": "update", "coding_rounds": 2, "refine_steps": 1}], ids=["stream", "update"])
def model(request, family_base):
    return make_mfn(family_base.double(), layers=[0, 2], **request.param)


def padded(rows):
    """Makes a left-padded batch from rows of unequal length."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :], mask[place, width - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


ROWS = [tokens(1, length, seed=length)["input_ids"][0] for length in (4, 9, 6)]


def test_generation_with_the_cache_equals_generation_without(model):
    batch = padded(ROWS)
    with_cache = model.generate(**batch, max_new_tokens=12, do_sample=False, use_cache=True)
    without = model.generate(**batch, max_new_tokens=12, do_sample=False, use_cache=False)
    static = model.generate(**batch, max_new_tokens=12, do_sample=False, cache_implementation="static")
    assert torch.equal(with_cache, without)
    assert torch.equal(static, without)


def test_a_left_padded_batch_equals_its_rows_piece_by_piece_from_the_cache(model):
    """Compares prefill, a chunk and single tokens from the cache with each row alone, without a cache."""
    batch = padded(ROWS)
    mask, cache, pieces, start = batch["attention_mask"], None, [], 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for size in (4, 3, 1, 1):
        piece = slice(start, start + size)
        out = model(
            input_ids=batch["input_ids"][:, piece],
            attention_mask=mask[:, : piece.stop],
            position_ids=positions[:, piece],
            past_key_values=cache,
            use_cache=True,
        )
        cache, start = out[CACHE], piece.stop
        pieces.append(out.logits)
    logits = torch.cat(pieces, 1)
    for place, row in enumerate(ROWS):
        alone = model(input_ids=row[None]).logits[0]
        torch.testing.assert_close(logits[place, -len(row) :], alone, atol=1e-9, rtol=0)


def test_either_name_of_the_cache_goes_on_from_it(model):
    ids, settings = tokens(1, 9)["input_ids"], {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **settings)
    for name in ("cache", "past_key_values"):
        cache = model(ids[:, :5], use_cache=True)[CACHE]
        assert torch.equal(model.generate(ids, **settings, **{name: cache}), expected)
        cache = model(ids[:, :5], use_cache=True)[CACHE]
        pieces = model(ids[:, 5:], **{name: cache}).logits
        torch.testing.assert_close(pieces, model(ids).logits[:, 5:], atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, cache=cache, past_key_values=model(ids, use_cache=True)[CACHE])


@pytest.mark.halved
def test_beam_search_and_seeded_sampling(model):
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "do_sample": False}
    beams = model.generate(**padded(ROWS), **settings)
    assert torch.equal(beams, model.generate(**padded(ROWS), **settings, use_cache=False))
    for place, row in enumerate(ROWS):
        alone = model.generate(input_ids=row[None], attention_mask=torch.ones_like(row)[None], **settings)
        assert torch.equal(beams[2 * place : 2 * place + 2, -6:], alone[:, -6:])
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model.generate(**padded(ROWS), do_sample=True, max_new_tokens=10))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_inputs_and_outputs(model):
    batch = tokens(2, 9)
    out = model(**batch, output_hidden_states=True, output_codes=True)
    assert [state.shape for state in out.hidden_states] == [(2, 9, HIDDEN)] * 4
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    assert {layer: code.indices.shape for layer, code in out.codes.items()} == {0: (2, 9, 8), 2: (2, 9, 8)}
    for keep in (1, 3, torch.tensor([0, 5])):
        kept = model(**batch, logits_to_keep=keep).logits
        expected = out.logits[:, -keep:] if isinstance(keep, int) else out.logits[:, keep]
        torch.testing.assert_close(kept, expected, atol=1e-10, rtol=0)
    embedded = model(inputs_embeds=model.get_input_embeddings()(batch["input_ids"])).logits
    assert torch.equal(embedded, out.logits)
    far_apart = 3 * torch.arange(9)[None]
    stretched = model(**batch, position_ids=far_apart.expand(2, 9)).logits
    assert not torch.allclose(stretched[:, 1:], out.logits[:, 1:], atol=1e-3)
    first_row = model(input_ids=batch["input_ids"][:1], position_ids=far_apart).logits
    torch.testing.assert_close(stretched[:1], first_row, atol=1e-10, rtol=0)
    as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], out.logits)


def test_attentions_are_those_of_the_base_at_alpha_0(family_base):
    family_base.set_attn_implementation("eager")
    model = make_mfn(family_base, alpha=0.0)
    ours, theirs = (m(**tokens(2, 7), output_attentions=True).attentions for m in (model, family_base))
    assert len(ours) == len(theirs) == 3
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(model, reentrant):
    batch = tokens(2, 9)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for attention in (module for module in model.modules() if hasattr(module, "attention_dropout")):
        attention.attention_dropout = 0.0
    model(**batch, labels=batch["input_ids"]).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    enable_checkpointing(model, {"use_reentrant": reentrant})
    if reentrant and model.config.codes == "update":  # the first run of a block has no gradients
        with pytest.raises(ValueError, match="use_reentrant"):
            model(**batch)
        return
    assert all(module.gradient_checkpointing for module in model.model.backbone.modules() if hasattr(module, "mfn"))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-10, rtol=0)


def test_codes_under_gradient_checkpointing(model):
    """Compares gradients of codes and reconstructions with and without checkpointing.

    Reentrant checkpointing would lose these gradients, so codes are refused.
    """
    batch = tokens(2, 9)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradients():
        model.zero_grad()
        out = model(**batch, output_codes=True, output_reconstructions=True)
        code, found = out.codes[2], out.reconstructions[2]
        (code.values.square().sum() + found.reconstructed.square().sum()).backward()
        assert out.codes[2] is code
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    enable_checkpointing(model, {"use_reentrant": False})
    ours = gradients()
    assert ours.keys() == expected.keys()
    assert any("layers.0" in name or "h.0" in name for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-10, rtol=0)
    enable_checkpointing(model, {"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        gradients()
    if model.config.codes == "stream":
        model(**batch, labels=batch["input_ids"]).loss.backward()


def test_resizing_the_vocabulary(base):
    model, batch = make_mfn(base), tokens(2, 9)
    before = model(**batch).logits
    model.resize_token_embeddings(110, mean_resizing=False)
    after = model(**batch).logits
    assert after.shape[-1] == model.config.vocab_size == model.config.text_config.vocab_size == 110
    torch.testing.assert_close(after[..., :96], before, atol=1e-5, rtol=0)  # wider products round differently
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == base.config.tie_word_embeddings


@pytest.mark.halved
def test_compiled_in_one_graph(model):
    batch = tokens(2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for alpha in (0.0, 0.25, 1.0):
            model.set_blend(alpha)
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, atol=1e-10, rtol=0)
        traced = torch.compile(model, fullgraph=True, backend="aot_eager")  # which takes most of the time
        ours, plain = (m(**batch, output_codes=True) for m in (traced, model))
        torch.testing.assert_close(ours.logits, plain.logits, atol=1e-10, rtol=0)
        torch.testing.assert_close(ours.codes[2].to_dense(), plain.codes[2].to_dense(), atol=1e-10, rtol=0)


@pytest.mark.halved
def test_training_step_compiled_in_one_graph(model):
    batch = tokens(2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for forward in (compiled, model):
        model.zero_grad()
        forward(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-9, rtol=0)


def test_set_blend_and_set_k_are_one_truth_with_the_config(model, tmp_path):
    batch = tokens(2, 9)
    model.set_blend(0.3)
    model.set_k(5)
    assert (model.config.alpha, model.config.k) == (0.3, 5)
    assert model(**batch, output_codes=True).codes[0].indices.shape[-1] == 5
    model.save_pretrained(tmp_path)
    loaded = MFNForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    for alpha in (-0.1, 1.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"alpha is {alpha}"):
            model.set_blend(alpha)
    for k in (0, 81, 2.5):
        with pytest.raises(ValueError, match=f"k is {k}"):
            model.set_k(k)
    assert (model.config.alpha, model.config.k) == (0.3, 5)


def test_assisted_generation_gives_the_tokens_of_greedy_search(model, family_base):
    """The MFN model is checked with its base as the assistant, and the other way round."""
    prompt = tokens(1, 5)["input_ids"]
    for target, assistant in ((model, family_base), (family_base, model)):
        greedy = target.generate(prompt, max_new_tokens=12, do_sample=False)
        assisted = target.generate(prompt, max_new_tokens=12, do_sample=False, assistant_model=assistant)
        assert torch.equal(assisted, greedy)


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "Seq2SeqLM", "MaskedLM"])
def test_heads_of_other_tasks_are_refused(task, tmp_path):
    make_mfn(make_base("llama-tied")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"MFNConfig.* for this kind of AutoModel: AutoModelFor{task}"):
        getattr(transformers, f"AutoModelFor{task}").from_pretrained(tmp_path)
