"""P2 from end to end, on planted models of known purity and compared with a plain scikit-learn transcription."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import planted
import pytest
import torch
from conftest import HIDDEN, make_base, make_mfn
from datasets import Dataset
from scipy.sparse import csr_array
from sklearn.metrics import roc_auc_score

from modeling_mfn.evaluation.intervals import bootstrap
from modeling_mfn.evaluation.measures.probe_scores import probe_model, probe_tokens
from modeling_mfn.evaluation.measures.probes import best_feature_information, linear_probe, scaled
from modeling_mfn.evaluation.measures.tasks import Limits, Task, word_tasks
from modeling_mfn.evaluation.predictions import p2_probe_purity as probing
from modeling_mfn.evaluation.predictions.p2_probe_purity import (
    BASE_RESIDUAL_STREAM,
    TOKEN_IDENTITY,
    probe_purity,
)
from modeling_mfn.evaluation.result import MFN, POST_HOC_SAE, RANDOM_SAE, RESIDUAL_STREAM
from modeling_mfn.features.activations import activations_at

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
    """Rotates the residual stream, so that no coordinate of h is a feature any more."""
    torch.manual_seed(3)  # with this seed no coordinate separates animals and foods by chance
    rotation = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN))[0]
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(embedding @ rotation)
        model.mfn_layers[0].encoder.weight.copy_(rotation.T)
        model.mfn_layers[0].encoder.bias.fill_(-0.05)  # keeps features silent where rounding leaves more than 0
    return model


@pytest.mark.parametrize("codes", ["stream", "update"])
def test_places_are_found_again_in_a_padded_text(family_base, codes):
    model, data = make_mfn(family_base, layers=[0, 2], codes=codes), text(23)
    ids, mask = (torch.tensor(data[name]) for name in ("input_ids", "attention_mask"))
    places = np.array([5, 17, 18, 64 + 10, 16 * 9 + 3, 16 * 22])
    found = activations_at(model, data, places, residuals=True, batch_size=2)
    streams = {}
    for layer, module in model.mfn_layers.items():
        module.register_forward_hook(lambda _, arguments, __, layer=layer: streams.update({layer: arguments[0]}))
    out = model(input_ids=ids, attention_mask=mask, output_codes=True)
    for layer in (0, 2):
        dense = out.codes[layer].to_dense().detach().flatten(0, 1)[places]
        np.testing.assert_allclose(found.codes[layer].toarray(), dense, atol=1e-4)
        residual = streams[layer].detach().flatten(0, 1)[places]
        np.testing.assert_allclose(found.residuals[layer], residual, atol=1e-4)
    with pytest.raises(ValueError, match="token 12 of window 4 is padding"):
        activations_at(model, data, np.array([5, 64 + 10, 64 + 12]))


def test_a_stream_of_updates_is_probed_through_all_codes_up_to_it(family_base):
    model, data = make_mfn(family_base, layers=[0, 2], codes="update"), text()
    tasks = tasks_of(data)
    table = probe_model(model, data, tasks, residuals=False).set_index(["layer", "task", "probe"])
    for number, task in enumerate(tasks):
        codes = activations_at(model, data, task.places).codes
        for layer, written in ((0, [codes[0]]), (2, [codes[0], codes[2]])):
            features = scaled(csr_array(np.concatenate([code.toarray() for code in written], 1)), ~task.held_out)
            expected = linear_probe(features, task, seed=0).held_out
            assert table.loc[(layer, number, "linear probe"), "held_out"] == pytest.approx(expected, abs=1e-6)


def test_planted_features_are_pure_and_memories_fail():
    """Feature 0 fires on animals and weakly on three foods, feature 1 on four animals. A random SAE has neither."""
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
    assert animals == 1.0  # the activation of 4 on foods is below all activations on animals
    assert 0.8 < foods < 1.0  # no feature separates foods from both animals and royals
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
    for name, (model,) in subjects.items():
        codes = [activations_at(model, data, task.places).codes[0] for task in tasks]
        bits = [best_feature_information(*of).held_out for of in zip(codes, tasks, strict=True)]
        assert result.figures[name]["information"].value == pytest.approx(np.mean(bits))
    assert ours["information"].value > theirs["information"].value
    memory = result.figures[TOKEN_IDENTITY]  # words are single tokens, so held-out words were never seen
    assert memory["linear probe, training"].value == 1.0
    assert memory["linear probe"].value == memory["purity"].value == 0.5
    assert TOKEN_IDENTITY not in result.details["by_layer"]

    forgetful = planted.model()
    with torch.no_grad():  # its only feature fires on the animals of the training side
        embedding = forgetful.get_input_embeddings().weight
        animals = tasks[0]
        trained_on = animals.places[animals.labels & ~animals.held_out]
        embedding.zero_()
        embedding[np.array(data["input_ids"]).ravel()[trained_on], planted.MEMORY] = 8.0
    table = probe_model(forgetful, data, tasks[:1]).set_index(["source", "probe"])
    assert table.loc[("code", "purity"), ["training", "held_out"]].tolist() == [1.0, 0.5]
    assert table.loc[("residual", "linear probe"), ["training", "held_out"]].tolist() == [1.0, 0.5]


@pytest.mark.halved
def test_averages_are_those_of_a_dense_transcription(family_base):
    """Averages two seeds and two layers. Alpha and mode of the models stay."""
    data = text()
    tasks = tasks_of(data)

    def models(alpha, *seeds):
        return [make_mfn(family_base, seed=seed, layers=[0, 2], alpha=alpha).train() for seed in seeds]

    subjects = {MFN: models(0.7, 1, 2), POST_HOC_SAE: models(0.0, 3, 5), RANDOM_SAE: models(0.0, 4)}
    result = probe_purity(subjects, data, tasks)
    assert set(result.figures) == {*subjects, RESIDUAL_STREAM, BASE_RESIDUAL_STREAM, TOKEN_IDENTITY}
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
                    areas = np.array([roc_auc_score(task.labels[train], column) - 0.5 for column in z[train].T])
                    best = np.argmax(abs(areas))
                    values.append(roc_auc_score(task.labels[test], np.sign(areas[best]) * z[test, best]))
        assert result.figures[name]["purity"].value == pytest.approx(np.mean(values), abs=0.01)
    by_layer, by_seed = result.details["by_layer"][MFN]["purity"], result.details["by_seed"]
    assert set(by_layer) == {"0", "2"}
    assert np.mean(list(by_layer.values())) == pytest.approx(result.figures[MFN]["purity"].value)
    seeds = {name: set(of["linear probe"]) for name, of in by_seed.items()}
    assert seeds == {
        MFN: {"0", "1"}, RESIDUAL_STREAM: {"0", "1"}, POST_HOC_SAE: {"0", "1"}, RANDOM_SAE: {"0"},
        BASE_RESIDUAL_STREAM: {"0"},  # the same in every seed
    }  # fmt: skip
    gains = result.details["gains_by_seed"]
    for number in (0, 1):
        ours = by_seed[MFN]["purity"][str(number)]
        theirs = by_seed[POST_HOC_SAE]["purity"][str(number)]
        assert gains["purity gain over post-hoc SAE"][number] == pytest.approx(ours / theirs - 1)
        less = by_seed[MFN]["linear probe"][str(number)] - by_seed[BASE_RESIDUAL_STREAM]["linear probe"]["0"]
        assert gains[f"linear probe less {BASE_RESIDUAL_STREAM}"][number] == pytest.approx(less)


def test_token_identity_against_counts():
    """The last token of a two-token word gives the label in nine of ten cases. Half of the words are held out."""
    generator = np.random.default_rng(0)
    labels, held_out = np.tile([True, False], 200), np.repeat([False, True], 200)
    tokens = np.where(labels ^ (generator.random(400) < 0.1), 7, generator.choice([8, 9], 400))
    windows = [{"input_ids": [3, token]} for token in tokens]
    task = Task("t", "g", np.arange(400) * 2 + 1, labels, generator.permutation(labels), np.arange(400), held_out)
    found = probe_tokens(windows, [task]).set_index("probe")["held_out"]
    expected = roc_auc_score(labels[200:], tokens[200:] == 7)
    assert found["purity"] == pytest.approx(expected)
    assert found["linear probe"] == pytest.approx(expected, abs=0.03)
    assert 0.4 < found["information"] < 0.7


LINEAR = "linear probe"
PURE = {(MFN, "code"): 0.80, (MFN, "residual"): 0.65, (POST_HOC_SAE, "code"): 0.70, (POST_HOC_SAE, "residual"): 0.64}
ALL_OF = {(MFN, "code"): 0.90, (MFN, "residual"): 0.85, (POST_HOC_SAE, "code"): 0.84, (POST_HOC_SAE, "residual"): 0.86}


def judge(monkeypatch, pure=(), linear=(), groups=("g",) * 20, by_seed=None, alpha=0.0, added=None, untold=0):
    """Runs `probe_purity` on two seeds with given areas and noise by task.

    Args:
        by_seed: (probe, seed) -> addition to the area of MFN codes.
        added: group -> addition to all areas of its tasks.
        untold: number of tasks, the first ones, in which the token alone does not give the label.
    """
    noise = np.random.default_rng(0).normal(0, 0.01, len(groups))
    noise = noise + [(added or {}).get(group, 0) for group in groups]
    areas = {"purity": PURE | dict(pure), LINEAR: ALL_OF | dict(linear)}

    def probe_model(model, windows, tasks, **settings):
        rows = []
        for source in ("code", "residual")[: 2 if settings["residuals"] else 1]:
            for probe in ("purity", "two-feature probe", "five-feature probe", LINEAR):
                at = areas.get(probe, areas["purity"])[model.name, source]
                more = (by_seed or {}).get((probe, model.seed), 0) if (model.name, source) == (MFN, "code") else 0
                rows += [(0, i, source, probe, 1.0, at + more + of, 0.5) for i, of in enumerate(noise)]
        return pd.DataFrame(rows, columns=["layer", "task", "source", "probe", "training", "held_out", "shuffled"])

    def probe_tokens(*_, seed):
        table = probe_model(SimpleNamespace(name=POST_HOC_SAE), [], [], residuals=False)
        return table.assign(held_out=np.where(table["task"] < untold, 0.54, 0.56))

    config = SimpleNamespace(alpha=alpha)
    subjects = {
        name: [SimpleNamespace(name=name, seed=seed, config=config) for seed in (0, 1)] for name in (MFN, POST_HOC_SAE)
    }
    monkeypatch.setattr(probing, "probe_model", probe_model)
    monkeypatch.setattr(probing, "probe_tokens", probe_tokens)
    place = np.zeros(1, int)
    return probe_purity(subjects, [], [Task(f"t{i}", of, *[place] * 4, place > 0) for i, of in enumerate(groups)])


@pytest.mark.parametrize(
    ("given", "outcome"),
    [
        ({}, "confirmed"),
        ({"linear": {(MFN, "code"): 0.80}}, "partly"),
        ({"linear": {(MFN, "code"): 0.855}}, "partly"),  # above its own h, below the base's
        ({"linear": {(MFN, "code"): 0.855}, "alpha": 1.0}, "confirmed"),  # at alpha 1 it does not read the base's h
        ({"pure": {(POST_HOC_SAE, "code"): 0.78}}, "partly"),  # better than the SAE, but by less than a tenth
        ({"pure": {(MFN, "residual"): 0.75}}, "partly"),
        ({"pure": {(POST_HOC_SAE, "code"): 0.78}, "linear": {(MFN, "code"): 0.80}}, "partly"),  # purer than h only
        ({"pure": {(MFN, "residual"): 0.75}, "linear": {(MFN, "code"): 0.80}}, "not confirmed"),  # than the SAE only
        ({"by_seed": {(LINEAR, 0): 0.1, (LINEAR, 1): -0.06}}, "partly"),
        ({"groups": ("g",) * 20 + ("formatting",) * 20, "added": {"formatting": -0.5}}, "confirmed"),
        ({"groups": ("formatting",) * 20}, "confirmed"),
        ({"groups": ("g",) + ("formatting",) * 20}, "not measured"),
        ({"groups": ("g", "h")}, "not measured"),
    ],
)
def test_outcomes(given, outcome, monkeypatch):
    result = judge(monkeypatch, **given)
    assert result.outcome == outcome
    assert "nan" not in result.reason
    assert ("every seed" in result.reason) == ("by_seed" in given)
    assert ("no task of words" in result.reason) == (given.get("groups") == ("formatting",) * 20)
    own, paper = result.figures[MFN], result.paper_criterion
    assert result.headline == "purity gain over h"
    over_sae = own[f"purity gain over {POST_HOC_SAE}"]
    assert (paper.met, paper.figure) == (over_sae.value >= 0.1, over_sae)
    assert paper.met == (given.get("pure", {}).get((POST_HOC_SAE, "code")) != 0.78)
    if "groups" not in given:
        noise = np.random.default_rng(0).normal(0, 0.01, 20)
        areas = PURE | given.get("pure", {})
        for name, baseline in (("post-hoc SAE", (POST_HOC_SAE, "code")), ("h", (MFN, "residual"))):
            gain = own[f"purity gain over {name}"]
            ours, theirs = areas[MFN, "code"] + noise, areas[baseline] + noise
            assert gain.value == pytest.approx(ours.mean() / theirs.mean() - 1)
            resampled = bootstrap(lambda a, b: a.mean() / b.mean() - 1, ours, theirs)
            assert gain.high - gain.low == pytest.approx(resampled.high - resampled.low, rel=0.2)
            assert f"{gain.value:+.1%}" in result.reason
    if "added" in given:
        assert own["purity, formatting"].value < 0.35
        assert own["purity"] == own["purity, g"]


def test_groups_count_alike_and_the_token_is_told_apart(monkeypatch):
    """Four tasks of parts of speech have lower areas than one of polarity and three of concepts."""
    groups = ("part of speech",) * 4 + ("polarity",) + ("concepts",) * 3
    result = judge(monkeypatch, groups=groups, added={"part of speech": -0.25}, untold=3)
    noise = np.random.default_rng(0).normal(0, 0.01, 8)
    ours = 0.80 + (noise[:4].mean() - 0.25 + noise[4] + noise[5:].mean()) / 3
    theirs = ours - 0.10
    own = result.figures[MFN]
    assert own["purity"].value == pytest.approx(ours)
    assert own["purity gain over post-hoc SAE"].value == pytest.approx(ours / theirs - 1)
    assert result.details["gains_by_seed"]["purity gain over post-hoc SAE"] == pytest.approx([ours / theirs - 1] * 2)
    assert result.details["by_seed"][MFN]["purity"]["1"] == pytest.approx(ours)
    told = "linear probe, where the token tells nothing"
    assert own[told].value == pytest.approx(0.90 - 0.25 + noise[:3].mean())
    assert own[f"{told}, less {RESIDUAL_STREAM}"].value == pytest.approx(0.05)
    assert (
        f"on the 3 of 8 tasks where the token alone tells nothing (AUROC below 0.55) it is {own[told]}" in result.reason
    )
    assert "0 of 20 tasks" in judge(monkeypatch).reason


def test_without_the_mfn_model_there_is_no_verdict():
    data = text(80)
    sae = make_mfn(make_base("gpt2-tied"), layers=[1], alpha=0.0)
    alone = probe_purity({POST_HOC_SAE: [sae]}, data, tasks_of(data)[:1])
    assert (alone.outcome, alone.reason) == ("not measured", "no MFN among the subjects")
    assert set(alone.figures) == {POST_HOC_SAE, BASE_RESIDUAL_STREAM, TOKEN_IDENTITY}
    assert np.isnan(alone.figures[POST_HOC_SAE]["purity"].low)  # one task gives no interval
    none = probe_purity({POST_HOC_SAE: [sae]}, data, [], untested={"concepts": ["dragons"]})
    assert (none.outcome, none.details) == ("not measured", {"untested": {"concepts": ["dragons"]}})
