"""Automatic labels: planted features get them, memorised tokens do not, and figures equal a brute-force count."""

import itertools
import re

import numpy as np
import planted
import pytest
import torch
from conftest import VOCABULARY
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from modeling_mfn import FeatureAtlas
from modeling_mfn.features.labelling.automatic import WINDOWS_PER_RUN, label_features
from modeling_mfn.features.labelling.concepts import (
    HELD_IN,
    HELD_OUT,
    LEFT_OUT,
    ORDINARY,
    Lexicon,
    WordFinder,
    token_halves,
)
from modeling_mfn.features.labelling.separation import LEVELS, effective_number, level_of_bins
from modeling_mfn.features.labelling.token_sets import choose_tokens
from modeling_mfn.utils.roc import auroc


@pytest.fixture(scope="module")
def data():
    return planted.text()


@pytest.fixture(scope="module")
def built(data):
    model = planted.model()
    return model, FeatureAtlas.build(model, planted.tokenizer(), data, progress=False)


def label(built, data, concepts=planted.CONCEPTS, **options):
    model, atlas = built
    options = {"min_occurrences": 20, "min_words": 3, "progress": False} | options
    return label_features(atlas, model, planted.tokenizer(), data, concepts, **options)


def test_planted_features_get_their_labels_and_others_none(built, data):
    atlas = built[1]
    atlas.label((0, planted.RANDOM), "mine")
    atlas.label((0, planted.RANDOM), "of an earlier run", source="automatic")
    report = label(built, data)
    (animal,) = atlas[0, planted.ANIMAL].labels
    assert (animal.label, animal.source, animal.details["method"]) == ("animals", "automatic", "concept")
    # the feature fires on some foods, too, but below the threshold
    assert {name: animal.details[name] for name in ("threshold", "precision", "recall", "auroc", "auroc_words")} == {
        "threshold": 8.0, "precision": 1.0, "recall": 1.0, "auroc": 1.0, "auroc_words": 1.0,
    }  # fmt: skip
    assert atlas[0, planted.ANY_WORD].labels == []
    (kings,) = atlas[0, planted.KINGS].labels
    assert set(re.findall("' (.*?)'", kings.label)) == {"king", "queen", "prince"}
    assert (kings.details["method"], kings.details["precision"], kings.details["recall"]) == ("tokens", 1.0, 1.0)
    (memory,) = atlas[0, planted.MEMORY].labels
    assert memory.details["method"] == "tokens"
    assert [each.label for each in atlas[0, planted.RANDOM].labels] == ["mine"]
    assert (report.labelled, report.token_sets, report.control) == (1, 2, 0)
    assert report.concepts[0].features == 1
    assert report.tokens == 96 * 15


@pytest.mark.parametrize("side", [HELD_IN, HELD_OUT])
def test_a_feature_that_knows_the_words_of_one_half_alone_has_no_concept(data, side):
    lexicon = Lexicon.of(planted.CONCEPTS, seed=0)
    half = [
        word for word, at in zip(lexicon.words, lexicon.half, strict=True) if at == side and word in planted.ANIMALS
    ]
    model = planted.model(remembered=half)
    atlas = FeatureAtlas.build(model, planted.tokenizer(), data, progress=False)
    label((model, atlas), data, min_auroc=0.75)
    assert [each.details["method"] for each in atlas[0, planted.MEMORY].labels] == ["tokens"]
    with_all = planted.model(remembered=planted.ANIMALS)
    atlas = FeatureAtlas.build(with_all, planted.tokenizer(), data, progress=False)
    label((with_all, atlas), data, min_auroc=0.75)
    assert [each.label for each in atlas[0, planted.MEMORY].labels] == ["animals"]


@pytest.mark.parametrize("concepts", [planted.CONCEPTS, planted.CONCEPTS | {"pets": ["dog", "cat", "mouse", "fish"]}])
def test_every_figure_is_that_of_sklearn_and_of_counting(built, data, concepts):
    """Figures are exact, because activations are powers of 2 and no two share a level."""
    model, atlas = built
    label(built, data, concepts, min_auroc=0.0, min_occurrences=1, min_words=1, seed=5)
    z = model(torch.tensor(data["input_ids"]), output_codes=True).codes[0].to_dense().detach().numpy()[:, 1:]
    z, ids = z.reshape(-1, z.shape[-1]), np.array(data["input_ids"])[:, 1:].ravel()
    lexicon = Lexicon.of(concepts, seed=5)
    half_of = token_halves(VOCABULARY, 5)
    half_of[[planted.token_of(word) for word in lexicon.words]] = lexicon.half
    half, word = half_of[ids], ids >= planted.FIRST
    word &= ~np.isin(ids, [planted.token_of(each) for each in ("king", "queen", "prince")])
    members = {name: np.isin(ids, [planted.token_of(each) for each in words]) for name, words in concepts.items()}

    def area(name, feature, side, within):
        return roc_auc_score(members[name][within & (half == side)], z[within & (half == side), feature])

    compared = 0
    for feature in range(z.shape[1]):
        (found,) = [each for each in atlas[0, feature].labels if each.source == "automatic"] or [None]
        if found is None or found.details["method"] != "concept":
            continue
        compared += 1
        held_in = {name: min(area(name, feature, HELD_IN, word), area(name, feature, HELD_IN, word | True))
                   for name in concepts}  # fmt: skip
        details, name = found.details, found.label
        assert held_in[name] == pytest.approx(max(held_in.values()), abs=1e-6)
        assert details["auroc_held_in"] == pytest.approx(held_in[name], abs=1e-6)
        assert details["auroc"] == pytest.approx(area(name, feature, HELD_OUT, word | True), abs=1e-6)
        assert details["auroc_words"] == pytest.approx(area(name, feature, HELD_OUT, word), abs=1e-6)
        assert found.score == min(details["auroc"], details["auroc_words"])

        def f1(threshold, name=name, feature=feature):
            fires, true = z[half == HELD_IN, feature] >= threshold, members[name][half == HELD_IN]
            return 2 * (fires & true).sum() / (fires.sum() + true.sum())

        thresholds = set(z[z[:, feature] > 0, feature].tolist())
        if details["threshold"]:
            assert f1(details["threshold"]) == max(map(f1, thresholds))
        else:
            assert f1(min(thresholds)) == max(map(f1, thresholds))
        fires = (z[:, feature] >= details["threshold"]) & (z[:, feature] > 0) & (half == HELD_OUT)
        true = members[name] & (half == HELD_OUT)
        assert details["precision"] == pytest.approx((fires & true).sum() / max(fires.sum(), 1), abs=1e-6)
        assert details["recall"] == pytest.approx((fires & true).sum() / true.sum(), abs=1e-6)
        assert (details["occurrences"], details["words"]) == (true.sum(), len(set(ids[true])))
    assert compared > 12


def test_token_sets_are_counted_on_the_other_half_of_the_text(built, data):
    model, atlas = built
    rows = data.map(lambda row, at: {"at": at}, with_indices=True)
    second = rows.filter(lambda row: row["at"] // WINDOWS_PER_RUN % 2 == 1)
    z = model(torch.tensor(second["input_ids"]), output_codes=True).codes[0].to_dense()[:, 1:, planted.KINGS] > 0
    report = label(built, data, {})
    assert report.labelled == report.control == 0
    (kings,) = atlas[0, planted.KINGS].labels
    assert kings.details["firings"] == int(z.sum())


def test_shuffled_words_are_labelled_where_words_are_all_that_a_feature_tells(data):
    """With a single concept of all words, shuffling changes nothing. The control labels equally many features."""
    concepts = {"all": planted.ANIMALS + planted.FOODS}
    model = planted.model()
    atlas = FeatureAtlas.build(model, planted.tokenizer(), data, progress=False)
    report = label((model, atlas), data, concepts)
    assert report.labelled == report.control == 1
    assert "auroc_words" not in atlas[0, planted.ANY_WORD].labels[0].details


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=60))
def test_auroc_of_counts(values):
    levels, positive = (np.array(column) for column in zip(*values, strict=True))
    counts = [np.bincount(levels[positive == side], minlength=7) for side in (True, False)]
    if positive.all() or not positive.any():
        assert np.isnan(auroc(*counts))
    else:
        assert auroc(*counts) == pytest.approx(roc_auc_score(positive, levels), abs=1e-12)


@given(st.lists(st.integers(0, 50), min_size=114, max_size=114))
def test_levels_are_in_order_and_alike(histogram):
    histogram = np.array(histogram)
    if sum(histogram > 0) > 3 * LEVELS:
        histogram[::7] *= 40
    (levels,) = level_of_bins(histogram[None])
    assert (np.diff(levels) >= 0).all()
    assert 0 <= levels.min() <= levels.max() < LEVELS
    held = np.bincount(levels, histogram, LEVELS)
    # no level exceeds its share by more than one bin
    assert held.max() <= histogram.sum() / LEVELS + histogram.max()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6), st.integers(0, 20))
def test_the_chosen_tokens_have_the_best_f1(counts, elsewhere):
    on = np.array([a for a, _ in counts])
    occurrences = on + np.array([b for _, b in counts])
    firings = int(on.sum()) + elsewhere
    chosen = choose_tokens(on, occurrences, firings)

    def f1(of):
        of = list(of)
        return 2 * on[of].sum() / (occurrences[of].sum() + firings) if of else 0.0

    every = itertools.chain.from_iterable(itertools.combinations(range(len(on)), n) for n in range(len(on) + 1))
    assert f1(chosen) == pytest.approx(max(map(f1, every)) if firings else 0.0)


def test_effective_words():
    assert effective_number(np.array([7, 7, 7, 0])) == pytest.approx(3)
    assert effective_number(np.array([1000, 1, 1, 1, 1])) < 1.02
    assert effective_number(np.array([0, 0])) == 0


def byte_level_tokenizer(text):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([text], trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def test_words_are_found_where_a_regular_expression_finds_them():
    text = (
        "The king and a King saw the kingdom; (king) KING\nking, kings. A mouse, two mice in the ice cream of Paris: "
        "paris ice creamery cream, Ice cream. a hippopotamus, hippopotamuses king"
    )
    tokenizer = byte_level_tokenizer("the king the king a King mouse ice cream " * 50)
    concepts = {"royal": ["king"], "things": [["mouse", "mice"], "ice cream", "hippopotamus"], "places": ["Paris"]}
    lexicon = Lexicon.of(concepts, seed=0)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    finder = WordFinder(lexicon, tokenizer, texts)
    encoded = tokenizer(text, return_offsets_mapping=True)
    found = finder.find(np.array([encoded["input_ids"]]))[0]
    expected = {}
    for at, forms in enumerate(lexicon.forms):
        for form in forms:
            pattern = rf"(?<= )({form}|{form[:1].upper()}{form[1:]})(?![A-Za-z0-9])"
            expected |= {match.end(): at for match in re.finditer(pattern, text)}
    ends = [end for _, end in encoded["offset_mapping"]]
    assert {end: at for end, at in zip(ends, found.tolist(), strict=True) if at >= 0} == expected
    assert len(expected) == 9
    left_out = {end for end, at in zip(ends, found.tolist(), strict=True) if at == LEFT_OUT}
    assert text.index("kingdom") + 4 in left_out  # " king" is continued by "dom"
    assert text.index("(king)") + 5 in left_out
    assert set(found.tolist()) - set(expected.values()) == {ORDINARY, LEFT_OUT}


def test_words_stay_together_and_concepts_are_halved():
    concepts = {"a": [["x", "xs"], "y", "z", "v"], "b": ["z", "u", ["x", "xes"]]}
    lexicon = Lexicon.of(concepts, seed=3)
    assert lexicon.words == ["x", "y", "z", "v", "u"]
    assert lexicon.forms[0] == ("x", "xs", "xes")
    assert lexicon.concepts.tolist() == [[0, 1], [0, -1], [0, 1], [0, -1], [1, -1]]
    assert sorted(lexicon.half[:4].tolist()) == [0, 0, 1, 1]
    many = Lexicon.of({"a": [f"a{i}" for i in range(40)], "b": [f"b{i}" for i in range(20)]}, seed=0)
    for side in (HELD_IN, HELD_OUT):
        own = many.half == side
        assert np.bincount(many.concepts[own, 0]).tolist() == np.bincount(many.shuffled[own, 0]).tolist() == [20, 10]
    assert (many.concepts != many.shuffled).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concepts": ["dog"]}, "concepts are a list"),
        ({"concepts": {"": ["dog"]}}, "a concept is called ''"),
        ({"concepts": {"animals": "dog"}}, "concept 'animals' is 'dog'"),
        ({"concepts": {"animals": ["dog", 3]}}, "concept 'animals' has 3"),
        ({"min_auroc": 90}, "min_auroc is 90"),
        ({"tokens": 0}, "tokens is 0"),
        ({"data": []}, "no rows with input_ids"),
    ],
)
def test_bad_input_is_named(built, data, options, message):
    options = {"data": data} | options
    with pytest.raises(ValueError, match=message):
        label(built, **options)


def test_an_atlas_of_another_model_is_refused(built, data):
    model = planted.model()
    model.config.num_features = 33
    with pytest.raises(ValueError, match="the atlas is of layers"):
        label((model, built[1]), data)
