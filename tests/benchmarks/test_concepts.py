"""WordNet's classes, groups and kinds, from a small WordNet written by hand."""

import pytest

from benchmarks.common import concepts

SYNSETS = {  # offset: (number of the lexicographer class, words, offsets right above it)
    "001": (3, ["entity"], []),
    "010": (5, ["animal"], ["001"]),
    "011": (5, ["dog"], ["010"]),
    "012": (5, ["bird"], ["010"]),
    "013": (5, ["robin"], ["012"]),
    "014": (5, ["wren"], ["012"]),
    "015": (5, ["fledgling"], ["012"]),
    "020": (6, ["artifact"], ["001"]),
    "021": (6, ["chair"], ["020"]),
    "022": (6, ["crane"], ["020"]),
    "023": (5, ["crane"], ["012"]),
}
FIRST = {word: offset for offset, (_, words, _) in reversed(SYNSETS.items()) for word in words}


@pytest.fixture(autouse=True)
def wordnet(tmp_path, monkeypatch):
    data = [
        f"{offset} {number:02} n {len(words):02x} {' '.join(f'{word} 0' for word in words)} "
        f"{len(above):03} {' '.join(f'@ {each} n 0000' for each in above)} | a gloss"
        for offset, (number, words, above) in SYNSETS.items()
    ]
    senses = {word: [o for o, (_, words, _) in SYNSETS.items() if word in words] for word in FIRST}
    index = [f"{word} n 1 1 @ {len(of)} 0 {' '.join([FIRST[word], *sorted(set(of) - {FIRST[word]})])}"
             for word, of in senses.items()]  # fmt: skip
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text("  1 a licence\n" + "\n".join(data if part == "noun" else []) + "\n")
    (tmp_path / "index.noun").write_text("\n".join(index) + "\n")
    (tmp_path / "noun.exc").write_text("\n")
    (tmp_path / "cntlist.rev").write_text("crane%1:06:00:: 1 6\ncrane%1:05:00:: 2 4\n")
    monkeypatch.setattr(concepts, "_folder", lambda: tmp_path)
    monkeypatch.setattr(concepts, "SMALLEST_CLASS", 2)
    monkeypatch.setattr(concepts, "SMALLEST_GROUP", 2)
    caches = (concepts._irregular, concepts._nouns)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def words_of(found):
    return {name: {forms[0] for forms in words} for name, words in found.items()}


def test_a_class_takes_words_with_one_class_and_a_group_those_below_its_noun():
    """The word "crane" is left out: 60 % of its uses are the artifact, and a class needs 80 %."""
    assert words_of(concepts.concepts()) == {
        "animal": {"animal", "dog", "bird", "robin", "wren", "fledgling"},
        "artifact": {"artifact", "chair"},
        "animal: bird": {"bird", "robin", "wren", "fledgling"},
    }


def test_kinds_are_all_nouns_with_enough_words_at_or_below_them():
    found = words_of(concepts.kinds())
    below = {}
    for offset, (number, (word, *_), _) in SYNSETS.items():
        name = f"{concepts.CLASSES[number]}: {word}"
        below[name] = {other for other, at in FIRST.items() if other not in ("crane", "entity") and reaches(at, offset)}
    assert found == {name: words for name, words in below.items() if len(words) >= 2}
    assert set(found) == {"tops: entity", "animal: animal", "animal: bird", "artifact: artifact"}


def reaches(start, goal):
    return start == goal or any(reaches(above, goal) for above in SYNSETS[start][2])


def test_of_nouns_with_the_same_words_the_lowest_is_taken(monkeypatch):
    """A noun between "animal" and "entity" has the same words as "animal" and makes no group."""
    usual = set(concepts.kinds())
    above = {offset: of for offset, (_, _, of) in SYNSETS.items()} | {"010": ["009"], "009": ["001"]}
    named = {offset: (number, words[0]) for offset, (number, words, _) in SYNSETS.items()} | {"009": (5, "x")}
    monkeypatch.setattr(concepts, "_hypernyms", lambda: above)
    monkeypatch.setattr(concepts, "_synsets", lambda: named)
    assert set(concepts.kinds()) == usual
    assert "animal: animal" in usual
