"""P4: first-order predictions of interventions, compared with autograd, closed forms and separate forwards."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import make_base, make_mfn, tokens
from datasets import Dataset
from scipy import stats

from modeling_mfn import Add
from modeling_mfn.evaluation.intervals import Estimate
from modeling_mfn.evaluation.measures.first_order import measure_interventions, response_measures
from modeling_mfn.evaluation.measures.intervention_effects import (
    Bench,
    Push,
    Response,
    Site,
    exact_copy,
    least_window,
    readers,
    sample_sites,
)
from modeling_mfn.evaluation.predictions import p4_interventions as predictability
from modeling_mfn.evaluation.predictions.p4_interventions import intervention_predictability
from modeling_mfn.evaluation.result import MFN, POST_HOC_SAE

FAMILIES = ["llama-tied", "gpt2-tied"]
CHANGES = np.array([-1.0, 0.5, 3.0])


def bench_of(family, alpha=0.3, **settings):
    model = exact_copy(make_mfn(make_base(family), alpha=alpha, **settings))
    site = Site(tokens(1, 14)["input_ids"][0], 9)
    return model, site, Bench(model, site)


def strongest(bench, layer):
    return max(bench.activations(layer).items(), key=lambda item: item[1])


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.mark.parametrize("codes", ["stream", "update"])
def test_changes_are_those_of_whole_forwards(family, codes):
    """Compares with forwards without a cache, one per intervention, and with separate hooks on heads and MLPs."""
    model, site, bench = bench_of(family, codes=codes, alpha=0.3)
    feature, activation = strongest(bench, 0)
    (response,) = bench.responses(0, [Push(feature)], activation, CHANGES)
    block = (model.model.backbone.layers if "llama" in family else model.model.backbone.h)[2]
    attention = block.self_attn.o_proj if "llama" in family else block.attn.c_proj
    seen = {}
    attention.register_forward_pre_hook(lambda _, arguments: seen.update(heads=arguments[0]))
    block.mlp.register_forward_hook(lambda *arguments: seen.update(mlp=arguments[2]))
    mask = (torch.arange(14) == 9)[None]

    def outputs():
        logits = model(site.tokens[None]).logits
        return logits[0, 9:], seen["heads"][0, 9:].unflatten(-1, (4, 8)), seen["mlp"][0, 9:]

    def active(place):
        code = model(site.tokens[None], output_codes=True).codes[place]
        return set(code.indices[0, 9][code.values[0, 9] > 0].tolist())

    plain, before = outputs(), [active(1), active(2)]
    for place, change in enumerate(CHANGES):
        with model.steer({(0, feature): Add(change * activation)}, positions=mask):
            steered, after = outputs(), [active(1), active(2)]
        logits, heads, mlp = (after - before for after, before in zip(steered, plain, strict=True))
        for name, expected in (
            ("logits", logits - logits.mean(-1, keepdim=True)),
            (("attention", 2), heads),
            (("MLP", 2), mlp),
        ):
            torch.testing.assert_close(response.changes[name][place], expected, atol=1e-10, rtol=0)
        shares = [1 - len(old & new) / len(old) for old, new in zip(before, after, strict=True)]
        assert response.replaced[place].item() == pytest.approx(sum(shares) / 2)
    assert 0 < response.replaced[-1] < 1
    assert model.config.alpha == 1


def test_derivatives_are_autograds(family):
    """Adds the feature's direction behind its MFN layer, times a number that has a gradient."""
    model, site, bench = bench_of(family)
    feature, activation = strongest(bench, 1)
    random = torch.randn(32, dtype=torch.float64)
    random /= random.norm()
    found = bench.responses(1, [Push(feature), Push(feature, random)], activation, CHANGES)
    layer = model.mfn_layers[1]
    for response, direction in zip(found, (layer.decoder.weight[feature], random), strict=True):
        amount = torch.zeros((), dtype=torch.float64, requires_grad=True)

        def add(_, arguments, output, direction=direction, amount=amount):
            std = arguments[0].std(-1, keepdim=True)
            here = (torch.arange(14) == 9)[:, None]
            return output + here * amount * activation * std * direction

        handle = layer.register_forward_hook(add)
        logits = model(site.tokens[None]).logits[0, 9:]
        handle.remove()
        logits = logits - logits.mean(-1, keepdim=True)
        for seed in range(3):
            weights = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            (expected,) = torch.autograd.grad((weights * logits).sum(), amount, retain_graph=True)
            predicted = (weights * response.derivative["logits"]).sum()
            assert predicted.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)


def test_behind_the_last_block_it_is_the_norms_closed_form():
    """Features of the last block reach the logits through RMSNorm alone, because the block has no MLP here.

    For a residual r and a change v, the derivative of g r / rms is g (v - r (r.v) / |r|^2) / rms.
    """
    model, _, _ = bench_of("llama-untied")
    model.model.backbone.layers[2].mlp.down_proj.weight.zero_()
    site = Site(tokens(1, 14)["input_ids"][0], 9)
    bench = Bench(model, site)
    feature, activation = strongest(bench, 2)
    (response,) = bench.responses(2, [Push(feature)], activation, CHANGES)
    kept = {}
    layer, norm = model.mfn_layers[2], model.model.backbone.norm
    layer.register_forward_hook(lambda _, arguments, output: kept.update(h=arguments[0][0, 9], r=output[0, 9]))
    model(site.tokens[None])
    r, v = kept["r"], kept["h"].std() * layer.decoder.weight[feature] * activation
    mean_square = (r * r).mean() + model.config.text_config.rms_norm_eps
    inner = norm.weight * (v - r * (r * v).mean() / mean_square) / mean_square.sqrt()
    expected = model.lm_head.weight @ inner
    torch.testing.assert_close(response.derivative["logits"][0], expected - expected.mean(), atol=1e-7, rtol=1e-6)
    moved = r + v * CHANGES[-1]
    real = model.lm_head.weight @ (
        norm.weight * moved / ((moved * moved).mean() + model.config.text_config.rms_norm_eps).sqrt()
        - norm.weight * r / mean_square.sqrt()
    )
    torch.testing.assert_close(response.changes["logits"][-1, 0], real - real.mean(), atol=1e-9, rtol=0)
    assert (response.derivative["logits"][1:] == 0).all()  # no later token reads the last block


def test_small_interventions_are_predicted_exactly(family):
    model, _, bench = bench_of(family)
    feature, activation = strongest(bench, 0)
    (response,) = bench.responses(0, [Push(feature)], activation, np.array([-1e-4, 1e-4]))
    found = response_measures(response, np.array([-1e-4, 1e-4]), bench.baseline["logits"][0], readers(model, 0))
    for name in ("logits", "later logits", "attention", "MLP"):
        assert found[f"correlation of {name}"] == pytest.approx(1, abs=1e-5)
    assert found["relative error"] == pytest.approx(0, abs=0.01)
    assert found["sign agreement"] == pytest.approx(1)
    assert found["dose response"] == pytest.approx(1)
    assert found["linearity"] == pytest.approx(1, abs=1e-6)
    assert (found["KL"] < 1e-5).all()


def test_figures_of_one_response():
    """Computes each measure by its formula, for one change at a time."""
    random = torch.Generator().manual_seed(0)
    slope, noise, baseline = (torch.randn(3, 96, generator=random, dtype=torch.float64) for _ in range(3))
    slope, baseline = slope - slope.mean(-1, keepdim=True), 3 * baseline
    real = torch.stack([change * slope + 0.5 * noise for change in CHANGES])
    real -= real.mean(-1, keepdim=True)
    found = response_measures(Response({"logits": slope}, {"logits": real}, torch.arange(3)), CHANGES, baseline, [])
    before = torch.softmax(baseline, -1)
    jacobian = torch.diag(before[0]) - torch.outer(before[0], before[0])
    top = set((jacobian @ slope[0]).abs().topk(20).indices.tolist())
    for place, change in enumerate(CHANGES):
        predicted, after = change * slope, torch.softmax(baseline + real[place], -1)
        expected = {
            "correlation of logits": np.corrcoef(predicted[0], real[place, 0])[0, 1],
            "correlation of later logits": np.corrcoef(predicted[1:].ravel(), real[place, 1:].ravel())[0, 1],
            "relative error": np.linalg.norm(real[place, 0] - predicted[0]) / np.linalg.norm(real[place, 0]),
            "KL": stats.entropy(before[0], after[0]),
            "later KL": stats.entropy(before[1:], after[1:], axis=1).mean() / stats.entropy(before[0], after[0]),
            "sign agreement": np.mean([predicted[0, t] * real[place, 0, t] > 0
                                       for t in np.argsort(-real[place, 0].abs().numpy())[:20]]),
            "unpredicted tokens": sum(abs(after[0, t] - before[0, t]) for t in range(96) if t not in top)
            / (after[0] - before[0]).abs().sum(),
        }  # fmt: skip
        for name, value in expected.items():
            assert found[name][place] == pytest.approx(float(value), rel=1e-9), name
    assert np.isnan(found["correlation of attention"]).all()
    token = slope[0].abs().argmax()
    dose, answer = [*CHANGES, 0.0], [*real[:, 0, token].tolist(), 0.0]
    assert found["linearity"] == pytest.approx(stats.linregress(dose, answer).rvalue ** 2)
    assert found["dose response"] == pytest.approx(stats.spearmanr(np.array(dose) * slope[0, token].item(), answer)[0])


@pytest.mark.parametrize("codes", ["stream", "update"])
def test_kinds_of_interventions_move_the_stream_as_far(family, codes):
    """A random direction and an inactive feature move the stream by the same length as the active feature."""
    model, site, bench = bench_of(family, codes=codes)
    feature, activation = strongest(bench, 1)
    inactive = bench.seen_before(1)[0]
    assert inactive not in bench.activations(1)
    assert inactive in bench.codes_before[1].indices[bench.codes_before[1].values > 0]
    random = torch.ones(32, dtype=torch.float64) / 32**0.5
    kept = []
    block = (model.model.backbone.layers if "llama" in family else model.model.backbone.h)[1]
    norm = block.post_attention_layernorm if "llama" in family else block.ln_2
    norm.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0]))
    Bench(model, site)
    baseline = kept[-1]
    bench.responses(1, [Push(feature), Push(feature, random), Push(inactive)], activation, CHANGES)
    moved = (kept[-1] - baseline).unflatten(0, (3, 5))  # two tiny steps, then the changes
    lengths = moved[:, 2:, 0].norm(dim=-1)
    assert moved[:, :, 1:].abs().max() < 1e-12
    torch.testing.assert_close(lengths, lengths[:1].expand(3, 3), rtol=1e-5, atol=0)
    torch.testing.assert_close(lengths[0] / lengths[0, 0], torch.tensor(abs(CHANGES)), rtol=1e-5, atol=0)


def windows(count=6, length=24):
    return Dataset.from_dict(
        {
            "input_ids": tokens(count, length)["input_ids"].tolist(),
            "attention_mask": [[0] * 3 + [1] * (length - 3)] * count,
        }
    )


@pytest.mark.halved
def test_the_whole_prediction(family):
    models = [make_mfn(make_base(family), alpha=alpha, seed=seed) for seed, alpha in ((1, 0.0), (2, 0.5))]
    before = [[parameter.clone() for parameter in model.parameters()] for model in models]
    result = intervention_predictability({MFN: models, POST_HOC_SAE: models[:1]}, windows(), interventions=6, later=2)
    assert [model.config.alpha for model in models] == [0.0, 0.5]
    for model, parameters in zip(models, before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), parameters, strict=True))
    assert set(result.figures) == {
        f"{kind}{name}" for kind in ("", "random direction in ", "inactive feature in ") for name in (MFN, POST_HOC_SAE)
    }
    json.dumps(result.to_json(), allow_nan=False)
    sites = sample_sites(windows(), 6, 2)
    assert all(4 <= site.position <= 18 and len(site.tokens) == site.position + 3 for site in sites)
    by_model = [measure_interventions(model, sites)["feature"] for model in models]
    measured, replaced = (
        np.stack([each[name] for each in by_model]) for name in ("correlation of logits", "replaced features")
    )
    assert measured.shape == (2, 6, 3, 5)
    ablated, flipped = measured[:, :, :2, 0], replaced[:, :, :2, 0] > 0  # the last MFN layer is not judged
    assert np.isnan(replaced[:, :, 2]).all()
    found = result.figures[MFN]
    headline = found["correlation of logits"]
    assert headline.value == pytest.approx(ablated.mean())
    assert headline.low < headline.value < headline.high
    assert found["interventions with a later feature replaced"].value == pytest.approx(flipped.mean())
    for name, chosen in (("a later feature replaced", flipped), ("none replaced", ~flipped)):
        expected = ablated[chosen].mean() if chosen.any() else math.nan
        assert found[f"correlation of logits, {name}"].value == pytest.approx(expected, nan_ok=True)
    for layer in range(3):
        of_layer = found[f"correlation of logits, layer {layer}"].value
        assert of_layer == pytest.approx(measured[:, :, layer, 0].mean())
        assert f"{of_layer:.3g} at {layer}" in result.reason
    assert f"After {flipped.mean():.0%} of the interventions" in result.reason
    assert f"of attention by {found['correlation of attention']}" in result.reason
    assert result.details["judged_layers"] == [0, 1]
    assert result.details["by_seed"][MFN]["correlation of logits"] == pytest.approx(ablated.mean((1, 2)))
    by_strength = result.details["by_strength"][MFN]
    assert by_strength[2.0]["correlation of logits"].value == pytest.approx(measured[:, :, :2, 3].mean())
    errors = np.stack([each["relative error"][:, :2, 4] for each in by_model])
    assert by_strength[4.0]["relative error"].value == pytest.approx(np.median(errors))
    assert sum(each["interventions"] for each in result.details["by_effect"][MFN]) == measured[:, :, :2].size
    random = measure_interventions(models[0], sites)["random direction"]["correlation of logits"][..., 0]
    assert result.details["by_layer"][f"random direction in {POST_HOC_SAE}"][1][
        "correlation of logits"
    ] == pytest.approx(random[:, 1].mean())
    difference = result.details["difference"][POST_HOC_SAE]
    assert difference.value == pytest.approx(ablated.mean() - ablated[0].mean())
    paper = result.paper_criterion
    assert (paper.met, paper.figure) == (headline.value > 0.8, headline)
    assert paper.baseline_figure == result.figures[f"random direction in {MFN}"]["correlation of logits"]
    alone = intervention_predictability({MFN: models[:1]}, windows(), interventions=2, later=1)
    assert alone.outcome == "not measured"
    assert math.isfinite(alone.figures[MFN]["dose response"].value)


def test_a_single_mfn_layer_is_judged():
    model = make_mfn(make_base("llama-tied"), layers=[2])
    result = intervention_predictability({MFN: [model], POST_HOC_SAE: [model]}, windows(), interventions=2, later=1)
    assert result.details["judged_layers"] == [2]
    assert math.isfinite(result.figures[MFN]["correlation of logits"].value)
    assert "replaced" not in result.reason


SURE, LOW = Estimate(0.95, 0.93, 0.97), Estimate(0.7, 0.6, 0.85)
NAMES = ("correlation of logits", "dose response", "correlation of attention", "correlation of MLP")
MORE, UNSURE, LESS = Estimate(0.1, 0.05, 0.15), Estimate(0.0, -0.1, 0.1), Estimate(-0.1, -0.15, -0.05)


@pytest.mark.parametrize(
    ("low", "random", "sae", "seeds", "outcome"),
    [
        ((), MORE, MORE, (0.95, 0.95), "confirmed"),
        ((), MORE, UNSURE, (0.95, 0.95), "partly"),
        ((), LESS, UNSURE, (0.95, 0.95), "partly"),
        ((), LESS, LESS, (0.95, 0.95), "not confirmed"),
        (NAMES[2:3], MORE, MORE, (0.95, 0.95), "partly"),
        (NAMES[3:], MORE, MORE, (0.95, 0.95), "partly"),
        (NAMES[1:2], MORE, MORE, (0.95, 0.95), "not confirmed"),
        (NAMES[:1], MORE, MORE, (0.95, 0.95), "not confirmed"),
        ((), MORE, MORE, (0.99, 0.85), "partly"),  # a seed is below the post-hoc SAE's
        ((), MORE, MORE, (1.0, 0.75), "not confirmed"),  # a seed is below 0.8
    ],
)
def test_outcomes(low, random, sae, seeds, outcome):
    nothing = Estimate(math.nan)
    ours = {name: LOW if name in low else SURE for name in NAMES} | {"correlation of logits, layer 0": SURE}
    ours |= {predictability.FLIPS: nothing, predictability.WITH_FLIP: nothing, predictability.WITHOUT_FLIP: nothing}
    by_seed = {
        MFN: {name: [0.95, 0.95] for name in NAMES} | {NAMES[0]: list(seeds)},
        POST_HOC_SAE: {NAMES[0]: [0.9, 0.9]},
        f"random direction in {MFN}": {NAMES[0]: [0.7, 0.7]},
    }
    differences = {f"random direction in {MFN}": random, POST_HOC_SAE: sae}
    figures = {MFN: ours, POST_HOC_SAE: {NAMES[0]: Estimate(0.9)}}
    found, reason = predictability._judge(figures, differences, by_seed, [0])
    assert found == outcome
    assert f"of attention by {ours[NAMES[2]]}, of MLPs by {ours[NAMES[3]]}" in reason


def test_what_cannot_be_measured():
    with pytest.raises(ValueError, match="strengths are"):
        intervention_predictability({}, windows(), strengths=(0.5, 2.0))
    with pytest.raises(ValueError, match="windows are empty"):
        sample_sites([], 2, 1)
    with pytest.raises(ValueError, match="a window has 5 tokens, too few for 8"):
        sample_sites([{"input_ids": [3, 4, 5, 6, 7]}], 2, 8)
    for later in (1, 2, 8, 30):
        shortest = [3] * least_window(later)
        assert sample_sites([{"input_ids": shortest}], 2, later)
        with pytest.raises(ValueError, match=f"a window has {len(shortest) - 1} tokens"):
            sample_sites([{"input_ids": shortest[1:]}], 2, later)
