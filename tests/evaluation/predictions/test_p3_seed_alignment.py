"""P3: linear CKA and matching of codes between seeds, compared with dense formulas, copies and chance."""

import json
import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
from conftest import make_base, make_mfn
from datasets import Dataset
from scipy import stats
from scipy.sparse import csr_array
from scipy.stats import ortho_group

from modeling_mfn.evaluation.intervals import Estimate
from modeling_mfn.evaluation.measures.alignment import Codes, align, linear_cka
from modeling_mfn.evaluation.predictions import p3_seed_alignment as alignment
from modeling_mfn.evaluation.predictions.p3_seed_alignment import cross_seed_alignment
from modeling_mfn.evaluation.result import MFN, POST_HOC_SAE, RANDOM_SAE

MATCHED, COSINE = "matched correlation", "matched cosine"


def windows(seed, count=40, length=12):
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_dict({"input_ids": torch.randint(3, 96, (count, length), generator=generator).tolist()})


def sparse_codes(tokens, features, seed):
    random = np.random.default_rng(seed)
    return random.exponential(size=(tokens, features)) * (random.random((tokens, features)) < 0.1)


def permuted_copy(model, seed, noise=0.0):
    """Copies a model with its features in another order and noise on their encoders."""
    copy = make_mfn(make_base(f"{model.config.text_config.model_type}-tied"))
    copy.load_state_dict(model.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in copy.mfn_layers.values():
            order = torch.randperm(layer.config.num_features)
            weight = layer.encoder.weight
            weight += noise * weight.std() * torch.randn_like(weight)
            for parameter in (weight, layer.encoder.bias, layer.decoder.weight):
                parameter.copy_(parameter[order].clone())
    return copy


def test_cka_is_that_of_the_dense_formula():
    a, b = sparse_codes(300, 20, 0), sparse_codes(300, 30, 1)
    b[:, :20] += 2 * a
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    gram_a, gram_b = centred_a @ centred_a.T, centred_b @ centred_b.T  # CKA in its other form, with Gram matrices
    expected = (gram_a * gram_b).sum() / np.linalg.norm(gram_a) / np.linalg.norm(gram_b)
    assert linear_cka(csr_array(a), csr_array(b)) == pytest.approx(expected, rel=1e-10)
    assert linear_cka(b, a) == pytest.approx(expected, rel=1e-10)
    assert 0.3 < expected < 0.99


def test_cka_does_not_see_rotation_scale_and_shift():
    a = sparse_codes(300, 20, 0)
    assert linear_cka(a, -3 * a @ ortho_group.rvs(20, random_state=2) + 5) == pytest.approx(1, rel=1e-9)
    assert linear_cka(a, a[:, ::-1]) == pytest.approx(1, rel=1e-9)
    assert linear_cka(a, sparse_codes(300, 20, 1)) < 0.1
    assert math.isnan(linear_cka(a, np.ones((300, 2))))


def test_pairs_are_chosen_on_one_text_and_measured_on_another():
    """Features 0 to 5 are equal in both models. The rest is noise that correlates only on the text of the matching."""
    model = make_mfn(make_base("llama-tied"), num_features=40)
    a, b = ([sparse_codes(200, 40, seed) for seed in seeds] for seeds in ((0, 1), (2, 3)))
    order = np.random.default_rng(5).permutation(40)
    for ours, theirs in zip(a, b, strict=True):
        theirs[:, :6] = 2 * ours[:, :6]
    a[1][:, 0] = 0  # on the held-out text one partner is silent: no correlation
    a[1][:, 1] = b[1][:, 1] = 0  # both partners are silent: the correlation is unknown
    a[0][:, 39] = a[1][:, 39] = 0  # never active: left out
    b = [each[:, order] for each in b]
    found = align(model, model, 0, Codes(*map(csr_array, a)), Codes(*map(csr_array, b)))
    assert len(found.correlations) == 39
    assert found.chosen_correlations[:6] == pytest.approx(1)
    assert found.chosen_correlations[6:].max() < 0.9
    silent, unseen = (found.correlations[:6] == 0).sum(), np.isnan(found.correlations[:6]).sum()
    assert (silent, unseen) == (1, 1)
    assert np.sort(found.correlations[:6])[1:5] == pytest.approx(1)
    assert found.chosen_correlations[6:].mean() > 0.1 > 0.03 > abs(np.nanmean(found.correlations[6:]))
    assert abs(np.nanmean(found.chance)) < 0.03
    assert found.live == pytest.approx(79 / 80)
    assert found.cka == pytest.approx(linear_cka(a[1], b[1]))
    rest = [np.delete(np.arange(200), run) for run in np.split(np.arange(200), 10)]
    assert found.cka_without == pytest.approx([linear_cka(a[1][rows], b[1][rows]) for rows in rest])
    assert found.chance_cka < 0.5 * found.cka
    assert found.cosines == pytest.approx(1)
    assert 0.9 < found.masses.sum() <= 1 + 1e-9  # each of 39 features of a, and 39 of 40 of b
    assert (found.features, found.pairs.shape) == (40, (39, 2))
    # four of all 40 features correlate; features without a partner, or with a silent one, count as not matched
    assert alignment._share([found, found], 0.9).value == pytest.approx(4 / 40)


@pytest.mark.halved
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_whole_prediction(family):
    """Copies of one model in another order align fully, copies with noise less, and different models least."""
    base = make_base(f"{family}-tied")
    model = make_mfn(base)
    noisy = [permuted_copy(model, seed, noise=0.3) for seed in (1, 2)]
    others = [make_mfn(base, seed=seed) for seed in (3, 4)]
    subjects = {MFN: [model, permuted_copy(model, 0)], POST_HOC_SAE: noisy, RANDOM_SAE: others}
    result = cross_seed_alignment(subjects, windows(0), windows(1))
    ours, theirs, random = (result.figures[name] for name in subjects)
    assert result.outcome == "confirmed"
    assert ours[MATCHED] == pytest.approx((1, 1, 1), abs=1e-4)
    assert ours["CKA"].value == pytest.approx(1, abs=1e-4)
    assert ours[COSINE].value == pytest.approx(1, abs=1e-6)
    live = ours["live features"].value
    assert live > 0.8
    # except for features that fire only on the text of the matching
    assert live - 0.03 < ours["share of features matched above 0.9"].value <= live
    assert ours[f"{MATCHED}, chance"].value < 0.1
    assert ours[MATCHED].value > theirs[MATCHED].high > theirs[MATCHED].low > random[MATCHED].high
    assert theirs[f"{MATCHED}, on the text that chose"].value > theirs[MATCHED].value
    assert random["CKA"].value > random["CKA, chance"].value
    assert result.details["difference"][POST_HOC_SAE].low > 0
    json.dumps(result.to_json(), allow_nan=False)
    swapped = cross_seed_alignment({MFN: others, POST_HOC_SAE: noisy}, windows(0), windows(1))
    assert swapped.outcome == "not confirmed"
    paper = result.paper_criterion
    assert (paper.met, paper.figure, paper.baseline_figure) == (True, ours["CKA"], random["CKA"])
    as_good = cross_seed_alignment({MFN: subjects[MFN], POST_HOC_SAE: subjects[MFN]}, windows(0), windows(1))
    assert as_good.outcome == "partly"  # above 0.8, and not above the SAEs
    assert cross_seed_alignment({MFN: noisy}, windows(0), windows(1)).outcome == "not measured"


def test_intervals_of_three_models_are_of_features_that_stand_in_two_pairs_each():
    """Compares with a direct sum over all couples of pairs that `align` matched in each layer."""
    base = make_base("llama-tied")
    models = [make_mfn(base, seed=seed, layers=[0, 2]) for seed in (3, 4, 5)]
    found = cross_seed_alignment({MFN: models}, windows(0), windows(1)).figures[MFN]
    values, ends = [], []
    for (a, b), layer in product(combinations(range(3), 2), (0, 2)):
        codes = [
            Codes(*(alignment._codes(models[of], text, 8)[layer] for text in (windows(1), windows(0)))) for of in (a, b)
        ]
        aligned = align(models[a], models[b], layer, *codes)
        values.extend(aligned.correlations)
        ends.extend({(layer, a, i), (layer, b, j)} for i, j in aligned.pairs.tolist())
    known = ~np.isnan(values)
    values, ends = np.array(values)[known], [of for of, there in zip(ends, known, strict=True) if there]
    residuals = values - values.mean()
    shared = sum(x * y for (x, p), (y, q) in product(zip(residuals, ends, strict=True), repeat=2) if p & q)
    pairs = len(set().union(*ends)) / 2
    variance = max(shared, residuals @ residuals) / len(values) ** 2 * pairs / (pairs - 1)
    margin = stats.t.ppf(0.975, pairs - 1) * math.sqrt(variance)
    assert found[MATCHED] == pytest.approx((values.mean(), values.mean() - margin, values.mean() + margin))


SURE, LOW = Estimate(0.9, 0.85, 0.95), Estimate(0.5, 0.45, 0.55)


@pytest.mark.parametrize(
    ("ours", "theirs", "difference", "seeds", "outcome"),
    [
        ((SURE, SURE), (LOW, LOW, LOW), 0.3, (0.9, 0.5), "confirmed"),
        ((SURE, LOW), (SURE, LOW, LOW), -0.1, (0.9, 0.9), "partly"),  # r > 0.8 alone
        ((SURE, LOW), (LOW, LOW, LOW), 0.3, (0.7, 0.5), "partly"),  # not in every pair of seeds
        ((LOW, LOW), (LOW, LOW, LOW), 0.1, (0.6, 0.5), "partly"),  # above the SAEs alone
        ((LOW, SURE), (LOW, LOW, LOW), -0.1, (0.5, 0.5), "partly"),  # CKA alone
        ((LOW, SURE), (LOW, SURE, LOW), -0.1, (0.5, 0.5), "not confirmed"),  # post-hoc SAEs have the CKA, too
        ((LOW, SURE), (LOW, LOW, SURE), -0.1, (0.5, 0.5), "not confirmed"),  # random SAEs have the CKA, too
    ],
)
def test_outcomes(ours, theirs, difference, seeds, outcome):
    """Matched correlation and CKA are given for MFN and for post-hoc SAEs, and the CKA for random SAEs."""
    figures = {
        MFN: {MATCHED: ours[0], "CKA": ours[1]},
        POST_HOC_SAE: {MATCHED: theirs[0], "CKA": theirs[1]},
        RANDOM_SAE: {"CKA": theirs[2]},
    }
    by_seeds = {name: {"0-1": {MATCHED: of}} for name, of in zip((MFN, POST_HOC_SAE), seeds, strict=True)}
    less = {POST_HOC_SAE: Estimate(difference, difference - 0.05, difference + 0.05)}
    assert alignment._judge(figures, less, by_seeds)[0] == outcome


def test_text_without_tokens():
    models = [make_mfn(make_base("llama-tied"), seed=seed) for seed in (1, 2)]
    with pytest.raises(ValueError, match="no token"):
        cross_seed_alignment({MFN: models}, windows(0), [])
