"""P2 from end to end: planted models whose purity is known, and a plain scikit-learn transcription."""

import json

import numpy as np
import pandas as pd
import planted
import pytest
import torch
from conftest import HIDDEN, make_base, make_mfn
from datasets import Dataset
from sklearn.metrics import roc_auc_score

from modeling_mfn.evaluation import probing
from modeling_mfn.evaluation.activations import activations_at
from modeling_mfn.evaluation.information import concept_information
from modeling_mfn.evaluation.probing import BASE_RESIDUAL_STREAM, probe_model, probe_purity
from modeling_mfn.evaluation.result import MFN, POST_HOC_SAE, RANDOM_SAE, RESIDUAL_STREAM
from modeling_mfn.evaluation.tasks import Limits, Task, word_tasks

FEW = Limits(occurrences=8, tokens=60, least_units=4, least_tokens=12)


def text(rows=150):
    data = planted.text(rows=rows)
    mask = np.ones((rows, 16), int)
    mask[::4, -5:] = 0
    return Dataset.from_dict({"input_ids": data["input_ids"], "attention_mask": mask.tolist()})


def tasks_of(data):
    concepts = planted.CONCEPTS | {"royals": ["king", "queen", "prince"]}
    return word_tasks({"concepts": concepts}, data, planted.tokenizer(), limits=FEW)


def rotated(model):
    """The same features read off another basis of the residual stream: no coordinate of h is a feature any more."""
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN))[0]
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(embedding @ rotation)
        model.mfn_layers[0].encoder.weight.copy_(rotation.T)
        model.mfn_layers[0].encoder.bias.fill_(-0.05)  # what rounding leaves of 0
    return model


def test_places_are_found_again_in_a_padded_text(family_base):
    model, data = make_mfn(family_base, layers=[0, 2]), text(23)
    ids, mask = (torch.tensor(data[name]) for name in ("input_ids", "attention_mask"))
    places = np.array([5, 17, 18, 64 + 10, 16 * 9 + 3, 16 * 22])
    found = activations_at(model, data, places, residuals=True, batch_size=2)
    out = model(input_ids=ids, attention_mask=mask, output_codes=True, output_reconstructions=True)
    for layer in (0, 2):
        dense = out.codes[layer].to_dense().detach().flatten(0, 1)[places]
        np.testing.assert_allclose(found.codes[layer].toarray(), dense, atol=1e-4)
        residual = out.reconstructions[layer].residual.detach().flatten(0, 1)[places]
        np.testing.assert_allclose(found.residuals[layer], residual, atol=1e-4)


def test_planted_features_are_pure_and_memories_fail():
    """Feature 0 has animals, weakly three foods; feature 1 four animals. A random SAE has neither."""
    data = text()
    tasks = tasks_of(data)
    assert [task.name for task in tasks] == ["animals", "foods"]
    subjects = {
        MFN: [rotated(planted.model())],
        POST_HOC_SAE: [make_mfn(make_base("llama-tied"), layers=[0], num_features=HIDDEN, k=8, alpha=0.0)],
    }
    result = probe_purity(subjects, data, tasks)
    ours, theirs = result.figures[MFN], result.figures[POST_HOC_SAE]
    animals, foods = (task["held_out"][MFN]["purity"] for task in result.details["tasks"])
    assert animals == 1.0  # an activation of 4 on foods is below those on animals
    assert 0.8 < foods < 1.0  # no feature is theirs: neither animals nor foods have the royals
    assert ours["purity"].value == pytest.approx((animals + foods) / 2)
    assert theirs["purity"].value < 0.8
    assert theirs["purity, training"].value > theirs["purity"].value
    assert result.figures[RESIDUAL_STREAM]["purity"].value < 1.0
    assert result.figures[BASE_RESIDUAL_STREAM]["purity"].value < 0.8
    purity, baseline = ours["purity"].value, theirs["purity"].value
    assert ours["purity gain over post-hoc SAE"].value == pytest.approx(purity / baseline - 1)
    above_chance = (purity - 0.5) / (baseline - 0.5) - 1
    assert ours["purity gain above chance over post-hoc SAE"].value == pytest.approx(above_chance)
    assert 0.2 < ours["linear probe, shuffled labels"].value < 0.8
    assert json.loads(json.dumps(result.to_json()))["figures"][MFN]["purity"]["value"] == purity
    information = concept_information(subjects, data, tasks)
    for name in subjects:
        for figure, of in information[name].items():
            assert result.figures[name][figure].value == pytest.approx(of.value), figure
    assert information[MFN]["information"].value > information[POST_HOC_SAE]["information"].value

    forgetful = planted.model()
    with torch.no_grad():  # knows the animals of the training side alone, and nothing else
        embedding = forgetful.get_input_embeddings().weight
        animals = tasks[0]
        trained_on = animals.places[animals.labels & ~animals.held_out]
        embedding.zero_()
        embedding[np.array(data["input_ids"]).ravel()[trained_on], planted.MEMORY] = 8.0
    table = probe_model(forgetful, data, tasks[:1]).set_index(["source", "probe"])
    assert table.loc[("code", "purity"), ["training", "held_out"]].tolist() == [1.0, 0.5]
    assert table.loc[("residual", "linear probe"), ["training", "held_out"]].tolist() == [1.0, 0.5]


def test_averages_are_those_of_a_dense_transcription(family_base):
    """Two seeds, two layers; alpha and mode stay."""
    data = text()
    tasks = tasks_of(data)

    def models(alpha, *seeds):
        return [make_mfn(family_base, seed=seed, layers=[0, 2], alpha=alpha).train() for seed in seeds]

    subjects = {MFN: models(0.7, 1, 2), POST_HOC_SAE: models(0.0, 3), RANDOM_SAE: models(0.0, 4)}
    result = probe_purity(subjects, data, tasks)
    assert set(result.figures) == {*subjects, RESIDUAL_STREAM, BASE_RESIDUAL_STREAM}
    assert result.outcome in ("not confirmed", "partly")
    ids, mask = (torch.tensor(data[name]) for name in ("input_ids", "attention_mask"))
    for name, of in subjects.items():
        values = []
        for model in of:
            assert model.training
            assert model.config.alpha == {MFN: 0.7}.get(name, 0.0)
            codes = model.eval()(input_ids=ids, attention_mask=mask, output_codes=True).codes
            for task in tasks:
                for code in codes.values():
                    z = code.to_dense().flatten(0, 1)[task.places].detach().numpy()
                    train, test = ~task.held_out, task.held_out
                    difference = z[train & task.labels].mean(0) - z[train & ~task.labels].mean(0)
                    best = np.argmax(abs(difference))
                    values.append(roc_auc_score(task.labels[test], np.sign(difference[best]) * z[test, best]))
        assert result.figures[name]["purity"].value == pytest.approx(np.mean(values), abs=0.01)
    by_layer = result.details["by_layer"][MFN]["purity"]
    assert set(by_layer) == {"0", "2"}
    assert np.mean(list(by_layer.values())) == pytest.approx(result.figures[MFN]["purity"].value)
    assert set(result.details["by_seed"][MFN]["linear probe"]) == {"0", "1"}


def fabricated(values):
    """`probe_model` that finds, for a model that is a subject's name, given areas of each task."""

    def probe_model(model, windows, tasks, **settings):
        rows = []
        for source in ("code", "residual")[: 2 if settings["residuals"] else 1]:
            for probe in ("purity", "two-feature probe", "five-feature probe", "linear probe"):
                areas = values[model, source, probe == "linear probe"]
                rows += [(0, i, source, probe, 1.0, area, 0.5) for i, area in enumerate(areas)]
        return pd.DataFrame(rows, columns=["layer", "task", "source", "probe", "training", "held_out", "shuffled"])

    return probe_model


@pytest.mark.parametrize(
    ("purity", "linear", "outcome"),
    [
        (0.80, 0.90, "confirmed"),
        (0.80, 0.80, "partly"),
        (0.71, 0.90, "partly"),  # better than the SAE, but by less than a tenth
        (0.71, 0.80, "not confirmed"),
    ],
)
def test_outcomes(purity, linear, outcome, monkeypatch):
    noise = np.random.default_rng(0).normal(0, 0.01, 20)
    values = {
        (MFN, "code", False): purity + noise,
        (MFN, "residual", False): 0.65 + noise,
        (POST_HOC_SAE, "code", False): 0.70 + noise,
        (POST_HOC_SAE, "residual", False): 0.64 + noise,
        (MFN, "code", True): linear + noise,
        (MFN, "residual", True): 0.85 + noise,
        (POST_HOC_SAE, "code", True): 0.84 + noise,
        (POST_HOC_SAE, "residual", True): 0.86 + noise,
    }
    monkeypatch.setattr(probing, "probe_model", fabricated(values))
    tasks = [Task(f"t{i}", "g", *[np.zeros(1, int)] * 3, np.zeros(1, int), np.zeros(1, bool)) for i in range(20)]
    result = probe_purity({MFN: [MFN], POST_HOC_SAE: [POST_HOC_SAE]}, [], tasks)
    assert result.outcome == outcome
    gain = result.figures[MFN]["purity gain over post-hoc SAE"]
    assert gain.value == pytest.approx((purity + noise.mean()) / (0.70 + noise.mean()) - 1)
    assert gain.low <= gain.value <= gain.high
    assert f"{gain.value:+.1%}" in result.reason


def test_without_the_mfn_model_there_is_no_verdict():
    data = text(80)
    sae = make_mfn(make_base("gpt2-tied"), layers=[1], alpha=0.0)
    alone = probe_purity({POST_HOC_SAE: [sae]}, data, tasks_of(data)[:1])
    assert (alone.outcome, alone.reason) == ("not measured", "no MFN among the subjects")
    assert set(alone.figures) == {POST_HOC_SAE, BASE_RESIDUAL_STREAM}
    assert np.isnan(alone.figures[POST_HOC_SAE]["purity"].low)  # of one task there is no interval
