"""Probes of one domain on others, compared with a plain transcription."""

import math

import numpy as np
import planted
import pytest
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from modeling_mfn.evaluation.measures.probe_transfer import joined, probes_across
from modeling_mfn.evaluation.measures.tasks import Limits, Task, word_tasks
from modeling_mfn.evaluation.predictions.p5_transfer import Transfer, transfer_gap
from modeling_mfn.evaluation.result import POST_HOC_SAE
from modeling_mfn.features.activations import activations_at

WIDE = Limits(occurrences=1000, tokens=10_000, least_units=4, least_tokens=12)


def without(words, rows, seed):
    """Random text without some words."""
    ids = np.array(planted.text(rows, seed=seed)["input_ids"])
    return Dataset.from_dict({"input_ids": np.where(np.isin(ids, [planted.token_of(w) for w in words]), 5, ids)})


WINDOWS = {
    "all": planted.text(120, seed=1),
    "no foods": without(planted.FOODS, 160, seed=2),
    "tame": without(["lion", "tiger", "wolf", "bear"], 100, seed=3),
}


@pytest.fixture(scope="module")
def tasks():
    concepts = planted.CONCEPTS | {"royals": ["king", "queen", "prince"]}
    return word_tasks({"concepts": concepts}, joined(WINDOWS), planted.tokenizer(), limits=WIDE)


def transcription(model, task: Task, source, target, size):
    """Area on held-out tokens of the target, for a probe of the best features on training tokens of the source."""
    found = activations_at(model, joined(WINDOWS), task.places).codes[0].toarray()
    ends = np.cumsum([len(rows) for rows in WINDOWS.values()])
    domain = np.array([list(WINDOWS)[int((window >= ends).sum())] for window in task.places // 16])
    train, test = ~task.held_out & (domain == source), task.held_out & (domain == target)
    areas = np.array([roc_auc_score(task.labels[train], column) - 0.5 for column in found[train].T])
    best = np.argsort(-np.abs(areas).round(12), kind="stable")[:size]
    if size == 1:
        values = np.sign(areas[best[0]]) * found[:, best[0]]
    else:
        columns = found[:, best] / np.sqrt((found[train][found[train] > 0] ** 2).mean())
        probe = LogisticRegression(solver="liblinear", tol=1e-3).fit(columns[train], task.labels[train])
        values = probe.decision_function(columns)
    return roc_auc_score(task.labels[test], values[test])


@pytest.mark.parametrize("size", [1, 3])
def test_few_features_against_a_transcription(tasks, size):
    model = planted.model()
    found = probes_across(WINDOWS, tasks, num_features=size)(model, "all")
    assert [task.name for task in tasks] == ["animals", "foods"]
    for number, task in enumerate(tasks):
        for domain in WINDOWS:
            if (task.name, domain) == ("foods", "no foods"):
                assert math.isnan(found[domain][number])
            else:
                assert found[domain][number] == pytest.approx(transcription(model, task, "all", domain, size))
    assert found["tame"][0] == 1.0
    assert all(math.isnan(of[1]) for of in probes_across(WINDOWS, tasks)(model, "no foods").values())


def test_in_the_transfer_of_features(tasks):
    """A concept that one domain lacks is left out everywhere."""
    model = planted.model()
    model.set_blend(0.0)
    probes = probes_across(WINDOWS, tasks)
    subjects, concepts = {POST_HOC_SAE: [Transfer("all", model)]}, [(task.group, task.name) for task in tasks]
    figures = transfer_gap(subjects, WINDOWS, probes=probes, concepts=concepts, resamples=5).figures
    with pytest.raises(ValueError, match=f"probes have {len(tasks)} areas, and concepts are 1; give one for each"):
        transfer_gap(subjects, WINDOWS, probes=probes, concepts=concepts[:1], resamples=5)
    found = probes(model, "all")
    assert figures[POST_HOC_SAE]["probe_auroc_source"].value == pytest.approx(found["all"][0])
    assert figures[POST_HOC_SAE]["probe_auroc_targets"].value == pytest.approx(
        (found["no foods"][0] + found["tame"][0]) / 2
    )
