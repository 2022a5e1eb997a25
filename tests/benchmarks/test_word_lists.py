"""Word lists from a small WordNet and a small AFINN, written by hand."""

import planted
import pytest

from benchmarks.common import concepts, word_lists
from modeling_mfn.evaluation.measures.tasks import Limits, word_tasks
from modeling_mfn.features.labelling.concepts import read_concepts

INDEX = {
    "noun": ["dog", "mouse", "walk", "box", "glasses", "glass", "hope", "who", "thou", "does", "gone"],
    "verb": ["walk", "go", "ponder", "carry", "hope", "invade"],
    "adj": ["red", "happy", "pondered"],
    "adv": ["happily", "new_ly"],
}
DATA = {  # class, words
    "noun": [
        (15, ["Rome", "Eternal_City"]),
        (15, ["Turkey"]),
        (13, ["turkey"]),
        (15, ["Oslo"]),
        (18, ["Reading", "Dante"]),
    ],
    "verb": [(32, ["reading"])],
    "adj": [],
    "adv": [],
}  # fmt: skip
EXCEPTIONS = {
    "noun": ["mice mouse"],
    "verb": ["went go", "gone go", "carried carry"],
    "adj": ["happier happy"],
    "adv": [],
}
AFINN = "hope\t2\nhopes\t2\ninvade\t-2\ninvading\t-2\nhappy\t3\nhappier\t-1\nred\t0\nsome kind\t1\nmice\t-1\n"


@pytest.fixture(autouse=True)
def wordnet(tmp_path, monkeypatch):
    for part in INDEX:
        rows = [f"{word} x" for word in INDEX[part]]
        (tmp_path / f"index.{part}").write_text("\n".join(["  1 a licence", *rows]) + "\n")
        rows = [f"{place} {of} n {len(words):02x} {' '.join(f'{word} 0' for word in words)} 000 | gloss"
                for place, (of, words) in enumerate(DATA[part])]  # fmt: skip
        (tmp_path / f"data.{part}").write_text("\n".join(["  1 a licence", *rows]) + "\n")
        (tmp_path / f"{part}.exc").write_text("\n".join(EXCEPTIONS[part]) + "\n")
    (tmp_path / word_lists.SCORES).write_text(AFINN)
    cached = (
        concepts._irregular, concepts._nouns, word_lists._entries, word_lists._exceptions, word_lists._irregular_verbs,
    )  # fmt: skip
    monkeypatch.setattr(concepts, "_folder", lambda: tmp_path)
    monkeypatch.setattr(word_lists, "_afinn", lambda: tmp_path)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def test_parts_of_speech_are_of_words_that_have_one():
    """Words with two parts of speech are left out, as are function words ("who") and irregular forms ("gone").

    Inflections that are listed as words are not forms of another word: "pondered", an adjective, and "glasses", a noun.
    """
    found = {name: {words[0]: set(words[1:]) for words in of} for name, of in word_lists.parts_of_speech().items()}
    assert found == {
        "nouns": {"dog": {"dogs"}, "mouse": {"mice"}, "box": {"boxes"}, "glass": set(), "glasses": {"glasseses"}},
        "verbs": {
            "ponder": {"ponders", "pondering"},
            "carry": {"carries", "carried", "carrying"},
            "invade": {"invades", "invaded", "invading"},
        },
        "adjectives": {"red": set(), "happy": set(), "pondered": set()},
        "adverbs": {"happily": set()},
    }


def test_polarity_keeps_the_forms_of_a_lemma_together():
    assert word_lists.polarity() == {"positive": [["hope", "hopes"]], "negative": [["invade", "invading"], ["mice"]]}
    assert [word_lists.lemma(word) for word in ("carried", "went", "mice", "happier", "boxes", "unknown")] == [
        "carry", "go", "mouse", "happy", "box", "unknown",
    ]  # fmt: skip


def test_a_tokenizer_admits_its_single_tokens():
    tokenizer = planted.tokenizer()
    assert word_lists.parts_of_speech(tokenizer)["nouns"] == [["dog"], ["mouse"]]
    assert not any(word_lists.polarity(tokenizer).values())
    few = Limits(least_units=1, least_tokens=1)
    groups = {"part of speech": {"nouns": [["dog"], ["mouse"]], "others": ["bread", "milk"]}}
    (task,) = word_tasks(groups, planted.text(), tokenizer, limits=few)
    assert len(set(task.units)) == 4


def test_names_are_no_words_and_single_tokens(monkeypatch):
    """Three names are left out: "Turkey" is also a bird, "Reading" also a verb, and " Oslo" is not a token."""
    texts = [" Rome", " Turkey", " Reading", " Dante", "Oslo", " turkey"]
    monkeypatch.setattr(word_lists, "token_texts", lambda tokenizer: texts)
    assert word_lists.names(None) == {"place names": [["Rome"]], "names of people": [["Dante"]]}


def test_lists_have_no_word_twice():
    for words in (*word_lists.closed_classes().values(), *word_lists.code_words().values()):
        assert len(words) == len({word for (word,) in words}) > 0
    python = word_lists.code_words()
    assert {"def", "lambda"} <= {word for (word,) in python["Python keywords"]}
    assert {"len", "isinstance"} <= {word for (word,) in python["Python built-ins"]}


def test_groups_are_written_for_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(concepts, "concepts", lambda: {"animals": [["dog", "dogs"], ["mouse", "mice"]]})
    word_lists.main(tmp_path / "words")
    found = {file.stem: read_concepts(file) for file in (tmp_path / "words").iterdir()}
    assert found == word_lists.groups()
    assert set(found) == {"concepts", "polarity", "part of speech"}
    assert ["mouse", "mice"] in found["part of speech"]["nouns"]
