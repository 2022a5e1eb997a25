"""Concepts from WordNet 3.0 (Debian's wordnet-base): lexicographer classes, and groups of words below some nouns.

A word belongs to a class if all of its senses do, or 80 % of its uses in WordNet's tagged corpus. A word belongs to a
group if, in addition, its first sense as a noun is below the group's noun. Function words are left out. A class has at
least 40 words, a group 12.

A word is one token of a tokenizer, including the space before it; without a tokenizer it may be any number of tokens.
The forms of a noun are the noun and its plural, by rule or from WordNet's list.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.common.corpora import debian_package
from modeling_mfn.data.tokens import token_texts

# fmt: off
CLASSES = (  # lexnames(5WN), in the order of their numbers
    "adj.all", "adj.pert", "adv.all", "tops", "act", "animal", "artifact", "attribute", "body", "cognition",
    "communication", "event", "feeling", "food", "group", "location", "motive", "object", "person", "phenomenon",
    "plant", "possession", "process", "quantity", "relation", "shape", "state", "substance", "time", "verb.body",
    "verb.change", "verb.cognition", "verb.communication", "verb.competition", "verb.consumption", "verb.contact",
    "verb.creation", "verb.emotion", "verb.motion", "verb.perception", "verb.possession", "verb.social",
    "verb.stative", "verb.weather", "adj.ppl",
)
LEFT_OUT = {"adj.all", "adj.pert", "adv.all", "adj.ppl", "tops", "motive", "relation", "shape"}
GROUPS = (
    "bird", "insect", "fish", "tree", "flower", "fruit", "vegetable", "beverage", "meal", "color", "relative", "ruler",
    "worker", "weapon", "building", "vehicle", "ship", "garment", "furniture", "container", "musical_instrument",
    "fabric", "metallic_element", "rock", "body_of_water", "disease", "emotion", "monetary_unit", "time_unit",
    "weekday", "gregorian_calendar_month", "integer", "language", "country", "city", "clergyman", "soldier", "sound",
    "road", "weather", "ill_health", "crime", "writer", "deity", "body_part",
)
FUNCTION_WORDS = {
    "another", "aught", "both", "either", "every", "many", "naught", "neither", "nobody", "nothing", "nought", "other",
    "somebody", "someone", "thou", "whatever", "who", "are", "art", "being", "dost", "does", "may", "might", "must",
    "ought", "across", "along", "around", "before", "below", "beneath", "besides", "between", "beyond", "but", "except",
    "not", "though", "throughout", "underneath", "while", "why", "within", "yet",
}
# fmt: on
"""Function words that WordNet lists with another meaning: "who" is the health organisation, "are" a measure, "thou" a
thousand. WordNet has no pronouns, determiners, auxiliaries, prepositions and conjunctions."""
DOMINANT = 0.8
SMALLEST_CLASS, SMALLEST_GROUP = 40, 12
PLURALS = (("y", "ies"), ("s", "ses"), ("x", "xes"), ("ch", "ches"), ("sh", "shes"), ("", "s"))


def concepts(tokenizer: Any = None) -> dict[str, list[list[str]]]:
    """Classes and groups: name -> words, each a list of its forms. See [`admission`] for the words."""
    classes: dict[str, list[list[str]]] = defaultdict(list)
    groups: dict[str, list[list[str]]] = defaultdict(list)
    above, first = _hypernyms(), _first_senses()
    roots = {first[name]: name for name in GROUPS if name in first}
    for name, forms in _classified(tokenizer):
        classes[name].append(forms)
        for root in roots.keys() & _all_above(first.get(forms[0]), above):
            groups[f"{name}: {roots[root].replace('_', ' ')}"].append(forms)
    enough = {name: words for name, words in classes.items() if len(words) >= SMALLEST_CLASS}
    return enough | {name: words for name, words in groups.items() if len(words) >= SMALLEST_GROUP}


def kinds(tokenizer: Any = None) -> dict[str, list[list[str]]]:
    """Groups of every noun with enough words below it: name -> words, each a list of its forms.

    Nouns with the same words make one group. The lowest of these nouns names the group.
    """
    above, first, nouns = _hypernyms(), _first_senses(), _synsets()
    members: dict[str, list[list[str]]] = defaultdict(list)
    for name, forms in _classified(tokenizer):
        if not name.startswith("verb."):
            for synset in _all_above(first.get(forms[0]), above):
                members[synset].append(forms)
    found: dict[tuple[str, ...], str] = {}
    for synset in sorted(members, key=lambda each: (-len(_all_above(each, above)), each)):
        if len(members[synset]) >= SMALLEST_GROUP:
            found.setdefault(tuple(forms[0] for forms in members[synset]), synset)
    named = {synset: f"{CLASSES[nouns[synset][0]]}: {nouns[synset][1].replace('_', ' ')}" for synset in found.values()}
    return {name: members[synset] for synset, name in named.items()}


def _classified(tokenizer: Any) -> Iterator[tuple[str, list[str]]]:
    """Class and forms of each admitted word, the word first."""
    admitted = admission(tokenizer)
    for word, name in sorted(_class_of_words().items()):
        if name not in LEFT_OUT and word not in FUNCTION_WORDS and admitted(word):
            plurals = [] if name.startswith("verb.") else plurals_of(word)
            yield name, [word, *(plural for plural in plurals if admitted(plural))]


@cache
def _folder() -> Path:
    return debian_package("wordnet-base") / "usr/share/wordnet"


def lines(name: str) -> list[list[str]]:
    """Fields of the lines of a WordNet file, without its licence."""
    text = (_folder() / name).read_text(encoding="utf-8", errors="replace")
    return [line.split() for line in text.splitlines() if line and not line.startswith("  ")]


def _class_of_words() -> dict[str, str]:
    """Word in lower case -> class of all its senses, or of at least 80 % of its tagged uses."""
    senses: dict[str, set[int]] = defaultdict(set)
    for part in ("noun", "verb", "adj", "adv"):
        for fields in lines(f"data.{part}"):
            for place in range(int(fields[3], 16)):
                senses[fields[4 + 2 * place].lower().partition("(")[0]].add(int(fields[1]))
    uses: dict[str, Counter[int]] = defaultdict(Counter)
    for key, _, count in lines("cntlist.rev"):
        word, _, sense = key.partition("%")
        uses[word][int(sense.split(":")[1])] += int(count)
    found = {}
    for word, of in senses.items():
        best, count = uses[word].most_common(1)[0] if word in uses else (next(iter(of)), 0)
        if len(of) == 1 or (count and count >= DOMINANT * uses[word].total()):
            found[word] = CLASSES[best]
    return found


def _hypernyms() -> dict[str, list[str]]:
    """Noun synset -> synsets directly above it: its hypernyms and instance hypernyms."""
    above = {}
    for fields in lines("data.noun"):
        words = int(fields[3], 16)
        pointers = fields[5 + 2 * words : 5 + 2 * words + 4 * int(fields[4 + 2 * words])]
        above[fields[0]] = [pointers[at + 1] for at in range(0, len(pointers), 4) if pointers[at] in ("@", "@i")]
    return above


def _synsets() -> dict[str, tuple[int, str]]:
    """Noun synset -> number of its lexicographer class, and its first word."""
    return {fields[0]: (int(fields[1]), fields[4]) for fields in lines("data.noun")}


def _first_senses() -> dict[str, str]:
    """Noun -> synset of its first sense."""
    return {fields[0]: fields[-int(fields[2])] for fields in lines("index.noun")}


def _all_above(synset: str | None, above: dict[str, list[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [] if synset is None else [synset]
    while waiting:
        synset = waiting.pop()
        if synset not in found:
            found.add(synset)
            waiting.extend(above[synset])
    return found


@cache
def _irregular() -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for plural, *words in lines("noun.exc"):
        for word in words:
            found[word].append(plural)
    return found


@cache
def _nouns() -> set[str]:
    return {fields[0] for fields in lines("index.noun")}


def plurals_of(word: str) -> list[str]:
    """Plurals of a noun. Plurals that WordNet lists as nouns, such as "glasses", are left out."""
    end, ending = next(pair for pair in PLURALS if word.endswith(pair[0]))
    regular = word[: len(word) - len(end)] + ending
    return [plural for plural in _irregular().get(word, [regular]) if plural not in _nouns()]


def admission(tokenizer: Any) -> Callable[[str], bool]:
    """Returns a function that tests whether a word is admitted.

    An admitted word has three or more lower-case letters and is one token with a space before it. Without a tokenizer,
    words of any number of tokens are admitted.
    """
    if tokenizer is None:
        return lambda word: len(word) > 2 and word.isascii() and word.isalpha() and word.islower()
    texts = token_texts(tokenizer)
    tokens = {text[1:] for text in texts if text[:1] == " " and admission(None)(text[1:])}
    return tokens.__contains__
