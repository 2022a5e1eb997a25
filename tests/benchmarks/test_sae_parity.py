"""`benchmarks/smollm2/sae_parity.py` on a tiny base, with a stand-in for sparsify."""

import json

import numpy as np
import pytest
import torch
from conftest import HIDDEN, make_base

from benchmarks.common import corpora, small_models
from benchmarks.smollm2 import sae_parity, sparsify_baseline
from modeling_mfn.evaluation.baselines.saes import training_order
from modeling_mfn.evaluation.measures.reconstruction import reconstruction_errors


def explained(sae, windows):
    errors, distances = reconstruction_errors(sae, windows)
    return 1 - errors.sum(0) / distances.sum(0)


def test_each_learns_from_the_same_rows_and_is_measured_on_held_out_text(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    rows = {domain: generator.integers(3, 96, (40, small_models.WINDOW)) for domain in corpora.DOMAINS}
    data = small_models.Data(rows, {domain: windows[:9] for domain, windows in rows.items()})
    make_base("llama-tied").save_pretrained(tmp_path / "base")
    monkeypatch.setattr(small_models, "data", lambda: data)
    monkeypatch.setattr(small_models, "base_folder", lambda *_: tmp_path / "base")
    monkeypatch.setattr(small_models, "HIDDEN", HIDDEN)
    small = {"VALIDATION_TOKENS": 768, "HELD_OUT_TOKENS": 256, "RATES": (1e-4, 1e-2), "SIGNUM_SHARES": (1,), "K": 8}
    for name, value in ({"RESULTS": tmp_path} | small).items():
        monkeypatch.setattr(sae_parity, name, value)
    monkeypatch.setattr(sae_parity, "version", lambda name: "1")
    trained, asked, train_ours = [], [], sae_parity.train_ours

    def ours(sae, cache, rows, rate, seed):
        train_ours(sae, cache, rows, rate, seed)
        trained.append((sae, list(rows), rate))

    def theirs(sae, cache, rows, folder, **settings):
        asked.append((list(rows), settings["optimizer"], settings["lr"]))

    monkeypatch.setattr(sae_parity, "train_ours", ours)
    monkeypatch.setattr(sparsify_baseline, "train", theirs)
    sae_parity.main("llama", 64 * small_models.WINDOW, epochs=2, seed=1, threads=torch.get_num_threads())

    record = json.loads((tmp_path / "sae_parity.json").read_text())
    methods, windows = record["methods"], sae_parity.texts(64 * small_models.WINDOW, seed=1)
    order = training_order(len(windows["train"]), 2, 16, seed=1)
    short, (sae, _, rate) = order[:16], trained[-1]
    assert [found[1] for found in trained] == [short, short, order]
    assert [(rows, name) for rows, name, _ in asked] == [(short, "adam")] * 2 + [(order, "adam")] + [
        (short, "signum"),
        (order, "signum"),
    ]
    tried = methods["modeling_mfn"]["sweep"]["tried"]
    assert methods["modeling_mfn"]["learning_rate"] == rate == float(max(tried, key=tried.get)) == 1e-2
    found = list(methods["modeling_mfn"]["explained_variance"].values())
    expected = explained(sae, windows["held_out"])
    assert found == pytest.approx([*expected, expected.mean()], abs=1e-3)
    validation = explained(trained[1][0], windows["validation"]).mean()
    assert tried["0.01"] == pytest.approx(validation, abs=1e-3)
    best = max(of["explained_variance"]["mean"] for name, of in methods.items() if name != "modeling_mfn")
    assert record["ours_less_best_of_sparsify"] == pytest.approx(found[-1] - best, abs=1e-4)
