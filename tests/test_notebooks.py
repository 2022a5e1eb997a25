"""The notebooks run from a fresh namespace, offline, and the outputs that they keep are of such a run."""

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
    """Kinds of outputs: figures differ from machine to machine."""
    return [(output["output_type"], sorted(output.get("data", {}))) for output in cell["outputs"]]
