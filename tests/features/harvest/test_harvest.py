"""Harvests compared with brute force on dense codes."""

import numpy as np
import pytest
import torch
from atlas_data import WINDOW, windows, word_tokenizer
from conftest import make_mfn

from modeling_mfn import Clamp, FeatureAtlas, label_features
from modeling_mfn.features.atlas import ExampleLimits
from modeling_mfn.features.atlas.schema import HISTOGRAM_EDGES
from modeling_mfn.features.harvest import coactivation
from modeling_mfn.features.harvest.coactivation import count_pairs, empty_table, pair_counts
from modeling_mfn.features.harvest.example_pool import best_of_each, random_score, ranking_key
from modeling_mfn.features.harvest.firings import Firings

LIMITS = ExampleLimits(top=3, stratum=2, before=4, after=2)
BATCH = 4


def dense_codes(model, data, layer):
    """Dense codes (rows, T, m) in float64, 0 on tokens that do not count, and the mask (rows, T) of tokens that do."""
    codes = []
    for start in range(0, len(data), BATCH):
        rows = data[start : start + BATCH]
        mask = torch.tensor(rows["attention_mask"])
        inputs = {"input_ids": torch.tensor(rows["input_ids"])}
        if not mask.all():
            places = np.maximum(np.cumsum(rows["attention_mask"], 1) - 1, 0)
            inputs |= {"attention_mask": mask, "position_ids": torch.tensor(places)}
        codes.append(model(**inputs, output_codes=True).codes[layer].to_dense().detach())
    mask = np.array(data["attention_mask"]).astype(bool)
    first = mask.argmax(1)
    mask[np.arange(len(mask)), first] = False
    return torch.cat(codes).double().numpy() * mask[..., None], mask


def build(model, data, **options):
    options = {"batch_size": BATCH, "examples": LIMITS, "progress": False} | options
    return FeatureAtlas.build(model, word_tokenizer(), data, **options)


def test_figures_are_those_of_dense_codes(family_base):
    model, data = make_mfn(family_base, layers=[0, 2]), windows()
    atlas = build(model, data)
    frame = atlas.to_pandas()
    for layer in (0, 2):
        z, counted = dense_codes(model, data, layer)
        rows = frame[frame["layer"] == layer]
        active = z > 0
        counts = active.sum((0, 1))
        assert 0 < (counts == 0).sum() < 80  # some features are dead, some are not
        assert rows["firing_count"].tolist() == counts.tolist()
        assert rows["status"].tolist() == ["alive" if count else "dead" for count in counts]
        np.testing.assert_allclose(rows["firing_rate"], counts / counted.sum(), rtol=1e-12)
        alive = counts > 0
        means = z.sum((0, 1))[alive] / counts[alive]
        np.testing.assert_allclose(rows["mean_activation"][alive], means, atol=1e-7, rtol=0)
        assert rows["max_activation"][alive].tolist() == z.max((0, 1))[alive].tolist()
        assert rows["mean_activation"][~alive].isna().all()
        assert rows["max_activation"][~alive].isna().all()
        for feature, histogram in enumerate(rows["histogram"]):
            edges = [-np.inf, *HISTOGRAM_EDGES.astype(float), np.inf]
            expected = np.histogram(z[..., feature][active[..., feature]], edges)[0]
            assert histogram.tolist() == expected.tolist()
        sources = np.array(data["source"])
        assert [source["name"] for source in atlas.metadata["data"]["sources"]] == ["alpha", "beta"]
        by_source = np.stack([active[sources == name].sum((0, 1)) for name in ("alpha", "beta")], 1)
        assert np.stack(rows["source_counts"].tolist()).tolist() == by_source.tolist()
        figures = atlas.metadata["layers"][str(layer)]
        assert figures["dead_share"] == (counts == 0).mean()
        assert figures["firing_rate_std"] == pytest.approx(torch.tensor(counts / counted.sum()).std().item())
    assert atlas.metadata["data"]["tokens"] == counted.sum()
    assert atlas.metadata["data"]["windows"] == len(data)


def test_examples_are_those_of_dense_codes(family_base):
    model, data = make_mfn(family_base, layers=[1]), windows()
    atlas = build(model, data)
    z, _ = dense_codes(model, data, 1)
    ids, mask = np.array(data["input_ids"]), np.array(data["attention_mask"])
    seen_strata = set()
    for feature in range(80):
        values = z[..., feature]
        peaks = sorted(((values[row].max(), -row, values[row].argmax()) for row in range(len(z))), reverse=True)
        expected = [(value, -row, place) for value, row, place in peaks if value > 0][: LIMITS.top]
        examples = atlas[1, feature].examples
        top = [example for example in examples if example.kind == "top"]
        assert [(example.activation, example.window, example.position) for example in top] == expected
        assert [example.rank for example in top] == list(range(len(top)))

        strata = [example for example in examples if example.kind == "stratum"]
        octaves = {}
        for value in values[values > 0]:
            octaves.setdefault(2.0 ** np.floor(np.log2(value)), []).append(value)
        assert {example.stratum for example in strata} == set(octaves)
        for octave, inside in octaves.items():
            chosen = [example for example in strata if example.stratum == octave]
            assert len(chosen) == min(LIMITS.stratum, len(inside))
            assert len({(example.window, example.position) for example in chosen}) == len(chosen)
        seen_strata |= set(octaves)

        for example in examples:
            row, place = example.window, example.position
            around = [at for at in range(place - 4, place + 3) if 0 <= at < WINDOW and mask[row, at]]
            assert example.activation == values[row, place] > 0
            assert example.token_ids == ids[row, around].tolist()
            assert example.tokens == [f"w{token}" for token in example.token_ids]
            assert example.activations == values[row, around].tolist()
            assert around[example.offset] == place
            assert example.source == data["source"][row]
    assert len(seen_strata) > 2
    assert (atlas.to_pandas("examples")["kind"] == "stratum").sum() > 80


def test_random_examples_are_uniform():
    """Each of 2,000 tokens on which a feature fires is equally likely to be kept."""
    numbers = np.arange(2000)
    kept = []
    for feature in range(500):
        scores = random_score(np.full(2000, feature), numbers)
        kept.extend(numbers[best_of_each(np.zeros(2000, int), ranking_key(scores, numbers), 4)])
    tenths = np.bincount(np.array(kept) // 200, minlength=10)
    chi_square = ((tenths - 200) ** 2 / 200).sum()
    assert chi_square < 21.7  # the 99 % quantile at 9 degrees of freedom
    assert len(set(kept)) > 1200  # 2,000 draws from 2,000 hit 1,264 of them


@pytest.mark.parametrize("width", [2048, 24], ids=["exact", "sketch"])
def test_co_active_features_are_those_of_dense_codes(family_base, monkeypatch, width):
    """Counts are exact if a layer has as many counters as features.

    Otherwise counts are never too small, and on average too large by less than min(n_i, n_j) K / width.
    """
    monkeypatch.setattr(coactivation, "WIDTH", width)
    monkeypatch.setattr(coactivation, "PAIRS_AT_ONCE", 40)
    model, data = make_mfn(family_base, layers=[1]), windows(24)
    atlas = build(model, data)
    active = (dense_codes(model, data, 1)[0] > 0).reshape(-1, 80).astype(int)
    together = active.T @ active
    counts = together.diagonal().copy()
    np.fill_diagonal(together, 0)
    union = counts[:, None] + counts - together
    for feature in range(80):
        found = atlas[1, feature].co_active
        order = sorted((together[feature] / np.maximum(union[feature], 1)).tolist(), reverse=True)
        if width == 2048:
            assert [partner["jaccard"] for partner in found] == pytest.approx([s for s in order[:8] if s], rel=1e-6)
        for partner in found:
            true = together[feature, partner["index"]]
            exact = width == 2048 or true == partner["count"]
            assert partner["count"] >= true
            assert partner["count"] <= min(counts[feature], counts[partner["index"]])
            if exact:
                assert partner["jaccard"] == pytest.approx(true / union[feature, partner["index"]], rel=1e-6)
    indices = np.argsort(-active, axis=1, kind="stable")[:, :8]
    values = np.take_along_axis(active, indices, 1).astype(np.float32)
    table = empty_table(80)
    count_pairs(table, Firings.of(indices, values, np.ones(len(active), bool)), indices, values)
    estimate = np.concatenate(list(pair_counts(table, counts, rows=33)))
    excess = estimate - together
    assert excess.min() >= 0
    smaller = np.minimum(counts[:, None], counts)
    assert excess.sum() < (0.5 if width == 2048 else smaller.sum() * 8 / width)


@pytest.mark.parametrize("codes", ["stream", "update"])
def test_directions(family_base, codes):
    """Neighbours equal cosines in float64; effects equal changes of logits with the final norm's denominator fixed."""
    model, data = make_mfn(family_base, layers=[1], codes=codes), windows(8, padded=False)
    with torch.no_grad():  # weights that differ, as in a trained model
        norm = model.model.backbone.norm if hasattr(model.model.backbone, "norm") else model.model.backbone.ln_f
        norm.weight.copy_(torch.rand_like(norm.weight) + 0.5)
    atlas = build(model, data)
    inputs = {"input_ids": torch.tensor(data["input_ids"])}
    seen = []
    hook = norm.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()))
    residual = model(**inputs, output_reconstructions=True).reconstructions[1].residual.detach()[:, 1:].double()
    hook.remove()
    h = seen[0][:, 1:].double()
    centred = h - h.mean(-1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else h
    divisor = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    weight, head = norm.weight.detach().double(), model.lm_head.weight.detach().double()
    directions = model.mfn_layers[1].decoder.weight.detach().double()
    cosine = torch.nn.functional.normalize(directions, dim=-1)
    cosine = (cosine @ cosine.T).fill_diagonal_(-2)
    for feature in (0, 17, 79):
        added = directions[feature] * residual.std(-1, keepdim=True)
        moved = added - added.mean(-1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else added
        effect = (moved / divisor * weight @ head.T).mean((0, 1))
        record = atlas[1, feature]
        for listed, sign in ((record.promoted, 1), (record.suppressed, -1)):
            best = (sign * effect).topk(10)
            assert [entry["token_id"] for entry in listed] == best.indices.tolist()
            assert [entry["effect"] for entry in listed] == pytest.approx((sign * best.values).tolist(), rel=1e-4)
            assert [entry["token"] for entry in listed] == [f"w{token}" for token in best.indices.tolist()]
        assert [near["index"] for near in record.nearest] == cosine[feature].topk(8).indices.tolist()
        assert record.nearest[0]["cosine"] == pytest.approx(cosine[feature].max().item(), abs=1e-6)


def test_settings_of_the_model_that_matter(family_base):
    """A harvest respects the paper's literal settings, steering, and pruned features."""
    data = windows(6, padded=False)
    model = make_mfn(family_base, layers=[1], input_norm="none", blend_into="mlp", decoder_bias=False)
    atlas = build(model, data, skip_first=0)
    z = model(torch.tensor(data["input_ids"]), output_codes=True).codes[1].to_dense()
    assert [record["firing_count"] for record in atlas.features.to_pylist()] == (z > 0).sum((0, 1)).tolist()

    model.config.pruned_features = {"1": [7]}
    with model.steer({(1, 5): Clamp(3.0), (1, 6): Clamp(-3.0)}):
        steered = build(model, data)
    counted = 6 * (WINDOW - 1)
    assert (steered[1, 5].firing_count, steered[1, 6].firing_count) == (counted, 0)
    assert (steered[1, 5].max_activation, steered[1, 5].mean_activation) == (3.0, 3.0)
    assert (steered[1, 7].status, steered[1, 7].promoted, steered[1, 7].nearest) == ("pruned", [], [])
    assert steered.metadata["layers"]["1"]["features"] == 79


@pytest.mark.parametrize(("chosen", "skipped"), [(None, [0, 2]), ((7, 9, 7), [7, 9]), ((), [])])
def test_special_tokens_do_not_count_wherever_they_stand(family_base, chosen, skipped):
    """Counts are those of dense codes on all other tokens, and so is every example. Labels read the same tokens."""
    model, data = make_mfn(family_base, layers=[1]), windows()
    ids = np.array(data["input_ids"])
    ids[::2, 6], ids[1::3, 10], ids[2, 3:9], ids[:, 12] = 2, 0, 2, 7
    data = data.remove_columns("input_ids").add_column("input_ids", ids.tolist())
    atlas = build(model, data, skip_tokens=chosen)
    z, counted = dense_codes(model, data, 1)
    counted &= ~np.isin(ids, skipped)
    active = (z > 0) & counted[..., None]
    assert atlas.to_pandas()["firing_count"].tolist() == active.sum((0, 1)).tolist()
    assert atlas.metadata["data"]["tokens"] == counted.sum()
    assert atlas.metadata["data"]["skip_tokens"] == skipped
    examples = atlas.to_pandas("examples")
    assert len(examples) > 100
    assert counted[examples["window"], examples["position"]].all()
    assert label_features(atlas, model, word_tokenizer(), data, {}).tokens == counted.sum()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family_base, side):
    """Rows of five lengths, padded to one length, have the firings that each row has on its own."""
    model, data = make_mfn(family_base, layers=[0, 2]), windows(10, padded=False)
    lengths = [WINDOW - 2 * (row % 5) for row in range(10)]
    masks = [[1] * length + [0] * (WINDOW - length) for length in lengths]
    if side == "left":
        masks = [mask[::-1] for mask in masks]
    padded = data.remove_columns("attention_mask").add_column("attention_mask", masks)
    atlas = build(model, padded)
    counts = {layer: np.zeros(80, int) for layer in (0, 2)}
    for ids, mask in zip(data["input_ids"], masks, strict=True):
        alone = torch.tensor(np.array(ids)[np.array(mask, bool)])[None]
        for layer, code in model(alone, output_codes=True).codes.items():
            counts[layer] += (code.to_dense()[0, 1:] > 0).sum(0).numpy()
    assert atlas.to_pandas()["firing_count"].tolist() == [*counts[0], *counts[2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"skip_first": WINDOW}, "no token is left"),
        ({"skip_tokens": range(96)}, "no token is left"),
        ({"skip_tokens": [3, -1]}, "skip_tokens has -1"),
        ({"examples": ExampleLimits(before=-1)}, "examples.before is -1"),
        ({"data": []}, "no rows with input_ids"),
        ({"data": [{"text": "a"}]}, "no rows with input_ids"),
        (
            {"data": [{"input_ids": [5] * 4}, {"input_ids": [5] * 3}]},
            "row 1 of the data has 3 tokens, the first has 4",
        ),
        ({"data": [{"input_ids": [5] * 4, "source": str(row)} for row in range(300)]}, "more than 256"),
    ],
)
def test_bad_input_is_named(family_base, options, message):
    model = make_mfn(family_base, layers=[1])
    options = {"data": windows(4)} | options
    with pytest.raises(ValueError, match=message):
        build(model, **options)


def test_activations_that_are_not_finite_are_named(family_base):
    model = make_mfn(family_base, layers=[0, 1])
    with torch.no_grad():
        model.mfn_layers[1].encoder.bias[3] = torch.inf
    with pytest.raises(ValueError, match="activation of layer 1 is not finite"):
        build(model, windows(4))


def test_base_models_have_no_atlas(family_base):
    with pytest.raises(ValueError, match="has no MFN layers; convert the model first"):
        build(family_base, windows(4))
