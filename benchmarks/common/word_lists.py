"""Word lists as concepts: parts of speech, names, polarity, closed classes.

Words come from WordNet 3.0 and AFINN (F. A. Nielsen, 2011; PyPI, ODbL). Closed classes are listed here.

    python -m benchmarks.common.word_lists FOLDER    # writes the lists of `predictions.py` for mfn evaluate --concepts
"""

from __future__ import annotations

import builtins
import json
import keyword
import tarfile
import tempfile
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import concepts
from benchmarks.common.concepts import FUNCTION_WORDS, admission, lines, plurals_of
from modeling_mfn.data.tokens import token_texts
from modeling_mfn.demo.assets import cache_folder, download

AFINN = ("afinn==0.1", "cf2f728ccc6f2974f2f27e2110e4c05a0133a2f14a40387c463a8c9fdd4ab61b")
SCORES = "AFINN-en-165.txt"
PARTS = {"nouns": "noun", "verbs": "verb", "adjectives": "adj", "adverbs": "adv"}
# fmt: off
CLOSED = {
    "personal pronouns": "he she they him her them his their its it we us our you your yours me my mine myself himself "
    "herself themselves itself ourselves yourself thou thee thy thine ye",
    "prepositions": "of in to for with on at from by about into through during against between among upon toward "
    "towards within without under over beneath beside besides across along behind beyond despite except near since "
    "until unto",
    "modal and auxiliary verbs": "will would shall should can could may might must ought do does did have has had "
    "is are was were am be been being art",
    "question words": "who whom whose which what when where why how whether wherefore whither",
    "conjunctions": "and or but nor yet because although though unless while whereas if than lest",
    "determiners": "the this that these those each every some any no all both either neither another such many much "
    "few several",
    "number words": "one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred "
    "thousand million first second third fourth fifth",
    "given names": "Henry Richard Edward John William Robert Thomas Peter James George Charles Francis Philip Simon "
    "Paul David Michael Daniel Adam Joseph Samuel Antony Antonio Brutus Caesar Hamlet Romeo Hector Percy Harry Jack "
    "Tom Mary Anne Margaret Elizabeth Catherine Helen Juliet Julia Maria Alice Jane Kate Rosa Cleopatra Diana Hermione",
    "titles of rank": "king queen prince princess duke duchess earl lord lady sir madam majesty highness grace emperor "
    "count knight captain general master mistress bishop cardinal pope",
    "archaic verb forms": "hast dost doth hath saith cometh goeth maketh knoweth seeth speaketh giveth taketh shalt "
    "wilt canst wouldst shouldst couldst didst hadst wert wast sayest knowest thinkest seest",
}
# fmt: on
NAMED = {"place names": "15", "names of people": "18"}
"""Name of a list -> number of its lexicographer class."""
RULES = {  # morphy(7WN)
    "noun": (("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("ies", "y")),
    "verb": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}


def parts_of_speech(tokenizer: Any = None) -> dict[str, list[list[str]]]:
    """Part of speech -> words that have no other part of speech, each a list of its forms.

    Function words and irregular forms of verbs are left out. Inflections that WordNet lists as words are left out, too:
    "abandoned" is also an adjective. See [`concepts.admission`] for the words.
    """
    admitted = admission(tokenizer)
    of_word: dict[str, list[str]] = defaultdict(list)
    for name, part in PARTS.items():
        for word in filter(admitted, sorted(_entries(part))):
            of_word[word].append(name)
    found: dict[str, list[list[str]]] = {name: [] for name in PARTS}
    every = set().union(*(_entries(part) for part in PARTS.values()))
    for word, names in of_word.items():
        if len(names) == 1 and word not in FUNCTION_WORDS and word not in _exceptions("verb"):
            inflected = plurals_of(word) if names == ["nouns"] else _inflections(word) if names == ["verbs"] else []
            found[names[0]].append([word, *(form for form in inflected if form not in every and admitted(form))])
    return found


def closed_classes() -> dict[str, list[list[str]]]:
    """Name -> words of the closed classes in `CLOSED`. WordNet does not have these classes."""
    return {name: [[word] for word in words.split()] for name, words in CLOSED.items()}


def names(tokenizer: Any) -> dict[str, list[list[str]]]:
    """Names of places and of people in WordNet: one token with a space before it, and not also an ordinary word."""
    texts = set(token_texts(tokenizer))
    entries = [fields for part in PARTS.values() for fields in lines(f"data.{part}")]
    words = [(fields[1], word) for fields in entries for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
    plain = {word for _, word in words if word.islower()}
    chosen = {number: sorted({word for of, word in words if of == number}) for number in NAMED.values()}
    return {
        name: [
            [word] for word in chosen[number] if word.istitle() and word.lower() not in plain and f" {word}" in texts
        ]
        for name, number in NAMED.items()
    }


def code_words(tokenizer: Any = None) -> dict[str, list[list[str]]]:
    """Python's keywords and its built-in names: name -> words."""
    built_in = [name for name in dir(builtins) if name.islower() and name.isalpha()]
    return {"Python keywords": [[word] for word in keyword.kwlist], "Python built-ins": [[word] for word in built_in]}


def polarity(tokenizer: Any = None) -> dict[str, list[list[str]]]:
    """Positive and negative words by AFINN's scores, each a list of the forms of one lemma.

    Lemmas whose forms differ in sign are left out.
    """
    admitted = admission(tokenizer)
    forms: dict[str, list[str]] = defaultdict(list)
    signs: dict[str, set[bool]] = defaultdict(set)
    for line in (_afinn() / SCORES).read_text(encoding="utf-8").splitlines():
        word, score = line.split("\t")
        if int(score) and admitted(word):
            forms[lemma(word)].append(word)
            signs[lemma(word)].add(int(score) > 0)
    return {
        name: [words for base, words in forms.items() if signs[base] == {sign}]
        for name, sign in (("positive", True), ("negative", False))
    }


def groups() -> dict[str, dict[str, list[list[str]]]]:
    """Name of a group -> concepts that P2 is measured on."""
    return {"concepts": concepts.concepts(), "polarity": polarity(), "part of speech": parts_of_speech()}


def lemma(word: str) -> str:
    """Shortest WordNet word that a word may be an inflection of. Without such a word, the word itself."""
    bases = {base for part in PARTS.values() for base in _bases(word, part)}
    return min(bases or {word}, key=lambda base: (len(base), base))


@cache
def _entries(part: str) -> frozenset[str]:
    return frozenset(fields[0] for fields in lines(f"index.{part}"))


@cache
def _exceptions(part: str) -> dict[str, list[str]]:
    """Irregular form -> bases."""
    return {form: bases for form, *bases in lines(f"{part}.exc")}


@cache
def _irregular_verbs() -> dict[str, list[str]]:
    """Base -> irregular forms."""
    found: dict[str, list[str]] = defaultdict(list)
    for form, bases in _exceptions("verb").items():
        for base in bases:
            found[base].append(form)
    return found


def _bases(word: str, part: str) -> list[str]:
    by_rule = [word[: -len(end)] + ending for end, ending in RULES[part] if word.endswith(end)]
    return [base for base in _exceptions(part).get(word, by_rule) if base in _entries(part)]


def _inflections(verb: str) -> list[str]:
    """Regular forms without doubled letters, and the forms in WordNet's list. The list has doubled letters."""
    if verb.endswith("e"):
        regular = [f"{verb}s", f"{verb}d", f"{verb[:-1]}ing"]
    elif verb.endswith("y") and verb[-2] not in "aeiou":
        regular = [f"{verb[:-1]}ies", f"{verb[:-1]}ied", f"{verb}ing"]
    else:
        third = f"{verb}es" if verb.endswith(("s", "x", "z", "ch", "sh", "o")) else f"{verb}s"
        regular = [third, f"{verb}ed", f"{verb}ing"]
    return list(dict.fromkeys([*regular, *_irregular_verbs().get(verb, [])]))


def _afinn() -> Path:
    """Folder of AFINN's word lists. Missing lists are downloaded."""
    folder = cache_folder() / "afinn-0.1"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / folder.name
            made.mkdir()
            packed = Path(scratch) / "packed"
            packed.mkdir()
            with tarfile.open(download(*AFINN, packed)) as archive:
                scores: Any = archive.extractfile(f"{folder.name}/afinn/data/{SCORES}")
                (made / SCORES).write_bytes(scores.read())
            made.rename(folder)
    return folder


def main(folder: Annotated[Path, typer.Argument(help="Folder for the files; made if necessary.")]) -> None:
    """Writes one file per group of concepts."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, of in groups().items():
        (folder / f"{name}.json").write_text(json.dumps(of, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
