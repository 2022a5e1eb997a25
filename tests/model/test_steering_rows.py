"""Steering of rows and tokens, and under conditions, compared with hooks that edit the dense code."""

import pytest
import torch
from conftest import make_base, make_mfn, stream_before, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_like_the_base import ROWS, enable_checkpointing, padded
from test_steering import BY_HAND, active_feature
from torch._dynamo.testing import CompileCounter

from modeling_mfn import Ablate, Add, Clamp, Scale
from modeling_mfn.model.model_outputs import CACHE

CLOSE = {"atol": 1e-9, "rtol": 0}


@pytest.fixture
def model(family_base):
    return make_mfn(family_base.double(), layers=[0, 2])


def dense_code(layer, h):
    """Returns the dense z (B, T, m) of eq. 1, and the mean and std that standardisation took out."""
    std, mean = torch.std_mean(h, dim=-1, keepdim=True)
    pre = ((h - mean) / (std + 1e-5)) @ layer.encoder.weight.T + layer.encoder.bias
    kept = pre.topk(layer.config.k, dim=-1).indices
    return torch.zeros_like(pre).scatter(-1, kept, pre.gather(-1, kept).relu()), mean, std


class EditByHand:
    """Hooks that replace the output of MFN layers. `edits` maps a layer to a function {layer: encoded z} -> new z."""

    def __init__(self, model, edits):
        self.model, self.edits, self.encoded = model, edits, {}

    def __enter__(self):
        self.handles = [self.model.mfn_layers[layer].register_forward_hook(self.replace) for layer in self.edits]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def replace(self, layer, args, _):
        h, before = args[0], stream_before(layer, args)
        z, mean, std = dense_code(layer, h - before)
        self.encoded[layer.layer_index] = z
        z = self.edits[layer.layer_index](self.encoded)
        h_hat = (z @ layer.decoder.weight + layer.decoder.bias) * std + mean
        return layer.config.alpha * (before + h_hat) + (1 - layer.config.alpha) * h


def clamped_where(layer, feature, mask_of, values):
    """Returns an edit that sets `feature` to its row's value on masked tokens. Beams of a row share its value."""

    def edit(encoded):
        z = encoded[layer].clone()
        rows = torch.tensor(values, dtype=z.dtype).repeat_interleave(len(z) // len(values))
        z[..., feature] = torch.where(mask_of(*z.shape[:2]), rows[:, None], z[..., feature])
        return z

    return edit


def test_each_row_as_if_it_ran_alone(model):
    """Compares rows of unequal length in one call with each row alone, greedy and with beams.

    Each row has its own interventions.
    """
    batch, feature = padded(ROWS), active_feature(model, 0, padded(ROWS))
    rows = [{(0, feature): Clamp(4.0), "L2/3": Add(2.0)}, {(2, 3): Scale(-2.0), (2, 9): Clamp(5.0)}, {}]
    for search in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, **search}
        with model.steer(rows):
            together = model.generate(**batch, **arguments)[:, 9:]
        for place, (row, interventions) in enumerate(zip(ROWS, rows, strict=True)):
            with model.steer(interventions):
                alone = model.generate(row[None], **arguments)[:, len(row) :]
            each = len(together) // 3
            assert torch.equal(together[place * each : (place + 1) * each], alone)
    plain = model(**batch, output_codes=True)
    with model.steer(rows):
        steered = model(**batch, output_codes=True)
    assert torch.equal(steered.codes[0].values[2, :, : model.config.k], plain.codes[0].values[2])
    assert not steered.codes[0].values[2, :, model.config.k :].any()
    torch.testing.assert_close(steered.logits[2], plain.logits[2], **CLOSE)
    assert not torch.allclose(steered.logits[:2], plain.logits[:2])


@pytest.mark.parametrize("search", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("positions", ["prompt", "generated", "mask"])
def test_positions_hold_on_every_step_of_generation(model, positions, search):
    """Compares five ways to generate with an uncached reference, in which a hook edits the dense code of every forward.

    The ways: a dynamic cache, no cache, a static cache, a prefill in chunks, and a prompt given as embeddings.
    """
    batch, feature = padded(ROWS[:2]), 5
    wanted = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.5

    def mask_of(rows, length):
        column = torch.arange(length)
        if positions != "mask":
            return ((column < 9) if positions == "prompt" else (column >= 9)).expand(rows, length)
        beyond = torch.zeros(2, length, dtype=torch.bool)
        beyond[:, :9] = wanted
        return beyond.repeat_interleave(rows // 2, 0)

    arguments = {
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
        **search,
    }
    with EditByHand(model, {0: clamped_where(0, feature, mask_of, [6.0, -3.0])}):
        reference = model.generate(**batch, **arguments, use_cache=False)
    plain = model.generate(**batch, **arguments)
    with model.steer(
        [{(0, feature): Clamp(6.0)}, {(0, feature): Clamp(-3.0)}],
        positions=wanted if positions == "mask" else positions,
    ):
        for way in (
            {"use_cache": True},
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"prefill_chunk_size": 4},
            {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])},
        ):
            prompt = {k: v for k, v in batch.items() if k != "input_ids" or "inputs_embeds" not in way}
            ours = model.generate(**prompt, **arguments, **way)
            assert torch.equal(ours.sequences[:, -5:], reference.sequences[:, -5:]), way
            assert len(ours.logits) == 5
            for step, (given, expected) in enumerate(zip(ours.logits, reference.logits, strict=True)):
                torch.testing.assert_close(given, expected, **CLOSE, msg=lambda text, w=way, s=step: f"{w} {s}: {text}")
    # the first new token is predicted from the prompt alone
    assert torch.allclose(plain.logits[0], reference.logits[0]) == (positions == "generated")
    assert not torch.allclose(plain.logits[-1], reference.logits[-1])


def test_pieces_from_the_cache_equal_one_forward(model):
    """Every token counts as prompt outside `generate`, and a mask starts at the first token of the text."""
    batch, mask = tokens(2, 9), torch.arange(18).view(2, 9) % 3 == 0
    feature = active_feature(model, 0, batch)
    with EditByHand(model, {0: clamped_where(0, feature, lambda *_: mask, [3.0])}):
        expected = model(**batch).logits
    for positions, wanted in ((mask, expected), ("generated", model(**batch).logits), ("prompt", None)):
        with model.steer({(0, feature): Clamp(3.0)}, positions=positions):
            whole, cache, pieces = model(**batch).logits, None, []
            for piece in batch["input_ids"].split((4, 3, 1, 1), 1):
                out = model(piece, past_key_values=cache, use_cache=True)
                cache = out[CACHE]
                pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, **CLOSE)
        if wanted is None:
            with model.steer({(0, feature): Clamp(3.0)}):
                wanted = model(**batch).logits
        torch.testing.assert_close(whole, wanted, **CLOSE)


@pytest.mark.parametrize(("codes", "alpha"), [("stream", 1.0), ("stream", 0.5), ("update", 0.5)])
def test_conditions_equal_a_dense_transcription(family_base, codes, alpha):
    """Conditions on an earlier layer and on the same layer.

    A condition reads the encoder's activation before interventions on its layer. Interventions on earlier layers have
    changed the residual stream by then.
    """
    model = make_mfn(family_base.double(), layers=[0, 2], codes=codes, alpha=alpha)
    batch = tokens(2, 16)
    first, second = (active_feature(model, layer, batch) for layer in (0, 2))
    codes = model(**batch, output_codes=True).codes
    fired = codes[0].to_dense()[..., first]
    active = fired[fired > 0].sort().values
    third, fourth = [feature for feature in (7, 11, 13, 17) if feature not in (first, second)][:2]
    above = active[len(active) // 2 - 1 :][:2].mean().item()  # between two activations, against rounding
    interventions = {
        (0, first): Clamp(9.0),  # conditions on this feature still read its activation before the clamp
        (0, third): Add(2.0, when=(0, first)),
        (2, third): Clamp(3.0, when=(0, first), above=above),
        (2, second): Scale(-2.0, when=f"L2/{second}"),
        (2, fourth): Add(1.5, when=(2, second)),
    }

    def lower(encoded):
        z, on = encoded[0].clone(), encoded[0][..., first] > 0
        z[..., third] += 2.0 * on
        z[..., first] = 9.0
        return z

    def upper(encoded):
        z, on = encoded[2].clone(), encoded[2][..., second] > 0
        z[..., third][encoded[0][..., first] > above] = 3.0
        z[..., second][on] *= -2.0
        z[..., fourth][on] += 1.5
        return z

    with EditByHand(model, {0: lower, 2: upper}) as by_hand:
        expected = model(**batch).logits
    assert 0 < (by_hand.encoded[0][..., first] > above).sum() < (by_hand.encoded[0][..., first] > 0).sum() < 32
    with model.steer(interventions):
        out = model(**batch, output_codes=True)
    torch.testing.assert_close(out.logits, expected, **CLOSE)
    torch.testing.assert_close(out.codes[2].to_dense(), upper(by_hand.encoded), **CLOSE)
    with model.steer([{}, interventions], positions=torch.ones(1, 16, dtype=torch.bool)):
        rows = model(**batch).logits
    torch.testing.assert_close(rows, torch.stack([model(**batch).logits[0], expected[1]]), **CLOSE)


ONE = st.builds(
    lambda kind, number, when, above: kind(
        *([number] if kind is not Ablate else []),
        when=None if when is None else (0, when),
        above=above if when is not None else 0.0,
    ),
    st.sampled_from([Clamp, Add, Scale, Ablate]),
    st.floats(-3, 3, width=32),
    st.none() | st.integers(0, 5),
    st.floats(0, 2, width=32),
)
MAPPING = st.dictionaries(st.integers(0, 5), ONE, max_size=3)
CONTEXT = st.tuples(
    st.lists(MAPPING, min_size=2, max_size=2) | st.lists(MAPPING, min_size=1, max_size=1),
    st.just("all") | st.lists(st.booleans(), min_size=12, max_size=12),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contexts=st.lists(CONTEXT, min_size=1, max_size=3))
def test_nested_contexts_are_a_composition_of_functions(model, contexts):
    from contextlib import ExitStack

    batch = tokens(2, 6)
    with torch.no_grad(), ExitStack() as stack:
        model.set_k(60)  # so that most drawn features are active on some token
        before = model(**batch, output_codes=True).codes[0].to_dense()
        for rows, positions in contexts:
            mask = positions if positions == "all" else torch.tensor(positions).view(2, 6)
            stack.enter_context(model.steer([{(0, f): each for f, each in row.items()} for row in rows], mask))
        code = model(**batch, output_codes=True).codes[0]
    expected = before.clone()
    for rows, positions in contexts:
        for row in range(2):
            for token in range(6):
                if positions != "all" and not positions[6 * row + token]:
                    continue
                for feature, each in rows[row % len(rows)].items():
                    if each.when is None or before[row, token, int(each.when[3:])] > each.above:
                        number = vars(each).get("value", vars(each).get("factor"))
                        old = expected[row, token, feature]
                        new = torch.zeros_like(old) if number is None else BY_HAND[type(each)](old, number)
                        expected[row, token, feature] = new
    torch.testing.assert_close(code.to_dense(), expected, atol=1e-5, rtol=1e-5)
    live = [index for index, value in zip(code.indices[0, 0], code.values[0, 0], strict=True) if value]
    assert len(live) == len(set(map(int, live)))


def test_new_values_features_and_masks_compile_nothing_anew():
    model = make_mfn(make_base("llama-tied").double(), layers=[0, 2])
    batch = tokens(2, 6)
    first = active_feature(model, 0, batch)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for value in range(4):
            mask = torch.rand(2, 6, generator=torch.Generator().manual_seed(value)) < 0.5
            rows = [
                {(0, value): Clamp(value), (2, 5): Add(value, when=(0, first), above=value / 4)},
                {(2, 6): Ablate()},
            ]
            with model.steer(rows, positions=mask), model.steer({(2, 5): Scale(value)}, positions="prompt"):
                torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, **CLOSE)
            assert counter.frame_count == 1


def test_checkpointed_blocks_see_conditions_and_positions_when_they_run_again(model):
    batch, feature = tokens(2, 6), active_feature(model, 0, tokens(2, 6))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            enable_checkpointing(model, None)
        model.train().zero_grad()
        mask = torch.arange(6).expand(2, 6) > 1
        with model.steer({(0, feature): Clamp(5.0), (2, 5): Clamp(6.0, when=(0, feature))}, positions=mask):
            loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        gradients.append(model.mfn_layers[2].decoder.weight.grad.clone())
    assert gradients[0][5].norm() > 0
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "empty list"),
        (({(0, 1): Ablate(), "L0/1": Clamp(1.0)},), "L0/1 is given twice"),
        ((["calm", {}],), "'calm' is not a mapping"),
        (({(0, 1): Clamp(1.0, when=(2, 3))},), "L0/1 waits for a later layer"),
        (({(2, 1): Clamp(1.0, when=(1, 3))},), r"block 1 has no MFN layer.*\[0, 2\]"),
        (({(2, 1): Clamp(1.0, when="L0/80")},), "L0/80 does not exist"),
        (({}, "promt"), "'promt'; it must be all, prompt, generated"),
        (({}, torch.ones(2, 6)), r"torch.float32 tensor of shape \(2, 6\); a mask is boolean"),
        (({}, torch.ones(6, dtype=torch.bool)), r"shape \(6,\)"),
        (("calm",), "no preset 'calm'; this model has none"),
    ],
)
def test_what_cannot_be_steered(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.steer(*arguments)


def test_conditions_that_make_no_sense():
    for bad, message in (
        ({"when": "6/7"}, "'6/7' names no feature"),
        ({"when": 7}, "7 names no feature"),
        ({"above": 1.0}, "above is 1.0; .*belongs to a feature given as when"),
        ({"when": (0, 1), "above": -1.0}, "above is -1.0; it must be at least 0"),
        ({"when": (0, 1), "above": float("nan")}, "above of Clamp is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            Clamp(1.0, **bad)
    assert Clamp(4, when=(6, 7)) == Clamp(4.0, when="L6/7")


def test_a_batch_that_rows_do_not_fit(model):
    with (
        model.steer([{}, {(0, 1): Ablate()}]),
        pytest.raises(ValueError, match="3 rows cannot be shared by 2 mappings"),
    ):
        model(**tokens(3, 4))
    mask = torch.ones(2, 4, dtype=torch.bool)
    with model.steer({}, positions=mask), pytest.raises(ValueError, match="3 rows cannot be shared by 2 rows of a pos"):
        model(**tokens(3, 4))
