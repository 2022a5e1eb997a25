"""Figures with intervals, and what is written of them."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from modeling_mfn.evaluation.result import Figure, PredictionResult, bootstrap, mean


def test_the_interval_of_a_mean_is_about_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    expected = stats.norm.interval(0.95, values.mean(), values.std(ddof=1) / 20)
    found = mean([*values, math.nan])
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(expected, abs=0.03)


def test_samples_are_resampled_together():
    """The slope of a line has no spread, however its points are drawn; that of unpaired points has."""
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
        {"MFN": {"std": Figure(0.5, 0.25, np.float64(0.75)), "none": Figure(math.nan)}},
        "random SAE", {"by_layer": {6: [np.int64(3), math.inf, Figure(1.0)]}},
    )  # fmt: skip
    found = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert found["figures"]["MFN"] == {
        "std": {"value": 0.5, "low": 0.25, "high": 0.75},
        "none": {"value": None, "low": None, "high": None},
    }
    assert found["details"] == {"by_layer": {"6": [3, None, {"value": 1.0, "low": None, "high": None}]}}
