"""Probes and information, compared with plain scikit-learn on dense arrays, and on planted codes."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_score

from modeling_mfn.evaluation.measures import probes
from modeling_mfn.evaluation.measures.probes import (
    area,
    best_feature_information,
    column_areas,
    linear_probe,
    mutual_information,
    scaled,
    sparse_probes,
)
from modeling_mfn.evaluation.measures.tasks import Task

WORDS, OCCURRENCES = 40, 6
CONCEPT, MEMORY = 0, 1


def make_task(seed=0):
    """Makes a task of words 0 to 39. Half are positive, half of either label are held out, and each occurs 6 times."""
    generator = np.random.default_rng(seed)
    units = generator.permutation(np.repeat(np.arange(WORDS), OCCURRENCES))
    label, held_out = np.arange(WORDS) % 2 == 0, np.arange(WORDS) // 2 % 2 == 0
    shuffled = label.copy()
    for side in (False, True):
        own = np.flatnonzero(held_out == side)
        shuffled[own] = label[generator.permutation(own)]
    return Task("t", "g", np.arange(len(units)), label[units], shuffled[units], units, held_out[units])


def make_codes(task, seed=0, memory_alone=False):
    """Makes codes (n, 60): one feature of the concept, one of its training words, others of words or of nothing."""
    generator = np.random.default_rng(seed)
    words = generator.random((WORDS, 60)) * (generator.random((WORDS, 60)) < 0.1)
    codes = words[task.units] + generator.random((len(task.units), 60)) * (
        generator.random((len(task.units), 60)) < 0.1
    )
    codes[:, CONCEPT] = 0 if memory_alone else task.labels * generator.uniform(2, 3, len(task.units))
    codes[:, MEMORY] = (task.labels & ~task.held_out) * 1.5
    return codes


def test_area_is_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    for levels in (3, 1000):
        values, labels = generator.integers(0, levels, 200) - 5.0, generator.random(200) < 0.3
        assert area(values, labels) == pytest.approx(roc_auc_score(labels, values), abs=1e-12)


@pytest.mark.parametrize("sparse", [True, False])
def test_probes_are_those_of_scikit_learn_on_dense_arrays(sparse, monkeypatch):
    task = make_task()
    dense = make_codes(task)
    dense[:, CONCEPT] += np.random.default_rng(1).normal(0, 2, len(dense)).clip(0)
    features = scaled(csr_array(dense) if sparse else dense, ~task.held_out)
    train, test = ~task.held_out, task.held_out
    if sparse:
        x = dense / np.sqrt((dense[train][dense[train] > 0] ** 2).mean())
    else:
        x = (dense - dense[train].mean(0)) / dense[train].std(0)
    for c in (0.03, 3.0):
        monkeypatch.setattr(probes, "STRENGTHS", (c,))
        found = linear_probe(features, task)
        for labels, rows, value in (
            (task.labels, train, found.training),
            (task.labels, test, found.held_out),
            (task.shuffled, test, found.shuffled),
        ):
            plain = LogisticRegression(C=c, solver="liblinear", tol=1e-3).fit(x[train], labels[train])
            assert value == pytest.approx(roc_auc_score(labels[rows], plain.decision_function(x[rows])), abs=2e-3)
    for size, score in sparse_probes(features, task, (1, 2, 5)).items():
        areas = [abs(roc_auc_score(task.labels[train], column) - 0.5) for column in x[train].T]
        columns = x[:, np.argsort(areas)[::-1][:size]]
        plain = LogisticRegression(solver="lbfgs", tol=1e-8).fit(columns[train], task.labels[train])
        for rows, value in ((train, score.training), (test, score.held_out)):
            expected = roc_auc_score(task.labels[rows], plain.decision_function(columns[rows]))
            assert value == pytest.approx(expected, abs=1e-9 if size == 1 else 0.03)


def test_regularisation_is_chosen_by_words_that_a_fold_has_not():
    """Weak regularisation memorises words. It scores better on folds that share words, and worse on unseen words."""
    task, generator = make_task(), np.random.default_rng(2)
    of_words = generator.random((WORDS, 200)) * (generator.random((WORDS, 200)) < 0.2)
    of_labels = task.labels[:, None] + 4 * generator.random((len(task.units), 20))
    train, test, labels = ~task.held_out, task.held_out, task.labels[~task.held_out]
    features = scaled(csr_array(np.hstack([of_words[task.units], of_labels])), train)
    regressions = [LogisticRegression(C=c, solver="liblinear", tol=1e-3) for c in probes.STRENGTHS]

    def best(folds):
        areas = [cross_val_score(each, features[train], labels, cv=folds, scoring="roc_auc") for each in regressions]
        return int(np.argmax(np.mean(areas, axis=1)))

    fitted = [each.fit(features[train], labels).decision_function(features[test]) for each in regressions]
    held_out = [roc_auc_score(task.labels[test], values) for values in fitted]
    by_words = StratifiedGroupKFold(3, shuffle=True, random_state=5).split(labels, labels, task.units[train])
    chosen, by_heart = best(list(by_words)), best(StratifiedKFold(3, shuffle=True, random_state=5))
    assert linear_probe(features, task, seed=5).held_out == pytest.approx(held_out[chosen], abs=1e-12)
    assert chosen < by_heart
    assert held_out[chosen] > held_out[by_heart] + 0.05


def test_nothing_is_learnt_from_the_held_out_side():
    task = make_task()
    codes = make_codes(task)
    other = codes.copy()
    other[task.held_out] = np.random.default_rng(9).random((task.held_out.sum(), 60)) * 7
    for probe in (linear_probe, lambda *given: sparse_probes(*given)[5]):
        for kind in (csr_array, np.asarray):
            first, second = (probe(scaled(kind(of), ~task.held_out), task) for of in (codes, other))
            assert first.training == second.training
            assert first.held_out != second.held_out
    first, second = (best_feature_information(csr_array(of), task) for of in (codes, other))
    assert first.training == second.training


def test_a_feature_of_the_concept_is_pure_and_one_of_words_is_not():
    task = make_task()
    pure, by_heart = (csr_array(make_codes(task, memory_alone=alone)) for alone in (False, True))
    found = sparse_probes(scaled(pure, ~task.held_out), task)
    assert found[1][:2] == (1.0, 1.0)
    assert best_feature_information(pure, task)[:2] == pytest.approx((1.0, 1.0))
    assert linear_probe(scaled(pure, ~task.held_out), task).held_out > 0.99
    memorised = sparse_probes(scaled(by_heart, ~task.held_out), task)
    assert memorised[1].training == 1.0
    assert memorised[1].held_out == 0.5
    information = best_feature_information(by_heart, task)
    assert information.training == pytest.approx(1.0)
    assert information.held_out == pytest.approx(0.0, abs=1e-12)


def test_shuffled_labels_are_at_chance():
    scores, information = [], []
    for seed in range(30):
        task = make_task(seed)
        codes = csr_array(make_codes(task, seed))
        features = scaled(codes, ~task.held_out)
        scores.append([linear_probe(features, task).shuffled, sparse_probes(features, task)[1].shuffled])
        information.append(best_feature_information(codes, task).shuffled)
    assert np.mean(scores, 0) == pytest.approx(0.5, abs=0.06)
    assert np.std(scores) > 0.02  # none is 0.5 by construction
    assert np.mean(information) < 0.06


def test_information_is_that_of_scikit_learn():
    task = make_task()
    codes = make_codes(task)
    codes[:, 7], codes[:, 8] = 0, 1  # never and always
    bits = mutual_information(csr_array(codes), task.labels)
    expected = [mutual_info_score(task.labels, column > 0) / np.log(2) for column in codes.T]
    np.testing.assert_allclose(bits, expected, atol=1e-12)
    codes[:, CONCEPT] *= np.random.default_rng(0).random(len(codes)) < 0.5
    found = best_feature_information(csr_array(codes), task)
    train, test = ~task.held_out, task.held_out
    best = np.argmax([mutual_info_score(task.labels[train], column > 0) for column in codes[train].T])
    assert found.held_out == pytest.approx(
        mutual_info_score(task.labels[test], codes[test, best] > 0) / np.log(2), abs=1e-12
    )


@pytest.mark.parametrize("kind", [csr_array, np.asarray])
def test_areas_of_columns_are_those_of_scikit_learn(kind):
    generator = np.random.default_rng(0)
    labels = generator.random(300) < 0.4
    columns = generator.exponential(size=(300, 40)) * (generator.random((300, 40)) < 0.2)
    columns[:, :10] = columns[:, :10].round()  # ties
    columns[:, 0], columns[:, 1], columns[:, 2] = 0, labels, 1 - labels
    expected = [roc_auc_score(labels, column) for column in columns.T]
    assert column_areas(kind(columns), labels) == pytest.approx(expected)
    assert expected[:3] == [0.5, 1, 0]


def test_a_clean_feature_is_chosen_before_a_strong_one():
    """The second feature fires ten times as strongly, and also on half of the other training words."""
    task = make_task()
    generator = np.random.default_rng(0)
    codes = np.zeros((len(task.units), 2))
    codes[:, 0] = task.labels * (generator.random(len(task.units)) < 0.8)
    codes[:, 1] = 10 * (task.labels | (task.units % 8 == 3)) * generator.random(len(task.units))
    for kind in (csr_array, np.asarray):
        probe = sparse_probes(scaled(kind(codes), ~task.held_out), task, (1,))[1]
        assert probe.held_out == pytest.approx(area(codes[task.held_out, 0], task.labels[task.held_out]))
