"""`benchmarks/speed/training_step.py` on this tree, compared with itself."""

from pathlib import Path

import pytest

from benchmarks.speed import training_step

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_tree_takes_the_same_step_as_itself(monkeypatch):
    monkeypatch.setattr(training_step, "ROWS", 1)
    monkeypatch.setattr(training_step, "WINDOW", 16)
    monkeypatch.setattr(training_step, "WARM_UP", 1)
    monkeypatch.setattr(training_step, "LOSSES", {"all five": training_step.LOSSES["all five"]})
    found = training_step.compare({"before": ROOT, "after": ROOT}, rounds=2, threads=1)["all five"]
    for kind in ("clock", "processor"):
        times = found[kind]
        assert min(times.values()) > 0
        assert times["ratio"] == pytest.approx(times["after"] / times["before"], rel=0.1)
    losses = found["loss_of_first_step"]
    assert losses["before"] == losses["after"]


def test_a_folder_without_the_package_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not contain modeling_mfn"):
        training_step.compare({"before": tmp_path, "after": ROOT}, rounds=1, threads=1)
