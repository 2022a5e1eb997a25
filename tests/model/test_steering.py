"""Interventions: their effect on a code, the forwards they act on, and their complete removal afterwards."""

import threading

import pytest
import torch
from conftest import enable_checkpointing, make_mfn, stream_before, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.logging import warning_once

from modeling_mfn import Ablate, Add, Clamp, MFNForCausalLM, Scale
from modeling_mfn.model.model_outputs import CACHE
from modeling_mfn.model.sparse_code import encode
from modeling_mfn.model.steering import CodeEdit

BY_HAND = {
    Clamp: lambda z, value: torch.full_like(z, value),
    Add: lambda z, value: z + value,
    Scale: lambda z, value: z * value,
}


@pytest.fixture
def model(family_base):
    return make_mfn(family_base.double(), layers=[0, 2])


def active_feature(model, layer, batch):
    """Returns the feature whose firing rate is closest to one half."""
    fired = model(**batch, output_codes=True).codes[layer].to_dense().flatten(0, -2).gt(0).float().mean(0)
    return ((fired - 0.5).abs()).argmin().item()


def steered_by_hand(model, batch, layer, edit):
    """Returns the logits of a model in which a hook edits one layer's dense code between encoding and decoding."""
    mfn = model.mfn_layers[layer]

    def replace(module, args, _):
        h, before = args[0], stream_before(module, args)
        x, mean, std = module.standardise(h - before)
        z = edit(encode(x, module.encoder.weight, module.encoder.bias, model.config.k).to_dense())
        h_hat = (z @ module.decoder.weight + module.decoder.bias) * std + mean
        return torch.lerp(h, before + h_hat, model.config.alpha)

    handle = mfn.register_forward_hook(replace)
    logits = model(**batch).logits
    handle.remove()
    return logits


@pytest.mark.parametrize("intervention", [Clamp(2.5), Clamp(-1.0), Add(1.5), Scale(0.5), Scale(0.0), Ablate()])
@pytest.mark.parametrize(("codes", "alpha"), [("stream", 1.0), ("stream", 0.5), ("update", 1.0), ("update", 0.5)])
def test_interventions_equal_an_edit_of_the_dense_code(family_base, codes, alpha, intervention):
    model = make_mfn(family_base.double(), layers=[0, 2], codes=codes, alpha=alpha)
    batch = tokens(2, 9)
    feature = active_feature(model, 0, batch)
    value = vars(intervention).get("value", vars(intervention).get("factor"))

    def edit(z):
        z = z.clone()
        z[..., feature] = BY_HAND[type(intervention)](z[..., feature], value) if value is not None else 0
        return z

    plain = model(**batch, output_codes=True)
    with model.steer({(0, feature): intervention}):
        steered = model(**batch, output_codes=True)
    torch.testing.assert_close(steered.logits, steered_by_hand(model, batch, 0, edit), atol=1e-9, rtol=0)
    torch.testing.assert_close(steered.codes[0].to_dense(), edit(plain.codes[0].to_dense()), atol=1e-9, rtol=0)
    assert steered.codes[0].indices.shape[-1] == model.config.k + 1
    assert not torch.allclose(steered.logits, plain.logits)
    assert torch.equal(model(**batch).logits, plain.logits)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_edits_of_several_features_equal_dense_ones(data):
    features = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=5, unique=True))
    numbers = st.floats(-3, 3, width=32)
    scale = data.draw(st.lists(numbers, min_size=len(features), max_size=len(features)))
    shift = data.draw(st.lists(numbers, min_size=len(features), max_size=len(features)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    x, weight = torch.randn(5, 4, generator=generator), torch.randn(12, 4, generator=generator)
    code = encode(x, weight, torch.zeros(12), 6)
    expected = code.to_dense()
    for feature, a, b in zip(features, scale, shift, strict=True):
        expected[:, feature] = a * expected[:, feature] + b
    edited = CodeEdit(torch.tensor(features), torch.tensor(scale), torch.tensor(shift)).apply(code)
    torch.testing.assert_close(edited.to_dense(), expected, atol=1e-6, rtol=0)


def test_steering_holds_on_every_step_of_generation_with_the_cache(model):
    batch = tokens(2, 6)
    seen = []
    handle = model.mfn_layers[2].register_forward_hook(
        lambda module, args, out: seen.append((args[0].shape[1], out.detach()))
    )
    changes = {(0, 5): Clamp(6.0), "L2/7": Add(3.0)}
    with model.steer(changes):
        steered = model.generate(**batch, max_new_tokens=6, do_sample=False)
        widths, with_cache = [width for width, _ in seen], [out[:, -1] for _, out in seen]
        seen.clear()
        assert torch.equal(steered, model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=False))
        without = [out[:, -1] for _, out in seen]
    handle.remove()
    assert widths == [6, 1, 1, 1, 1, 1]
    for ours, reference in zip(with_cache, without, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-9, rtol=0)
    assert not torch.equal(steered, model.generate(**batch, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("form", ["new tokens", "whole text"])
@pytest.mark.parametrize("positions", ["prompt", "generated", "mask"])
def test_generation_that_goes_on_from_a_cache(model, form, positions):
    """Compares with one forward of the whole text, in which a mask names the steered tokens."""
    batch, old, changes = padded_rows(), 5, {(0, 5): Clamp(6.0)}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    given = ids if form == "whole text" else ids[:, old:]
    wanted = torch.arange(given.shape[1]) % 3 == 0
    cache = model(ids[:, :old], mask[:, :old], position_ids=mask.cumsum(-1).sub(1).clamp_min(0)[:, :old])[CACHE]
    with model.steer(changes, positions=wanted[None] if positions == "mask" else positions):
        out = model.generate(
            given,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    text = torch.cat([ids, out.sequences[:, -4:]], -1)
    place, prompt = torch.arange(text.shape[1]), ids.shape[1]
    steered = {"prompt": (place >= old) & (place < prompt), "generated": place >= prompt}.get(positions)
    if steered is None:
        steered = torch.zeros(text.shape[1], dtype=torch.bool)
        steered[prompt - len(wanted) : prompt] = wanted
        steered[:old] = False  # these came from the cache
    whole = torch.cat([mask, torch.ones(2, 4, dtype=mask.dtype)], -1)
    with model.steer(changes, positions=steered[None]):
        expected = model(text, whole, position_ids=whole.cumsum(-1).sub(1).clamp_min(0)).logits[:, prompt - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected.float(), atol=1e-5, rtol=0)


def padded_rows():
    ids = tokens(2, 9)["input_ids"]
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def test_generate_refuses_what_it_has_no_place_for(model):
    for name in ("output_codes", "output_reconstructions"):
        with pytest.raises(ValueError, match=f"{name} asks for; call model"):
            model.generate(**tokens(2, 6), max_new_tokens=2, **{name: True})
        model.generate(**tokens(2, 6), max_new_tokens=1, **{name: False})


def test_contexts_nest_and_an_exception_leaves_nothing_behind(model):
    batch = tokens(2, 6)
    feature = active_feature(model, 0, batch)
    plain = model(**batch, output_codes=True).codes[0].to_dense()[..., feature]

    def activation():
        return model(**batch, output_codes=True).codes[0].to_dense()[..., feature]

    with model.steer({(0, feature): Add(2.0)}):
        with model.steer({(0, feature): Scale(3.0), (2, 1): Ablate()}):
            torch.testing.assert_close(activation(), 3 * (plain + 2))
        torch.testing.assert_close(activation(), plain + 2)
        with pytest.raises(RuntimeError, match="on purpose"), model.steer({(0, feature): Ablate()}):
            raise RuntimeError("on purpose")
        torch.testing.assert_close(activation(), plain + 2)
    assert torch.equal(activation(), plain)


def test_two_threads_steer_one_model_differently_at_once(model):
    batch, barrier, results, failures = tokens(2, 6), threading.Barrier(2), {}, []
    other = make_mfn(model_base_like(model), seed=5)

    def work(value):
        try:
            with model.steer({(0, 3): Clamp(value)}):
                for _ in range(5):
                    barrier.wait(timeout=30)
                    out = model(**batch, output_codes=True)
                    assert (out.codes[0].to_dense()[..., 3] == value).all()
                    assert other(**batch, output_codes=True).codes[0].indices.shape[-1] == other.config.k
                    results.setdefault(value, []).append(out.logits)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(value,)) for value in (1.0, 9.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for value, logits in results.items():
        with model.steer({(0, 3): Clamp(value)}):
            assert all(torch.equal(each, model(**batch).logits) for each in logits)
    assert not torch.equal(results[1.0][0], results[9.0][0])


def model_base_like(model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(model.config.text_config).double().eval()


def test_steering_reaches_gradients_and_checkpointed_blocks_after_the_context_is_left(model):
    batch = tokens(2, 6)
    model.eval()

    def gradient(checkpointed):
        model.zero_grad()
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = checkpointed
        with model.steer({(0, 5): Clamp(6.0)}):
            loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        return model.mfn_layers[0].decoder.weight.grad[5].clone()

    enable_checkpointing(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    plain, recomputed = gradient(False), gradient(True)
    assert plain.norm() > 0
    torch.testing.assert_close(recomputed, plain, atol=1e-10, rtol=0)


@pytest.mark.halved
def test_compiled_models_are_steered_too(model):
    batch = tokens(2, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for value in (2.0, 5.0):
            with model.steer({(0, 5): Clamp(value)}):
                torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, atol=1e-10, rtol=0)
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ((1, 0), r"block 1 has no MFN layer.*\[0, 2\]"),
        ((7, 0), "block 7 has no MFN layer"),
        ((0, 80), "L0/80 does not exist; features are 0 to 79"),
        ((0, -1), "L0/-1 does not exist"),
        ("L2/80", "L2/80 does not exist"),
        ("2/8", "'2/8' names no feature"),
    ],
)
def test_a_feature_that_is_not_there(model, feature, message):
    with pytest.raises(ValueError, match=message):
        model.steer({feature: Ablate()})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [Clamp, Add, Scale])
def test_a_number_that_is_not_finite(kind, number):
    with pytest.raises(ValueError, match=f"(value|factor) of {kind.__name__} is {number}; it must be a finite number"):
        kind(number)


def test_something_that_is_no_intervention(model):
    with pytest.raises(ValueError, match=r"4\.0 is not an intervention"):
        model.steer({(0, 1): 4.0})


def test_a_context_is_entered_once_and_decorates_every_call(model):
    batch = tokens(2, 5)
    context = model.steer({(0, 5): Clamp(4.0)})
    with context:
        steered = model(**batch).logits
        with pytest.raises(ValueError, match=r"this context was entered before; call model\.steer"), context:
            pass
    with pytest.raises(ValueError, match="this context was entered before"), context:
        pass
    decorated = model.steer({(0, 5): Clamp(4.0)})(lambda: model(**batch).logits)
    assert torch.equal(decorated(), steered)
    assert torch.equal(decorated(), steered)
    assert not torch.equal(model(**batch).logits, steered)


def test_steering_without_effect_or_meaning_is_warned_of(family_base, caplog):
    for fresh, alpha in ((False, 1.0), (False, 0.0), (True, 1.0)):
        model = MFNForCausalLM.from_base(family_base, num_features=80, k=8) if fresh else make_mfn(family_base)
        model.set_blend(alpha)
        warning_once.cache_clear()
        caplog.clear()
        model.steer({(1, 5): Clamp(4.0)})
        assert ("alpha is 0" in caplog.text) == (alpha == 0)
        assert ("block 1 was never calibrated or trained" in caplog.text) == fresh
