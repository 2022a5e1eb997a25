"""Choice of windows on which predictions are measured."""

import numpy as np
import pytest
from conftest import make_base, make_mfn, tokens
from datasets import Dataset

from modeling_mfn.evaluation import study as evidence
from modeling_mfn.evaluation.predictions.p5_transfer import Transfer
from modeling_mfn.evaluation.result import MFN
from modeling_mfn.evaluation.study import PREDICTIONS, Evidence, spread


def rows(seed):
    return Dataset.from_dict({"input_ids": tokens(24, 16, seed)["input_ids"].tolist()})


@pytest.mark.parametrize("most", [80, 87, 792])
def test_windows_that_are_taken_lie_evenly_among_all(most):
    windows = Dataset.from_dict({"input_ids": [[number] * 8 for number in range(100)]})
    assert spread(windows, 800) is spread(windows, 10**6) is windows
    taken = np.array(spread(windows, most)["input_ids"])[:, 0]
    gaps = np.diff(taken)
    assert len(taken) == most // 8
    assert (taken[0], taken[-1]) == (0, 99)
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_rates_alignment_and_transfer_are_of_no_more_tokens_than_they_need(monkeypatch):
    """Results are those of the chosen tokens alone."""
    models = [make_mfn(make_base("llama-tied"), seed=seed, layers=[1], num_features=64, k=4) for seed in (0, 1)]
    parts = {name: rows(seed) for seed, name in enumerate(("a", "b"))}
    other = rows(9)

    transfers = {MFN: [Transfer("a", model) for model in models]}

    def measured(held_out, names=("P1", "P3")):
        given = Evidence({MFN: models}, held_out, None, other, transfers=transfers)
        return [PREDICTIONS[name](given).to_json() for name in names]

    monkeypatch.setattr(Evidence, "tasks", lambda *args: [])
    whole, transfer = measured(parts), measured(parts, ["P5"])
    few = spread(Evidence({}, parts, None).windows, 12 * 16)
    monkeypatch.setattr(evidence, "MAX_TOKENS", 12 * 16)
    found = measured(parts)
    assert found == measured({"few": few})
    assert found[0]["details"]["tokens"] == {MFN: 12 * 16}
    assert all(before["figures"] != after["figures"] for before, after in zip(whole, found, strict=True))

    found = measured(parts, ["P5"])
    assert found == measured({name: spread(part, 6 * 16) for name, part in parts.items()}, ["P5"])
    assert found[0]["figures"] != transfer[0]["figures"]
