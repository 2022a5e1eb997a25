"""What losses and settings do, from both seeds of tiny models: against the probes of each, and by hand."""

import json
from types import SimpleNamespace

import corpora
import numpy as np
import pytest
import sensitivity
import tables
import torch
from conftest import make_base, make_mfn
from datasets import Dataset

from modeling_mfn.evaluation.alignment import cross_seed_alignment
from modeling_mfn.evaluation.probing import probe_model
from modeling_mfn.evaluation.result import MFN
from modeling_mfn.evaluation.tasks import Task

WINDOWS, T = 40, 12
LOSS = {"losses/five": 40.0, "noise/five-seed-1": 44.0, "losses/with-rate": 42.0, "twin/with-rate": 55.0}
LOSS |= {"short/recon-util": 20.0, "sweep/alpha-0.5": 15.0}
"""Run -> its perplexity in each domain."""


def add_run(folder, name, seed):
    model = make_mfn(make_base("llama-tied"), seed=seed, layers=[1], num_features=64, k=4)
    model.set_blend(0.5 if "alpha" in name else 1.0)
    model.save_pretrained(folder / "fidelity" / "llama" / name)
    file = folder / "results" / "llama" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"perplexity": dict.fromkeys(corpora.DOMAINS, LOSS[name])}))
    return model


@pytest.fixture
def texts():
    random = np.random.default_rng(0)
    held_out, choosing = (
        Dataset.from_dict({"input_ids": random.integers(3, 96, (WINDOWS, T)).tolist()}) for _ in range(2)
    )
    places = np.sort(random.choice(WINDOWS * T, 200, replace=False))
    labels = np.array(held_out["input_ids"]).ravel()[places] < 50
    task = Task("low", "concepts", places, labels, random.permutation(labels), np.arange(200), np.arange(200) % 2 == 0)
    return SimpleNamespace(held_out=held_out, choosing=choosing, tasks=[task])


def test_a_run_is_held_against_its_reference_seed_by_seed(tmp_path, monkeypatch, texts):
    monkeypatch.setenv("MFN_CACHE", str(tmp_path))
    monkeypatch.setattr(tables, "FIDELITY", tmp_path / "results")
    monkeypatch.setattr(sensitivity, "RESULTS", tmp_path / "sensitivity")
    monkeypatch.setattr(sensitivity, "FIGURE", tmp_path / "figure.svg")
    monkeypatch.setattr(sensitivity, "Texts", lambda: texts)
    models = {name: add_run(tmp_path, name, seed) for seed, name in enumerate(LOSS) if name != "twin/with-rate"}
    sensitivity.main(threads=torch.get_num_threads())
    one_seed = json.loads((tmp_path / "sensitivity" / "summary.json").read_text())["losses/with-rate"]
    assert (one_seed["purity"]["seeds"], one_seed["perplexity, %"]["value"]) == (1, pytest.approx(5))
    assert sensitivity.ALIGNMENT not in one_seed

    models["twin/with-rate"] = add_run(tmp_path, "twin/with-rate", 9)
    sensitivity.main(threads=torch.get_num_threads())
    found = json.loads((tmp_path / "sensitivity" / "summary.json").read_text())
    purity = {}
    for name, model in models.items():
        table = probe_model(model, texts.held_out, texts.tasks, residuals=False)
        purity[name] = table[table["probe"] == "purity"]["held_out"].mean()
    less = [
        purity[name] - purity[of]
        for name, of in (("losses/with-rate", "losses/five"), ("twin/with-rate", "noise/five-seed-1"))
    ]
    of = found["losses/with-rate"]
    assert of["against"] == "losses/five"
    assert of["purity"] == pytest.approx({"value": np.mean(less), "low": min(less), "high": max(less), "seeds": 2})
    assert of["perplexity, %"] == pytest.approx({"value": 15, "low": 5, "high": 25, "seeds": 2})
    alike = [
        cross_seed_alignment({MFN: [models[name] for name in pair]}, texts.held_out, texts.choosing).figures[MFN]
        for pair in (("losses/with-rate", "twin/with-rate"), ("losses/five", "noise/five-seed-1"))
    ]
    expected = alike[0]["matched correlation"].value - alike[1]["matched correlation"].value
    assert of[sensitivity.ALIGNMENT]["value"] == pytest.approx(expected)

    blend = found["sweep/alpha-0.5"]
    assert (blend["against"], blend["alpha"], of["alpha"]) == ("short/recon-util", 0.5, 1.0)
    assert blend["perplexity, %"]["value"] == pytest.approx(-25)
    assert (tmp_path / "figure.svg").exists()

    monkeypatch.setattr(sensitivity, "measure", lambda *args: pytest.fail("this was there"))
    sensitivity.main(threads=torch.get_num_threads())
