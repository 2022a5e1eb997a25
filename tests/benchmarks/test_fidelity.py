"""Runs of benchmarks/small/fidelity.py on a tiny base and a few random windows."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import make_base, make_mfn
from transformers import AutoModelForCausalLM

from benchmarks.common import corpora, records, small_models
from benchmarks.small import fidelity, residual_streams

TOKENS = 3 * 8 * small_models.WINDOW


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Replaces everything that a run reads by tiny data. Returns the folder that the run writes into."""
    generator = np.random.default_rng(0)
    rows = {domain: generator.integers(3, 96, (16, small_models.WINDOW)) for domain in corpora.DOMAINS}
    data = small_models.Data(rows, {domain: windows[:5] for domain, windows in rows.items()})
    make_base("llama-tied").save_pretrained(tmp_path / "base")
    monkeypatch.setenv("MFN_CACHE", str(tmp_path))
    monkeypatch.setattr(small_models, "data", lambda: data)
    monkeypatch.setattr(small_models, "base_folder", lambda family, seed, tokens: tmp_path / "base")
    monkeypatch.setattr(
        small_models.Data, "evaluation", lambda self, domain: corpora.as_data_set(self.held_out[domain])
    )
    monkeypatch.setattr(fidelity, "RESULTS", tmp_path / "results")
    return tmp_path


@torch.no_grad()
def perplexity(model, rows):
    rows = torch.tensor(rows)
    return math.exp(model(input_ids=rows, labels=rows).loss)


def test_dense_and_mfn_runs_measure_what_they_trained(small):
    held_out = small_models.data().held_out
    record = fidelity.run_dense("llama", TOKENS)
    for name, folder in (
        ("base_perplexity", small / "base"),
        ("perplexity", fidelity.dense_folder("llama", TOKENS, 0)),
    ):
        model = AutoModelForCausalLM.from_pretrained(folder)
        expected = {domain: perplexity(model, rows) for domain, rows in held_out.items()}
        assert record[name] == pytest.approx(expected, rel=1e-4), name
    assert record["base_perplexity"] != record["perplexity"]

    plain, first = (
        fidelity.run_mfn(small / str(epochs), "llama", TOKENS, k=4, teacher="dense", cached_epochs=epochs)
        for epochs in (0, 30)
    )
    assert first["settings"] == plain["settings"] | {"cached_epochs": 30}
    assert (plain["settings"]["k"], plain["settings"]["teacher"], plain["last_log"]["alpha"]) == (4, "dense", 1.0)
    for layer, figures in first["features"].items():
        assert 0 < figures["active_features"] <= 4
        assert figures["explained_variance"] > plain["features"][layer]["explained_variance"]
    kept = AutoModelForCausalLM.from_pretrained(small / "30")
    assert fidelity.perplexities(kept) == pytest.approx(first["perplexity"], rel=1e-4)
    assert set(first["perplexity"]) == set(first["perplexity_at_alpha_0"]) == set(corpora.DOMAINS)


def test_a_layer_left_out_reads_the_residual_stream(small):
    base = AutoModelForCausalLM.from_pretrained(small / "base")
    model = make_mfn(base, layers=[1])
    through = fidelity.perplexities(model)
    assert fidelity.perplexities_without(model, 1) == fidelity.perplexities(base) != through
    assert fidelity.perplexities(model) == through


def test_each_run_is_made_once_and_says_how(small, monkeypatch):
    made = []
    monkeypatch.setattr(fidelity, "runs", lambda: {name: lambda: made.append(1) or {"x": 1} for name in ("a/b", "c/d")})
    for _ in range(2):
        fidelity.main(only="a/*", threads=torch.get_num_threads())
    assert len(made) == 1
    record = json.loads((small / "results" / "a" / "b.json").read_text())
    assert record["command"] == "python -m benchmarks.small.fidelity --only a/b"
    assert record["commit"] == records.COMMIT
    assert not (small / "results" / "c").exists()


def test_what_is_no_news_of_a_token():
    """Residual streams are sums of orthogonal vectors: 3 times a constant, 2 times one per position, and one per token.

    Of the squared length 14, the constant is 9. The position explains 4 of the other 5.
    """
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(256, 256, generator=generator))[0]
    basis[:, 0] = 1 / 16  # the mean over entries, removed below as standardisation removes it
    basis = torch.linalg.qr(basis)[0][:, 1:].T
    own = basis[torch.randint(20, 250, (60, 12), generator=generator)]
    h = 7 * (3 * basis[0] + 2 * basis[1:13] + own) + 5
    active = torch.zeros(60, 12, 3)
    active[:, :7, 0] = active[::2, :, 1] = 1
    found = residual_streams.figures(h, active > 0)
    assert found["same_in_every_token"] == pytest.approx((9 + 4 / 12) / 14, abs=0.01)
    assert found["of_the_rest_told_by_position"] == pytest.approx(4 * 11 / 12 / (4 * 11 / 12 + 1), abs=0.03)
    assert found["features_active_on_most_tokens"] == 1
