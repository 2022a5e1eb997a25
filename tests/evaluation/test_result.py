"""Estimates with intervals, and results as JSON."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from modeling_mfn.evaluation.intervals import Estimate, bootstrap, difference, mean, mean_of_pairs
from modeling_mfn.evaluation.result import MFN, RANDOM_SAE, PaperCriterion, PredictionResult


@pytest.mark.parametrize(
    "draw", [lambda random, size: random.normal(size=size), lambda random, size: random.beta(8, 2, size)]
)
def test_the_interval_of_ten_values_holds_their_mean_in_95_percent_of_cases(draw):
    """Coverage may be 2 % less for skewed values, such as the beta distribution here or some areas under ROC curves."""
    random, groups = np.random.default_rng(0), [0] * 6 + [1] * 4
    truth = draw(random, 1_000_000).mean()
    samples = draw(random, (2000, 10))
    for given in (None, groups):
        found = [mean(sample, given) for sample in samples]
        assert 0.925 < np.mean([figure.low <= truth <= figure.high for figure in found]) < 0.965
    assert found[0].value == pytest.approx((samples[0, :6].mean() + samples[0, 6:].mean()) / 2)


def test_the_interval_of_a_mean_is_students():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=7)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean([*values, math.nan]) == pytest.approx((values.mean(), *expected))


def all_pairs(random, members=3, features=60):
    """Makes values of randomly matched pairs, to which each feature contributes, and the ends of the pairs."""
    own = random.normal(size=(members, features))
    values, ends = [], []
    for a in range(members):
        for b in range(a):
            i, j = random.permutation(features), random.permutation(features)
            values.append(own[a, i] + own[b, j] + 0.2 * random.normal(size=features))
            ends.append(np.stack([a * features + i, b * features + j], 1))
    return np.concatenate(values), np.concatenate(ends)


@pytest.mark.parametrize("members", [3, 4])
def test_the_interval_of_pairs_knows_that_they_share_ends(members):
    random = np.random.default_rng(0)
    drawn = [all_pairs(random, members) for _ in range(1000)]
    paired = [mean_of_pairs(*each) for each in drawn]
    single = [mean(values) for values, _ in drawn]
    held = [np.mean([figure.low <= 0 <= figure.high for figure in found]) for found in (paired, single)]
    assert 0.93 < held[0] < 0.97
    assert held[1] < 0.87
    assert [figure.value for figure in paired] == pytest.approx([figure.value for figure in single], abs=1e-12)


def test_pairs_without_an_end_in_common_are_independent_values():
    values, ends = all_pairs(np.random.default_rng(1), members=2)
    values[3] = math.nan
    assert mean_of_pairs(values, ends) == pytest.approx(mean(values))
    weights = np.random.default_rng(2).random(len(values))
    kept, share = np.delete(values, 3), np.delete(weights, 3)
    found = mean_of_pairs(values, ends, weights)
    expected = bootstrap(lambda v, w: (v * w).sum() / w.sum(), kept, share, resamples=5000)
    assert found.value == pytest.approx(expected.value)
    assert found[1:] == pytest.approx(expected[1:], abs=0.03)
    # three values that all share an end have no interval
    assert math.isnan(mean_of_pairs(np.array([1.0, 2.0, 4.0]), np.array([[0, 1], [1, 2], [0, 2]])).low)


def test_the_difference_of_independent_means_is_welchs():
    random = np.random.default_rng(3)
    a, b = random.normal(1, 1, 4000), random.normal(0.9, 2, 3000)
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    found = difference(mean(a), mean(b))
    assert found == pytest.approx((a.mean() - b.mean(), *expected), rel=1e-3)


def test_many_values_of_one_group_do_not_outvote_another():
    """A group of one value has no spread and takes that of the other groups."""
    found = mean([0.9, 0.5, 0.7, 0.5, 0.7, math.nan], ["a", "b", "b", "b", "b", "b"])
    assert found.value == pytest.approx((0.9 + 0.6) / 2)
    variance = 4 * 0.1**2 / 3
    margin = stats.t.ppf(0.975, 3) * np.sqrt(variance / 1 + variance / 4) / 2
    assert (found.low, found.high) == pytest.approx((0.75 - margin, 0.75 + margin))
    assert math.isnan(mean([0.9, 0.5], ["a", "b"]).low)


def test_samples_are_resampled_together():
    """The slope of a line does not depend on the sample of points; the slope of unpaired points does."""
    x = np.random.default_rng(1).normal(size=(50, 1))

    def slope(x, y):
        return float((x * y).sum() / (x * x).sum())

    assert bootstrap(slope, x, 2 * x) == pytest.approx((2.0, 2.0, 2.0))
    assert np.ptp(bootstrap(slope, x, 2 * x[::-1])) > 0.5


@pytest.mark.parametrize(("values", "expected"), [([], math.nan), ([math.nan], math.nan), ([2.0], 2.0)])
def test_too_few_values_have_no_interval(values, expected):
    found = mean(values)
    assert found.value == pytest.approx(expected, nan_ok=True)
    assert np.isnan(found[1:]).all()


def test_a_result_is_strict_json():
    result = PredictionResult(
        "P1", "claim", "criterion", "partly", "reason", "std",
        {"MFN": {"std": Estimate(0.5, 0.25, np.float64(0.75)), "none": Estimate(math.nan)}},
        "random SAE", PaperCriterion("std <= 0.1", False, "std", Estimate(0.5), "random SAE", Estimate(math.nan)),
        {"by_layer": {6: [np.int64(3), math.inf, Estimate(1.0)]}},
    )  # fmt: skip
    found = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert found["figures"]["MFN"] == {
        "std": {"value": 0.5, "low": 0.25, "high": 0.75},
        "none": {"value": None, "low": None, "high": None},
    }
    assert found["paper_criterion"]["figure"] == {"value": 0.5, "low": None, "high": None}
    assert found["details"] == {"by_layer": {"6": [3, None, {"value": 1.0, "low": None, "high": None}]}}


def test_the_papers_criterion_is_judged_by_the_figure_and_comes_back_from_json():
    figures = {MFN: {"std_now": Estimate(0.05, 0.04, 0.06)}, RANDOM_SAE: {"std_now": Estimate(0.01, 0.005, 0.02)}}

    def judged(limit, of=figures):
        return PaperCriterion.judged("small", of, "std_now", lambda std: std <= limit, RANDOM_SAE)

    assert str(judged(0.05)) == "met: std now 0.05 [0.04, 0.06] (random SAE: 0.01 [0.005, 0.02])"
    assert str(judged(0.04, {MFN: figures[MFN]})) == "not met: std now 0.05 [0.04, 0.06]"
    assert (judged(1, {}).met, str(judged(1, {}))) == (None, "not measured")
    result = PredictionResult("P1", "", "", "partly", "", "std_now", figures, RANDOM_SAE, judged(0.05))
    assert PredictionResult.from_json(json.loads(json.dumps(result.to_json()))) == result
