"""P1: measures compared with dense float64 counts, closed forms and planted duplicates; outcomes in both families."""

import json

import numpy as np
import pytest
import torch
from conftest import make_mfn, tokens
from datasets import Dataset
from scipy.sparse import csr_array
from scipy.special import kl_div

from modeling_mfn.evaluation.intervals import Estimate, bootstrap, jackknife
from modeling_mfn.evaluation.measures.firing_rates import (
    CV,
    DEAD,
    OVERLAP,
    STD,
    firing_replicates,
    measure_firing,
    overlap_measures,
    rate_measures,
)
from modeling_mfn.evaluation.predictions.p1_firing_rates import firing_rate_calibration, judge
from modeling_mfn.evaluation.result import MFN, NO_RATE_LOSS, POST_HOC_SAE, RANDOM_SAE


def windows(rows=40, length=16, padded=False, seed=3):
    data = {"input_ids": tokens(rows, length, seed)["input_ids"].tolist()}
    if padded:
        data["attention_mask"] = [[1] * (length - row % 5) + [0] * (row % 5) for row in range(rows)]
    return Dataset.from_dict(data)


def dense_figures(active, rho):
    """Computes all measures from a dense (N, m) array of 0 and 1, pair by pair."""
    number, size = active.shape
    rates = active.mean(0)
    divergence = kl_div(rates, rho) + kl_div(1 - rates, 1 - rho)
    shares = rates[rates > 0] / rates.sum()
    both, chance, phis, partners = [], [], [], np.zeros(size, bool)
    for i in range(size):
        for j in range(size):
            if i == j:
                continue
            a, b = active[:, i], active[:, j]
            both.append((a * b).mean())
            chance.append(a.mean() * b.mean())
            if a.std() > 0 and b.std() > 0:
                phis.append(np.corrcoef(a, b)[0, 1])
            union = ((a + b) > 0).sum()
            partners[i] |= union > 0 and (a * b).sum() / union > 0.5
    return {
        "active features": active.sum(1).mean(),
        "firing rate mean": active.sum() / number / size,
        STD: np.sqrt(((rates - rates.mean()) ** 2).mean()),
        CV: np.sqrt(((rates - rates.mean()) ** 2).mean()) / rates.mean(),
        "KL to rho": divergence.mean(),
        DEAD: sum(active[:, i].sum() == 0 for i in range(size)) / size,
        "evenness": -(shares * np.log(shares)).sum() / np.log(size),
        "co-activation": np.mean(both),
        "co-activation at chance": np.mean(chance),
        OVERLAP: np.sqrt(np.mean(np.square(phis))),
        "RMS correlation at chance": np.sqrt(1 / (number - 1)),
        "near duplicates": partners[active.any(0)].mean(),
    }


def random_activity(number=400, size=24, seed=0):
    """Makes dependent features of unequal rates: one silent, one always active, two nearly equal."""
    random = np.random.default_rng(seed)
    topics = random.random((number, 4)) < 0.3
    active = random.random((number, size)) < (0.02 + 0.3 * topics[:, np.arange(size) % 4]) * random.random(size)
    active[:, 5], active[:, 6], active[:, 8] = False, True, active[:, 7]
    active[:3, 8] ^= True
    return active.astype(np.float64)


def test_figures_and_leave_one_out_are_those_of_dense_counts():
    active = random_activity()
    groups = np.array_split(active, [150, 160, 300])  # of unequal size
    found = firing_replicates([csr_array(group.astype(np.float32)) for group in groups], rho=0.07)
    without = [np.concatenate(groups[:g] + groups[g + 1 :]) for g in range(4)]
    for place, part in enumerate([active, *without]):
        expected = dense_figures(part, 0.07) | ({"RMS correlation at chance": np.nan} if place else {})
        assert {name: values[place] for name, values in found.items()} == pytest.approx(expected, rel=2e-5, nan_ok=True)
    assert found["near duplicates"][0] > 0


def test_even_rates_at_rho_have_no_deviation():
    figures = rate_measures(np.full(50, 0.04), 0.04)
    assert figures == pytest.approx(
        {"active features": 2, "firing rate mean": 0.04, STD: 0, CV: 0, "KL to rho": 0, DEAD: 0, "evenness": 1},
        abs=1e-12,
    )


def test_half_of_the_features_silent_in_closed_form():
    """Rates are 0 and 2 rho, so that std is rho and CV is 1. Each silent feature costs -log(1 - rho)."""
    rho = 0.1
    figures = rate_measures(np.tile([0.0, 2 * rho], 8), rho)
    kl = (-np.log(1 - rho) + 2 * rho * np.log(2) + (1 - 2 * rho) * np.log((1 - 2 * rho) / (1 - rho))) / 2
    assert (figures[STD], figures[CV], figures[DEAD]) == pytest.approx((rho, 1, 0.5))
    assert figures["KL to rho"] == pytest.approx(kl)
    assert figures["evenness"] == pytest.approx(np.log(8) / np.log(16))


def overlap(active):
    return overlap_measures((active.T @ active).astype(np.float32), len(active))


def test_mean_co_activation_knows_no_more_than_the_number_of_active_features():
    """Four of 40 features fire per token, at random or in ten fixed groups of four. Only the correlation differs."""
    random = np.random.default_rng(1)
    number = 4000
    spread = np.argsort(random.random((number, 40)), axis=1) < 4
    together = np.repeat(random.integers(10, size=number)[:, None] == np.arange(10), 4, axis=1)
    found = [overlap(active.astype(float)) for active in (spread, together)]
    for figures in found:
        assert figures["co-activation"] == pytest.approx(4 * 3 / (40 * 39))
    assert found[0]["near duplicates"] == 0
    assert found[1]["near duplicates"] == 1
    assert found[1][OVERLAP] > 3 * found[0][OVERLAP]


def test_correlation_of_permuted_tokens_is_that_at_chance():
    """The mean of phi^2 over permutations is 1 / (N - 1), for rare and for frequent features."""
    random = np.random.default_rng(2)
    active = np.repeat([[1.0], [0.0]], [3, 57], axis=0) * np.ones(12)
    active[:30, 6:] = 1
    squares = [overlap(random.permuted(active, axis=0))[OVERLAP] ** 2 for _ in range(400)]
    expected = overlap(active)["RMS correlation at chance"] ** 2
    assert expected == pytest.approx(1 / 59)
    assert np.mean(squares) == pytest.approx(expected, abs=4 * np.std(squares) / 20)


def test_planted_duplicates_raise_the_overlap():
    active = (np.random.default_rng(3).random((3000, 60)) < 0.05).astype(float)
    before = overlap(active)
    active[:, :10] = active[:, 10:20]
    after = overlap(active)
    assert (before["near duplicates"], after["near duplicates"]) == pytest.approx((0, 20 / 60))
    assert after[OVERLAP] > 2 * before[OVERLAP]


def test_the_interval_is_about_that_of_a_bootstrap_over_windows():
    random = np.random.default_rng(4)
    counts = random.poisson(random.gamma(1, 8, size=30), size=(30, 30)).astype(float)  # (windows, features)

    def cv(sample):
        total = sample.sum(0)
        return total.std() / total.mean()

    replicates = np.array([cv(counts), *(cv(np.delete(counts, row, 0)) for row in range(30))])
    found, expected = jackknife(replicates), bootstrap(cv, counts, resamples=2000)
    assert found.value == expected.value
    assert found.high - found.low == pytest.approx(expected.high - expected.low, rel=0.25)
    assert found.low < found.value < found.high


@pytest.mark.halved
@pytest.mark.parametrize("padded", [True, False])
def test_a_models_figures_are_those_of_its_dense_codes(family_base, padded):
    model = make_mfn(family_base, layers=[0, 2])
    model.prune_features(2, [3, 4])
    data = windows(padded=padded)
    inputs = {name: torch.tensor(data[name]) for name in data.column_names}
    with torch.no_grad():
        codes = model(**inputs, output_codes=True).codes
    counted = inputs.get("attention_mask", torch.ones(40, 16)).bool()
    found = measure_firing(model, data, batch_size=3)
    for layer in (0, 2):
        dense = (codes[layer].to_dense()[counted] > 0).double().numpy()
        dense = np.delete(dense, [3, 4], axis=1) if layer == 2 else dense
        assert found[layer].tokens == len(dense) == counted.sum()
        np.testing.assert_allclose(found[layer].rates, dense.mean(0), rtol=1e-12)
        whole = {name: values[0] for name, values in found[layer].replicates.items()}
        assert whole == pytest.approx(dense_figures(dense, 8 / 80), rel=2e-5)
        assert len(found[layer].replicates[CV]) == 31


def with_rates(base, spread, seed=1):
    """Makes an MFN model whose encoder bias lets some features fire more often than others."""
    model = make_mfn(base, layers=[0, 1], seed=seed)
    for layer in model.mfn_layers.values():
        layer.encoder.bias.data += spread * torch.linspace(-1, 1, 80)
    return model


@pytest.mark.halved
def test_prediction(family_base):
    """Compares equal directions with more and less even rates. Each condition is judged by its whole interval."""
    even = [with_rates(family_base, 0, seed) for seed in (1, 2)]
    uneven = [with_rates(family_base, 4, seed) for seed in (1, 2)]
    data = windows(20)
    result = firing_rate_calibration(
        {MFN: even, POST_HOC_SAE: uneven, NO_RATE_LOSS: uneven, RANDOM_SAE: [even[0]]}, data
    )
    json.dumps(result.to_json(), allow_nan=False)
    for name, models in ((MFN, even), (POST_HOC_SAE, uneven)):
        each = [layer.replicates[CV][0] for model in models for layer in measure_firing(model, data).values()]
        assert result.figures[name][CV].value == pytest.approx(np.mean(each))
        of_seeds = [seed[CV] for seed in result.details["by_seed"][name]]
        assert of_seeds == pytest.approx([np.mean(each[:2]), np.mean(each[2:])])
        of_layers = [layer[CV].value for layer in result.details["by_layer"][name].values()]
        assert of_layers == pytest.approx([np.mean(each[::2]), np.mean(each[1::2])])
    ours, theirs = result.figures[MFN][CV], result.figures[POST_HOC_SAE][CV]
    difference = result.details["differences"][POST_HOC_SAE][CV]
    assert difference.value == pytest.approx(ours.value - theirs.value)
    assert difference.high < 0
    assert ours.low < ours.value < ours.high < theirs.low
    assert result.details["rate_quantiles"][MFN][50] == pytest.approx(0.1, abs=0.05)
    assert result.details["tokens"][MFN] == 320
    assert f"coefficient of variation {ours}" in result.reason.split("Not met")[0]
    deviations = [seed[STD] for seed in result.details["by_seed"][MFN]]
    sure = result.figures[MFN][STD].high <= 0.05 and max(deviations) <= 0.05
    assert (result.outcome == "not confirmed") == (not sure)
    paper = result.paper_criterion
    assert (paper.figure, paper.baseline_figure) == (result.figures[MFN][STD], result.figures[RANDOM_SAE][STD])
    assert paper.met == (paper.figure.value <= 0.05)


GOOD = {
    STD: Estimate(0.02, 0.01, 0.03),
    CV: Estimate(0.5, 0.4, 0.6),
    DEAD: Estimate(0.0, 0.0, 0.01),
    OVERLAP: Estimate(0.1),
}
LESS = {CV: Estimate(-0.3, -0.5, -0.1), OVERLAP: Estimate(-0.01, -0.02, 0.0)}
UNSURE = {CV: Estimate(-0.3, -0.7, 0.1), OVERLAP: Estimate(0.0, -0.02, 0.02)}
BASELINES = (POST_HOC_SAE, RANDOM_SAE, NO_RATE_LOSS)
SEED = {STD: 0.02, CV: 0.5, DEAD: 0.0, OVERLAP: 0.1}
WORSE = SEED | {CV: 0.8}


@pytest.mark.parametrize(
    ("ours", "unsure", "seeds", "outcome"),
    [
        ({}, (), (SEED, SEED), "confirmed"),
        *(({}, (baseline,), (SEED, SEED), "partly") for baseline in BASELINES),
        ({DEAD: Estimate(0.005, 0.0, 0.011)}, (), (SEED, SEED), "partly"),
        ({DEAD: Estimate(0.5, 0.4, 0.6)}, BASELINES, (SEED, SEED), "partly"),  # the paper's criterion alone
        ({STD: Estimate(0.049, 0.04, 0.06)}, (), (SEED, SEED), "not confirmed"),
        ({}, (), (SEED, SEED | {CV: 0.9}), "partly"),
        ({}, (), (SEED, SEED | {DEAD: 0.02}), "partly"),
        ({}, (), (SEED, SEED | {STD: 0.06}), "not confirmed"),
    ],
)
def test_the_criterion_asks_for_whole_intervals_and_every_seed(ours, unsure, seeds, outcome):
    figures = {MFN: GOOD | ours, **dict.fromkeys(BASELINES, GOOD)}
    differences = {name: UNSURE if name in unsure else LESS for name in BASELINES}
    # NO_RATE_LOSS has one seed, so that the second MFN seed is compared with its mean over seeds
    by_seed = {MFN: seeds, POST_HOC_SAE: (WORSE, WORSE), RANDOM_SAE: (WORSE, WORSE), NO_RATE_LOSS: (WORSE,)}
    found, reason = judge(figures, differences, by_seed)
    assert found == outcome
    assert ("Not met" in reason) == bool(ours or unsure)
    assert ("not in every seed" in reason) == (seeds[0] != seeds[1])
    assert f"random SAE has a standard deviation of {GOOD[STD]}" in reason


def test_what_is_missing_and_what_is_wrong(family_base):
    model = make_mfn(family_base, layers=[1])
    result = firing_rate_calibration({MFN: [model], RANDOM_SAE: []}, windows(6))
    assert result.outcome == "not measured"
    assert POST_HOC_SAE in result.reason
    assert NO_RATE_LOSS in result.reason
    assert set(result.figures) == {MFN}
    for arguments, message in [
        (({MFN: []}, windows(6)), "at least one model"),
        (({MFN: [model]}, windows(1)), "there are 1 windows"),
        (({MFN: [model]}, windows(6), 1.5), "rho is 1.5"),
        (({MFN: [model]}, windows(6).add_column("attention_mask", [[0] * 16] * 6)), "no token"),
    ]:
        with pytest.raises(ValueError, match=message):
            firing_rate_calibration(*arguments)
