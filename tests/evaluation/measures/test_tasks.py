"""Probe tasks, compared with independent counts of words, brackets and quotes; splits and shuffled labels."""

from collections import Counter

import numpy as np
import planted
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from modeling_mfn.evaluation.measures.formatting import IN_CONTEXT, OF_TOKENS, marks_of_window
from modeling_mfn.evaluation.measures.tasks import (
    Limits,
    formatting_tasks,
    rows_of,
    task_places,
    without_task,
    word_tasks,
)

FEW = Limits(occurrences=4, tokens=60, least_units=4, least_tokens=12)


def characters():
    """Makes a tokenizer whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(BPE({"<end>": 0} | {letter: 1 + i for i, letter in enumerate(alphabet)}, []))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>")


def check_splits(task, limits):
    """Checks properties of every task."""
    assert (np.diff(task.places) > 0).all()
    assert not set(task.units[task.held_out]) & set(task.units[~task.held_out])
    for side in (False, True):
        own = task.held_out == side
        assert task.labels[own].sum() * 2 == own.sum() <= 2 * limits.tokens
        assert 0 < task.shuffled[own].sum() < own.sum()
        for label in (False, True):
            units = Counter(task.units[own & (task.labels == label)].tolist())
            assert max(units.values()) <= limits.occurrences
            assert len(units) >= limits.least_units


def test_words_against_words_of_other_concepts():
    data = planted.text(rows=200)
    ids = np.array(data["input_ids"])
    mask = np.ones_like(ids)
    mask[::3, -4:] = 0
    padded = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})
    concepts = planted.CONCEPTS | {"royals": ["king", "queen", "prince"], "unheard": ["dragon", "unicorn"]}
    tasks = word_tasks({"things": concepts}, padded, planted.tokenizer(), limits=FEW)
    assert [(task.name, task.group) for task in tasks] == [("animals", "things"), ("foods", "things")]
    names = {planted.token_of(word): word for word in planted.WORDS}
    for task, words in zip(tasks, planted.CONCEPTS.values(), strict=True):
        check_splits(task, FEW)
        row, column = np.divmod(task.places, ids.shape[1])
        assert mask[row, column].all()
        assert column.min() == 1
        found = [names[token] for token in ids[row, column]]
        assert [word in words for word in found] == task.labels.tolist()
        units = dict(zip(task.units.tolist(), found, strict=True))
        assert [units[unit] for unit in task.units.tolist()] == found
        # each word has one shuffled label, and each side keeps its number of positive words
        dealt = {(unit, label) for unit, label in zip(task.units.tolist(), task.shuffled.tolist(), strict=True)}
        assert len(dealt) == len(units)
        held_out = set(task.units[task.held_out].tolist())
        for own in (held_out, set(units) - held_out):
            positive = {unit for unit in own if units[unit] in words}
            assert sum(label for unit, label in dealt if unit in own) == len(positive)
    places = task_places(tasks)
    assert set(places) == set(tasks[0].places) | set(tasks[1].places)
    assert (places[rows_of(tasks[1], places)] == tasks[1].places).all()


def test_two_concepts_are_one_task_and_too_little_text_is_none():
    data, tokenizer = planted.text(rows=200), planted.tokenizer()
    (task,) = word_tasks({"things": planted.CONCEPTS}, data, tokenizer, limits=FEW)
    assert task.name == "animals or foods"
    again = word_tasks({"things": planted.CONCEPTS}, data, tokenizer, limits=FEW)[0]
    other = word_tasks({"things": planted.CONCEPTS}, data, tokenizer, limits=FEW, seed=1)[0]
    assert (again.places == task.places).all()
    assert set(zip(other.units, other.held_out, strict=True)) != set(zip(task.units, task.held_out, strict=True))
    assert word_tasks({"things": planted.CONCEPTS}, data, tokenizer, limits=FEW._replace(least_units=7)) == []
    assert word_tasks({"things": planted.CONCEPTS}, planted.text(rows=4), tokenizer, limits=FEW) == []
    with pytest.raises(ValueError, match="there are no tasks"):
        task_places([])
    with pytest.raises(ValueError, match=r"windows have lengths \[2, 3\]"):
        word_tasks({"things": planted.CONCEPTS}, [{"input_ids": [3, 4]}, {"input_ids": [3, 4, 5]}], tokenizer)


@pytest.mark.parametrize(
    ("name", "text", "marks"),
    [
        ("in brackets", "a) b (c [d]| e) f", ".. 0 .1 .1.  1. 0"),
        ("in brackets", "a (b) c] d) (e", ". .1. .. .. .1"),
        ("in quotes", 'a "b|c "d e" f|g "h', ". .. 0 .1 1. 0 0 .."),
        ("starts a line", "a|  b c|de", ".   1 0 10"),
        ("in an indented line", "a|  b c||de", ".   1 1  00"),
        ("before punctuation", "ab cd, e. f", "00 11. 1. ."),
    ],
)
def test_marks_of_characters(name, text, marks):
    """Marks of spaces and of line ends, here |, have no effect and are not compared."""
    found = ["01."[mark] for mark in IN_CONTEXT[name](text.replace("|", "\n")).tolist()]
    assert "".join(" " if of in " |" else mark for of, mark in zip(text, found, strict=True)) == marks


def test_marks_of_tokens():
    assert [OF_TOKENS["all capitals"](token) for token in ("AB", "Ab", "A", "A1", "")] == [1, 0, -1, -1, -1]
    assert [OF_TOKENS["capitalised"](token) for token in ("Abc", "ABC", "abc", "A")] == [1, 0, 0, -1]
    assert [OF_TOKENS["number"](token) for token in ("12", "a", "a1", ";")] == [1, 0, -1, -1]
    tokens = ["f", " (", "  x", "\n", " y", ")z"]
    assert marks_of_window(tokens, IN_CONTEXT["in brackets"]).tolist() == [0, -1, 1, -1, 1, -1]


def test_formatting_tasks_are_what_a_scan_of_each_window_says():
    tokenizer = characters()
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghij,.\n  ()[]\"'0123456789ABCDEF"))
    rows = [tokenizer("".join(generator.choice(letters, 40)))["input_ids"] for _ in range(300)]
    tasks = {task.name: task for task in formatting_tasks([{"input_ids": row} for row in rows], tokenizer, limits=FEW)}
    assert {"number", "in brackets", "starts a line", "before punctuation"} <= set(tasks)
    assert {"all capitals", "capitalised"}.isdisjoint(tasks)  # tokens have one letter
    for name, task in tasks.items():
        check_splits(task, FEW)
        assert task.group == "formatting"
        row, column = np.divmod(task.places, 40)
        for window, place, unit, label in zip(row, column, task.units, task.labels, strict=True):
            text = tokenizer.decode(rows[window])
            assert unit == (rows[window][place] if name == "number" else window)
            if name == "number":
                assert text[place].isdigit() == label
            elif name == "starts a line":
                assert (text[:place].rpartition("\n")[2].strip() == "") == label
            elif name == "in brackets":
                depth, unmatched = np.zeros(41, int), 0
                for at, character in enumerate(text):
                    depth[at + 1] = depth[at] + (character in "([") - (character in ")]")
                    if depth[at + 1] < 0:
                        depth[at + 1], unmatched = 0, at
                assert (depth[place] > 0) == label
                assert label or place > unmatched


def test_shuffled_labels_of_windows_say_nothing_of_the_true_ones():
    """Shuffled and true labels are independent even with far more tokens than the limit."""
    tokenizer, correlations, cut, limits = characters(), [], 0, FEW._replace(tokens=30)
    letters = np.array(list("aaaaabbbb.\n  ()"))
    for seed in range(20):
        generator = np.random.default_rng(seed)
        rows = [{"input_ids": tokenizer("".join(generator.choice(letters, 40)))["input_ids"]} for _ in range(160)]
        for task in formatting_tasks(rows, tokenizer, limits=limits, seed=seed):
            assert len(task.places) <= 4 * limits.tokens
            cut += len(task.places) == 4 * limits.tokens
            for window in set(task.units.tolist()):
                own = task.units == window
                assert own.sum() == 2 * task.labels[own].sum() == 2 * task.shuffled[own].sum()
            correlations.append(np.corrcoef(task.labels, task.shuffled)[0, 1])
    assert len(correlations) >= cut >= 40
    assert np.mean(correlations) == pytest.approx(0, abs=4 / np.sqrt(len(correlations) * 4 * limits.tokens / 2))
    assert np.std(correlations) > 0.02


def test_what_source_a_text_is_from_says_nothing():
    """Animals are common in one source, rare in another, and the only words in a third."""
    generator, tokenizer = np.random.default_rng(0), planted.tokenizer()
    animals, foods = ([planted.token_of(word) for word in words] for words in planted.CONCEPTS.values())
    shares = {"farm": 0.9, "kitchen": 0.2, "zoo": 1.0}
    sources = [name for name in shares for _ in range(60)]
    rows = [
        {
            "input_ids": np.where(
                generator.random(16) < shares[name], *(generator.choice(of, 16) for of in (animals, foods))
            )
        }
        for name in sources
    ]
    wide = FEW._replace(occurrences=40, tokens=100)
    (task,) = word_tasks({"things": planted.CONCEPTS}, rows, tokenizer, sources=sources, limits=wide)
    check_splits(task, wide)
    source = np.array(sources)[task.places // 16]
    assert set(source) == {"farm", "kitchen"}
    for name in set(source):
        for side in (False, True):
            own = (source == name) & (task.held_out == side)
            assert own.sum() == 2 * task.labels[own].sum() > 0
    (without,) = word_tasks({"things": planted.CONCEPTS}, rows, tokenizer, limits=wide)
    assert "zoo" in np.array(sources)[without.places // 16]
    with pytest.raises(ValueError, match="there are 2 sources for 180 windows"):
        word_tasks({"things": planted.CONCEPTS}, rows, tokenizer, sources=["a", "b"])


def test_kinds_of_tokens_are_as_many_in_each_source():
    tokenizer, generator = characters(), np.random.default_rng(0)
    sources = ["prose", "sums"] * 100
    letters = {"prose": list("abcdefghijklm1234567890"), "sums": list("ab") + list("1234567890") * 4}
    rows = [{"input_ids": tokenizer("".join(generator.choice(letters[name], 20)))["input_ids"]} for name in sources]
    wide = Limits(occurrences=1000, tokens=1000, least_units=1, least_tokens=1)
    (number,) = (t for t in formatting_tasks(rows, tokenizer, sources=sources, limits=wide) if t.name == "number")
    of_sums = np.array(sources)[number.places // 20] == "sums"
    for side in (False, True):
        own = number.held_out == side
        assert of_sums[own & number.labels].sum() == of_sums[own & ~number.labels].sum() > 0


def test_concepts_without_a_task_are_named():
    groups = {
        "three": planted.CONCEPTS | {"unheard": ["dragon"]},
        "two": {"nothing": ["dragon"], "again": ["unicorn"]},
        "pair": planted.CONCEPTS,
        "one": {"animals": planted.ANIMALS},
    }
    tasks = word_tasks(groups, planted.text(rows=200), planted.tokenizer(), limits=FEW)
    assert [task.group for task in tasks] == ["three", "three", "pair"]
    assert without_task(groups, tasks) == {"three": ["unheard"], "two": ["nothing", "again"], "one": ["animals"]}
