"""Notebooks run offline in a fresh namespace, and their saved outputs have the form of such a run."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
sys.path.insert(0, str(FOLDER))

from execute import executed  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("name", ["read_and_steer", "train_and_measure"])
def test_a_notebook_runs_and_keeps_its_outputs(name):
    kept = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    fresh = executed(json.loads(json.dumps(kept)))
    for before, after in zip(kept["cells"], fresh["cells"], strict=True):
        if before["cell_type"] == "code":
            assert before["outputs"], "run examples/notebooks/execute.py"
            assert shape(before) == shape(after)
            assert "\x1b" not in json.dumps(after["outputs"])


def shape(cell):
    """Kinds of a cell's outputs. Figures are left out, because they differ between machines."""
    return [(output["output_type"], sorted(output.get("data", {}))) for output in cell["outputs"]]
