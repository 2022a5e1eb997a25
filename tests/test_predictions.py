"""The study of benchmarks/predictions.py on a tiny base and a few random windows."""

import corpora
import numpy as np
import predictions
import pytest
import small_models
import torch
from conftest import VOCABULARY, make_base
from test_data import make_tokenizer
from transformers import AutoModelForCausalLM

from modeling_mfn.evaluation.result import MFN, NO_RATE_LOSS, POST_HOC_SAE, RANDOM_SAE
from modeling_mfn.evaluation.transfer import FINE_TUNED_SAE

WINDOW = 16


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base("llama-tied").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return predictions.Study(
        name="tiny", base=folder, window=WINDOW, layers=(1,), num_features=64, tokens=48 * WINDOW,
        held_out_tokens=6 * WINDOW, learning_rate=1e-3, seeds=2,
    )  # fmt: skip


def test_every_subject_learns_from_the_same_tokens_and_is_kept(study, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    rows = {
        part: {d: random.integers(3, VOCABULARY, (n, WINDOW)) for d in corpora.DOMAINS}
        for part, n in (("train", 300), ("held_out", 12))
    }
    data = small_models.Data(**rows)
    monkeypatch.setenv("MFN_CACHE", str(tmp_path))
    monkeypatch.setattr(small_models, "tokenised", lambda *args: data)
    monkeypatch.setattr(predictions.concepts, "concepts", lambda: {"a": ["one", "two"], "b": ["three"]})
    monkeypatch.setattr(predictions.word_lists, "polarity", dict)
    monkeypatch.setattr(predictions.word_lists, "parts_of_speech", dict)
    monkeypatch.setattr(predictions, "K", 4)
    monkeypatch.setattr(predictions, "EPOCHS", 1)
    monkeypatch.setattr(small_models, "EVALUATION_TOKENS", 4 * WINDOW)
    found = []
    monkeypatch.setattr(predictions, "measure_predictions", lambda *given: found.append(given))
    predictions.run(study, ["P1", "P5"], torch.get_num_threads())
    ((evidence, names, settings, folder),) = found

    assert names == ["P1", "P5"]
    assert folder.name == "tiny"
    assert settings["seeds"] == 2
    assert str(study.base) not in str(settings)
    alphas = {name: [model.config.alpha for model in models] for name, models in evidence.subjects.items()}
    assert alphas == {MFN: [1, 1], NO_RATE_LOSS: [1], POST_HOC_SAE: [0, 0], RANDOM_SAE: [0, 0]}
    sizes = {
        (m.config.num_features, m.config.k, tuple(m.config.layers)) for of in evidence.subjects.values() for m in of
    }
    assert sizes == {(64, 4, (1,))}
    base = AutoModelForCausalLM.from_pretrained(study.base)
    rows = torch.tensor(evidence.held_out["code"]["input_ids"])
    for sae in evidence.subjects[POST_HOC_SAE]:
        assert torch.equal(sae(rows).logits, base(rows).logits)
    first, second = evidence.subjects[MFN]
    assert not torch.equal(first(rows).logits, second(rows).logits)

    taken = [{tuple(row) for row in study.rows(None, seed)["input_ids"]} for seed in (0, 1)]
    assert not taken[0] & taken[1]
    assert not {tuple(row) for row in evidence.choosing["input_ids"]} & (taken[0] | taken[1])
    of_domain = [study.rows("code", seed)["input_ids"] for seed in (0, 1)]
    assert of_domain[0] != of_domain[1]
    assert sorted(of_domain[0]) == sorted(of_domain[1])
    assert {tuple(row) for row in of_domain[0]} <= set(map(tuple, data.train["code"].tolist()))
    usual = {tuple(row) for row in data.evaluation("code", 4 * WINDOW)["input_ids"]}
    assert not {tuple(row) for row in evidence.held_out["code"]["input_ids"]} & usual

    assert {name: len(of) for name, of in evidence.transfers.items()} == {MFN: 2, POST_HOC_SAE: 2, FINE_TUNED_SAE: 2}
    for tuned, plain in zip(evidence.transfers[FINE_TUNED_SAE], evidence.transfers[POST_HOC_SAE], strict=True):
        assert set(tuned.tuned) == set(corpora.DOMAINS) - {predictions.SOURCE}
        weights = [each.mfn_layers[1].encoder.weight for each in (plain.model, *tuned.tuned.values())]
        assert not torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[1], weights[2])
    for of_mfn, of_sae in zip(evidence.transfers[MFN], evidence.transfers[POST_HOC_SAE], strict=True):
        dense = of_mfn.reference(rows).logits
        assert not torch.equal(dense, base(rows).logits)
        assert torch.equal(of_sae.model(rows).logits, dense)  # both lose against the same model

    def fail(*args, **kwargs):
        raise AssertionError("this was there")

    monkeypatch.setattr(predictions, "MFNTrainer", fail)
    predictions.run(study, ["P1"], torch.get_num_threads())
    assert found[1][0].transfers == {}
    monkeypatch.setattr(predictions, "JOINT", predictions.JOINT | {"mfn_learning_rate": 1e-3})
    with pytest.raises(AssertionError, match="this was there"):  # made with other settings, so made again
        predictions.run(study, ["P1"], torch.get_num_threads())
