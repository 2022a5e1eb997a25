"""P5 compared with a direct computation, and its outcomes on models whose features lose a known amount."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HIDDEN, make_base, make_mfn
from datasets import Dataset
from scipy import stats

from modeling_mfn import MFNForCausalLM
from modeling_mfn.evaluation.baselines.saes import fine_tune_sae, post_hoc_sae
from modeling_mfn.evaluation.measures import perplexity
from modeling_mfn.evaluation.measures.reconstruction import reconstruction_errors
from modeling_mfn.evaluation.predictions import p5_transfer as transfer_module
from modeling_mfn.evaluation.predictions.p5_transfer import Transfer, transfer_gap
from modeling_mfn.evaluation.result import FINE_TUNED_SAE, MFN, POST_HOC_SAE


def rows(low, high, count=24, length=16, seed=0):
    ids = np.random.default_rng(seed).integers(low, high, (count, length))
    return Dataset.from_dict({"input_ids": ids.tolist()})


WINDOWS = {"a": rows(3, 40), "b": rows(30, 70, 20), "c": rows(60, 96, 28)}


def exact(base, noise=0.0):
    """Makes features that lose nothing, [x]+ and [-x]+ for each entry x, and adds noise to their decoder."""
    model = MFNForCausalLM.from_base(base, num_features=2 * HIDDEN, k=2 * HIDDEN, alpha=0.3, input_norm="none")
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.mfn_layers.values():
            layer.encoder.weight.copy_(torch.cat([torch.eye(HIDDEN), -torch.eye(HIDDEN)]))
            layer.decoder.weight.copy_(layer.encoder.weight + noise * torch.randn(2 * HIDDEN, HIDDEN))
    return model


def moved(base, seed=0):
    """Adds noise to the weights of a dense model, in place."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return base


def own_text(base, seed):
    """Samples windows from the model, so that any change of the model costs something."""
    torch.manual_seed(seed)
    first = torch.randint(3, 96, (40, 1))
    length = {"max_new_tokens": 23, "min_new_tokens": 23}
    ids = base.generate(first, attention_mask=torch.ones_like(first), do_sample=True, top_k=0, pad_token_id=0, **length)
    return Dataset.from_dict({"input_ids": ids.tolist()})


@torch.no_grad()
def log_perplexity(model, windows):
    ids = torch.tensor(windows["input_ids"])
    return model(input_ids=ids, labels=ids).loss.item()


def test_figures_against_a_direct_computation(family_base):
    name = "llama-tied" if "Llama" in type(family_base).__name__ else "gpt2-tied"
    dense = moved(make_base(name))
    mfn, sae, on_b = make_mfn(dense, seed=1), make_mfn(family_base, seed=2, alpha=0.0), make_mfn(family_base, seed=3)
    on_b.set_blend(0.0)
    subjects = {
        MFN: [Transfer("a", mfn, dense), Transfer("b", mfn, dense)],
        POST_HOC_SAE: [Transfer("a", sae)],
        FINE_TUNED_SAE: [Transfer("a", sae, tuned={"b": on_b})],
        "a backbone that moved": [Transfer("a", mfn, family_base)],
    }
    result = transfer_gap(subjects, WINDOWS, resamples=20)
    assert abs(result.figures[MFN]["backbone_loss_targets"].value) < 1e-5
    losses = {
        d: math.exp(log_perplexity(dense, WINDOWS[d]) - log_perplexity(family_base, WINDOWS[d])) - 1 for d in "abc"
    }
    of_moved = result.figures["a backbone that moved"]
    assert of_moved["backbone_loss_source"].value == pytest.approx(losses["a"], abs=1e-5)
    assert of_moved["backbone_loss_targets"].value == pytest.approx((losses["b"] + losses["c"]) / 2, abs=1e-5)
    assert [model.config.alpha for model in (mfn, sae, on_b)] == [1.0, 0.0, 0.0]

    def loss(model, domain, reference):
        model.set_blend(1.0)
        return math.exp(log_perplexity(model, WINDOWS[domain]) - log_perplexity(reference, WINDOWS[domain])) - 1

    of_mfn = {domain: loss(mfn, domain, dense) for domain in WINDOWS}
    of_sae = {domain: loss(sae, domain, family_base) for domain in WINDOWS}
    of_tuned = of_sae | {"b": loss(on_b, "b", family_base)}
    expected = {
        MFN: ((of_mfn["a"] + of_mfn["b"]) / 2, (of_mfn["b"] + of_mfn["a"] + 2 * of_mfn["c"]) / 4),
        POST_HOC_SAE: (of_sae["a"], (of_sae["b"] + of_sae["c"]) / 2),
        FINE_TUNED_SAE: (of_tuned["a"], (of_tuned["b"] + of_tuned["c"]) / 2),
    }
    for name, (source, targets) in expected.items():
        figures = result.figures[name]
        assert figures["perplexity_loss_source"].value == pytest.approx(source, abs=1e-5), name
        assert figures["perplexity_loss_targets"].value == pytest.approx(targets, abs=1e-5), name
        assert figures["transfer_gap"].value == pytest.approx(targets - source, abs=2e-5), name
    mean_loss = (log_perplexity(sae, WINDOWS["b"]) + log_perplexity(sae, WINDOWS["c"])) / 2
    assert result.figures[POST_HOC_SAE]["perplexity_targets"].value == pytest.approx(math.exp(mean_loss), rel=1e-4)
    of_training = result.details["by_domain"][MFN][1]
    assert of_training["source"] == "b"
    assert of_training["c"]["perplexity_loss"].value == pytest.approx(of_mfn["c"], abs=1e-5)
    assert of_training["c"]["reference_perplexity"].value == pytest.approx(
        math.exp(log_perplexity(dense, WINDOWS["c"])), rel=1e-4
    )
    less = expected[MFN][1] - expected[FINE_TUNED_SAE][1]
    found = result.details["mfn_less_baseline"]
    assert found[FINE_TUNED_SAE]["perplexity_loss_targets"].value == pytest.approx(less, abs=2e-5)
    excess = [(1 + (sum(of_mfn.values()) - of_mfn[source]) / 2) / (1 + of_mfn[source]) - 1 for source in "ab"]
    assert result.details["by_seed"][MFN]["excess_gap"] == pytest.approx(excess, abs=2e-5)
    of_sae_excess = (1 + expected[POST_HOC_SAE][1]) / (1 + expected[POST_HOC_SAE][0]) - 1
    assert found[POST_HOC_SAE]["excess_gap"].value == pytest.approx(np.mean(excess) - of_sae_excess, abs=3e-5)
    paper = result.paper_criterion
    assert paper.figure == result.figures[MFN]["perplexity_loss_targets"]
    assert paper.met == (expected[MFN][1] <= 0.05)
    json.dumps(result.to_json(), allow_nan=False)


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_explained_variance_against_dense_equations(family_base, alpha):
    model, read = make_mfn(family_base, layers=[0, 2], alpha=alpha).train(), {}
    for number, layer in model.mfn_layers.items():
        layer.register_forward_pre_hook(lambda layer, args, number=number: read.setdefault(number, []).append(args[0]))
    ids = torch.tensor(WINDOWS["a"][:6]["input_ids"])
    mask = torch.ones_like(ids)
    mask[1, 9:] = mask[4, 5:] = 0
    windows = [{"input_ids": row, "attention_mask": counted} for row, counted in zip(ids, mask, strict=True)]
    errors, distances = reconstruction_errors(model, windows, batch_size=4)
    assert model.training
    for place, (number, layer) in enumerate(model.mfn_layers.items()):
        h = torch.cat(read[number]).double()
        x = (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + layer.epsilon)
        z = torch.relu(x @ layer.encoder.weight.double().T + layer.encoder.bias)
        z = z * (z >= z.topk(layer.config.k).values[..., -1:])
        error = x - z @ layer.decoder.weight.double() - layer.decoder.bias
        counted = mask.double()[..., None]
        distance = x - (x * counted).sum((0, 1)) / counted.sum()
        for found, vectors in ((errors, error), (distances, distance)):
            expected = (vectors.square() * counted).sum((1, 2))
            np.testing.assert_allclose(found[:, place], expected, rtol=1e-3)


def test_intervals_are_those_of_a_bootstrap_over_windows():
    base = make_base("llama-tied")
    sae = make_mfn(base, alpha=0.0)
    figure = transfer_gap({POST_HOC_SAE: [Transfer("a", sae)]}, WINDOWS).figures[POST_HOC_SAE][
        "perplexity_loss_targets"
    ]
    reference = [perplexity.window_losses(sae, WINDOWS[domain]) for domain in ("b", "c")]
    sae.set_blend(1.0)
    losses = [perplexity.window_losses(sae, WINDOWS[domain]) - of for domain, of in zip("bc", reference, strict=True)]

    def statistic(*samples):
        return np.mean([np.exp(sample.mean()) - 1 for sample in samples])

    expected = stats.bootstrap(losses, statistic, vectorized=False, method="percentile", rng=1, n_resamples=2000)
    spread = np.ptp(expected.confidence_interval)
    assert (figure.low, figure.high) == pytest.approx(tuple(expected.confidence_interval), abs=0.1 * spread)


LOSSES = {POST_HOC_SAE: (0.3, 0.5), FINE_TUNED_SAE: (0.3, 0.4)}


@pytest.mark.parametrize(
    ("mfn", "baselines", "outcome"),
    [
        ([(0.01, 0.02), (0.01, 0.03)], {}, "confirmed"),
        ([(0.01, 0.02), (0.01, 0.02)], {FINE_TUNED_SAE: (0.3, 0.02)}, "partly"),  # as good is not better
        ([(0.1, 0.2), (0.1, 0.2)], {}, "partly"),
        ([(0.01, 0.02), (0.04, 0.07)], {}, "partly"),  # one seed is not within 5 %
        ([(0.1, 0.2), (0.1, 0.55)], {}, "not confirmed"),  # one seed is not below the SAE
        ([(0.12, 0.3), (0.12, 0.3)], {POST_HOC_SAE: (0.7, 0.75)}, "not confirmed"),  # loses more by the transfer
        ([(0.01, 0.02), (0.01, 0.02)], {POST_HOC_SAE: (0.7, 0.7)}, "not confirmed"),
        ([(0.1, 0.6), (0.1, 0.6)], {}, "not confirmed"),
        ([(0.01, 0.02)], {FINE_TUNED_SAE: None}, "not measured"),
    ],
)
def test_outcomes(mfn, baselines, outcome, monkeypatch):
    """Sets the loss on the source and on the targets, equal in all windows up to a little noise."""
    given = {MFN: mfn} | {name: [of] for name, of in (LOSSES | baselines).items() if of}
    subjects = {name: [Transfer("a", SimpleNamespace(losses=losses)) for losses in of] for name, of in given.items()}
    noise = np.random.default_rng(0).normal(0, 0.01, 20)

    def measure(self, transfer, domain):
        reference = 3 + noise
        ones = np.ones((20, 1))
        return transfer_module.Measured(
            reference + np.log1p(transfer.model.losses[domain != "a"]) + 0.01 * noise,
            reference,
            reference,
            0.1 * ones,
            ones,
        )

    monkeypatch.setattr(transfer_module._Measure, "__call__", measure)
    result = transfer_gap(subjects, {domain: range(20) for domain in WINDOWS}, resamples=100)
    assert result.outcome == outcome
    assert ("no fine-tuned SAE" in result.reason) == (outcome == "not measured")
    assert result.paper_criterion.met == (np.mean([losses[1] for losses in mfn]) <= 0.05)
    if outcome != "not measured":
        excess = np.mean([(1 + targets) / (1 + source) - 1 for source, targets in mfn])
        assert f"excess over the loss on the source is {100 * excess:.1f} [" in result.reason


def test_features_that_lose_nothing_lose_nothing_elsewhere():
    base = make_base("llama-tied")
    windows = {domain: own_text(base, seed) for seed, domain in enumerate(WINDOWS)}
    model = exact(base)
    subjects = {MFN: [Transfer("a", model)], POST_HOC_SAE: [Transfer("a", exact(base, 0.6))]}
    result = transfer_gap(subjects, windows, resamples=200)
    for figure in ("perplexity_loss_targets", "excess_gap"):
        assert abs(result.figures[MFN][figure].value) < 1e-4
    assert result.figures[POST_HOC_SAE]["perplexity_loss_targets"].low > 0
    assert model.config.alpha == 0.3


def test_a_model_runs_once_on_a_domain_for_all_that_share_it():
    base = make_base("llama-tied")
    sae, calls = make_mfn(base, alpha=0.0), []
    sae.register_forward_hook(lambda *_: calls.append(sae.config.alpha))
    subjects = {name: [Transfer("a", sae, tuned={"b": sae})] * 2 for name in (POST_HOC_SAE, FINE_TUNED_SAE)}
    transfer_gap(subjects, WINDOWS, batch_size=100, resamples=5)
    assert sorted(calls) == [0.0] * 3 + [1.0] * 3


def test_probes_that_carry_over():
    sae, other, asked = make_mfn(make_base("llama-tied")), make_mfn(make_base("llama-tied")), []

    def probes(model, source):
        asked.append((model, source))
        shift = 0.1 if model is other else 0.0
        return {
            "a": [0.9, 0.8, 0.6, math.nan, 0.7],
            "b": [0.6 + shift, 0.7 + shift, 0.5 + shift, 0.9, math.nan],
            "c": [0.8, 0.5, 0.7, 0.4, 0.6],
        }

    concepts = [
        ("kinship", "aunt"),
        ("kinship", "son"),
        ("colour", "red"),
        ("colour", "blue"),
        ("kinship", "son-in-law"),
    ]

    subjects = {POST_HOC_SAE: [Transfer("a", sae)], FINE_TUNED_SAE: [Transfer("a", sae, tuned={"b": other})]}
    result = transfer_gap(subjects, WINDOWS, probes=probes, concepts=concepts, resamples=5)
    assert asked == [(sae, "a"), (other, "a")]
    assert result.details["probed"] == {"kinship": ["aunt", "son"], "colour": ["red"]}
    for name, targets in ((POST_HOC_SAE, 0.625), (FINE_TUNED_SAE, 0.675)):
        figures = result.figures[name]
        assert figures["probe_auroc_source"].value == pytest.approx(0.725)  # both groups count alike
        assert figures["probe_auroc_targets"].value == pytest.approx(targets)
        assert figures["probe_auroc_gap"].value == pytest.approx(0.725 - targets)


@pytest.mark.parametrize(
    ("subjects", "windows", "message"),
    [
        ({MFN: [Transfer("x", None)]}, WINDOWS, "MFN has the domain 'x'; windows are of a, b, c"),
        ({MFN: [Transfer("a", None, tuned={"y": None})]}, WINDOWS, "MFN has the domain 'y'"),
        ({MFN: []}, WINDOWS, "MFN has no training"),
        ({MFN: [Transfer("a", None)]}, {"a": WINDOWS["a"]}, "transfer needs two or more"),
    ],
)
def test_bad_input(subjects, windows, message):
    with pytest.raises(ValueError, match=message):
        transfer_gap(subjects, windows)


def test_from_text_to_figures(family_base):
    """An SAE that was fine-tuned on a target explains more there."""
    train = {"a": rows(3, 50, 120, 32), "b": rows(50, 96, 120, 32)}
    held_out = {"a": rows(3, 50, 20, 32, seed=1), "b": rows(50, 96, 20, 32, seed=1)}
    sae = post_hoc_sae(family_base, train["a"], num_features=128, k=8, epochs=4)
    tuned = fine_tune_sae(sae, train["b"], epochs=4)
    subjects = {POST_HOC_SAE: [Transfer("a", sae)], FINE_TUNED_SAE: [Transfer("a", sae, tuned={"b": tuned})]}
    figures = transfer_gap(subjects, held_out).figures
    plain, better = figures[POST_HOC_SAE], figures[FINE_TUNED_SAE]
    assert plain["explained_variance_source"].low > plain["explained_variance_targets"].high
    assert better["explained_variance_targets"].low > plain["explained_variance_targets"].high
    assert better["perplexity_loss_source"] == plain["perplexity_loss_source"]
