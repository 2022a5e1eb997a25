"""The scripts that people copy from, on a tiny model."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from conftest import make_base
from test_data import make_tokenizer

from modeling_mfn import MFNForCausalLM, data

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(("large", "from_file"), [(100, False), (2**27, True)], ids=["streamed", "in memory"])
def test_the_training_script(tmp_path, monkeypatch, large, from_file):
    """Its own defaults hold wherever arguments come from, and text of any length trains."""
    monkeypatch.setattr(data, "LARGE", large)
    make_base("llama-tied").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("a line, and another line.\n" * 40)
    out = tmp_path / "out"
    given = {"model": str(tmp_path / "base"), "text": [str(tmp_path / "text.txt")], "output_dir": str(out)}
    given |= {"layers": "1", "k": 4, "window": 16, "held_out_rows": 4, "max_steps": 3, "learning_rate": 2e-3}
    given |= {"use_cpu": True, "disable_tqdm": True}
    if from_file:
        (tmp_path / "arguments.json").write_text(json.dumps(given))
        line = [str(tmp_path / "arguments.json")]
    else:
        lists = {name: value if isinstance(value, list) else [str(value)] for name, value in given.items()}
        line = [word for name, words in lists.items() for word in (f"--{name}", *words)]
    monkeypatch.setattr("sys.argv", ["train_mfn.py", *line])
    spec = importlib.util.spec_from_file_location("train_mfn", EXAMPLES / "train_mfn.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_mfn", script)  # dataclasses look their module up
    spec.loader.exec_module(script)
    script.main()
    record = json.loads((out / "training_record.json").read_text())
    assert (record["steps"], record["tokens"]) == (3, 3 * 2 * 16)
    assert record["arguments"]["learning_rate"] == 2e-3
    assert record["arguments"]["per_device_train_batch_size"] == 2
    assert "eval_recon_loss" in json.loads((out / "eval_results.json").read_text())
    assert MFNForCausalLM.from_pretrained(out).config.layers == [1]
