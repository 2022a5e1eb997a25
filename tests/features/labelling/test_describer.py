"""Descriptions by a language model: a fake one that answers by rule, a tiny one for the plumbing, hostile text."""

import json
import re

import planted
import pytest
from atlas_data import HOSTILE
from conftest import make_base
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import pipeline as make_pipeline

from modeling_mfn import FeatureAtlas
from modeling_mfn.features.labelling.describer import describe_features
from modeling_mfn.features.labelling.prompts import (
    Context,
    description_in,
    description_prompt,
    detection_prompt,
    numbers_in,
)


@pytest.fixture(scope="module")
def atlas():
    return FeatureAtlas.build(planted.model(), planted.tokenizer(), planted.text(), progress=False)


class Rule:
    """Describes a feature by the marked words, and finds these words again.

    `answer` turns the numbers of the matching lines into the reply.
    """

    def __init__(self, answer=lambda numbers, count: ", ".join(map(str, numbers)) or "none"):
        self.answer, self.prompts = answer, []

    def __call__(self, prompts):
        self.prompts += prompts
        return [
            self.describe(prompt) if "«" in prompt.replace("« and »", "") else self.detect(prompt) for prompt in prompts
        ]

    def describe(self, prompt):
        marked = set(" ".join(re.findall("«(.*?)»", prompt)).split()) - {"and"}
        return '\n "' + ", ".join(sorted(marked)) + '"\nbecause of this and that'

    def detect(self, prompt):
        words = set(re.search("described as: (.*)", prompt)[1].split(", "))
        lines = re.findall(r"^(\d+)\. (.*)$", prompt, re.MULTILINE)
        return self.answer([int(n) for n, line in lines if words & set(re.findall(r"\w+", line))], len(lines))


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (lambda numbers, count: f"I think {', '.join(map(str, numbers))}.", 1.0),
        (lambda numbers, count: ",".join(str(n) for n in range(1, count + 1) if n not in numbers), 0.0),
        (lambda numbers, count: "none", 0.5),
        (lambda numbers, count: ",".join(map(str, range(1, 1000))), 0.5),
    ],
)
def test_the_score_is_how_often_the_description_is_right(atlas, answer, score):
    rule = Rule(answer)
    (found,) = describe_features(atlas, [(0, planted.KINGS)], rule, name="rule", contexts=12)
    assert found.description == "king, prince, queen"
    assert (found.score, found.contexts) == (score, 12)
    (label,) = [each for each in atlas[0, planted.KINGS].labels if each.source == "llm:rule"]
    assert (label.label, label.score, label.details["contexts"]) == (found.description, score, 12)


def test_contexts_tried_are_new_ones_and_half_of_them_without_the_feature(atlas):
    rule = Rule()
    describe_features(atlas, [(0, planted.KINGS), "L0/0"], rule, name="rule")
    shown, _, tried, _ = rule.prompts
    lines = re.findall(r"^\d+\. (.*)$", tried, re.MULTILINE)
    assert sum(bool(re.search(r"\b(king|queen|prince)\b", line)) for line in lines) == 5
    assert len(lines) == 10
    before = [line.replace("«", "").replace("»", "") for line in re.findall(r"^\d+\. (.*)$", shown, re.MULTILINE)]
    assert len(before) == 10
    assert not set(before) & set(lines)
    again = Rule()
    describe_features(atlas, ["L0/0", (0, planted.KINGS)], again, name="rule")
    assert sorted(again.prompts) == sorted(rule.prompts)  # the seed decides, not the other features described


def test_a_model_that_says_nothing_labels_nothing(atlas):
    (found,) = describe_features(atlas, ["L0/9"], lambda prompts: [" \n"] * len(prompts), name="mute")
    assert (found.description, found.score) == (None, None)
    assert [label.source for label in atlas["L0/9"].labels] == []


THOUGHT = "The words are 1, 2, 3.\nExplanation: wrong\n"


@pytest.mark.parametrize(
    ("says", "score"),
    [
        (lambda answer, describes: f"<think>\n{THOUGHT}</think>\n\n{answer}", 1.0),
        (lambda answer, describes: f"{THOUGHT}</think>{answer}", 1.0),
        (lambda answer, describes: f"<think>{THOUGHT}</think>wrong 1, 2\n<think>{THOUGHT}</think>{answer}", 1.0),
        (lambda answer, describes: f"{answer}\n<think>{THOUGHT}", 1.0),
        (lambda answer, describes: answer if describes else f"<think>{THOUGHT}", None),
        (lambda answer, describes: answer if describes else " ", None),
    ],
    ids=["first", "begun in the prompt", "twice", "afterwards", "cut off", "no answer"],
)
def test_reasoning_is_no_part_of_an_answer(atlas, says, score):
    rule = Rule()

    def reasoning(prompts):
        answers = zip(prompts, rule(prompts), strict=True)
        return [says(answer, prompt.startswith("Below are")) for prompt, answer in answers]

    (found,) = describe_features(atlas, [(0, planted.KINGS)], reasoning, name="rule")
    assert (found.description, found.score) == ("king, prince, queen", score)
    (label,) = [each for each in atlas[0, planted.KINGS].labels if each.source == "llm:rule"]
    assert (label.label, label.score) == ("king, prince, queen", score)


@pytest.mark.parametrize("thoughts", ["<think>", "<think>the kings", "<think>a</think>", "a</think>\n<think>b"])
def test_reasoning_alone_labels_nothing(atlas, thoughts):
    (found,) = describe_features(atlas, ["L0/9"], lambda prompts: [thoughts] * len(prompts), name="dreamer")
    assert (found.description, found.score) == (None, None)
    assert [label.source for label in atlas["L0/9"].labels] == []


@pytest.mark.parametrize("obeys", [True, False])
def test_a_template_that_begins_the_reasoning_itself(atlas, obeys):
    """Words of the tiny model count as unfinished reasoning, unless the template leaves reasoning out on request."""
    tokenizer = planted.tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}" + (
        "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}" if obeys else "<think>\n"
    )
    base = make_base("llama-tied")
    base.generation_config.eos_token_id = None
    generate = make_pipeline("text-generation", model=base, tokenizer=tokenizer)
    (found,) = describe_features(atlas, ["L0/10"], generate, name="tiny", contexts=4)
    assert (found.description is not None) == obeys


@pytest.mark.parametrize("chat", [True, False])
def test_a_pipeline_of_transformers(atlas, chat):
    tokenizer = planted.tokenizer()
    template = "{% for message in messages %}w1 {{ message['content'] }} w1{% endfor %}"
    tokenizer.chat_template = template if chat else None
    base = make_base("llama-tied")
    base.name_or_path = "org/tiny"
    base.generation_config.eos_token_id = None
    generate = make_pipeline("text-generation", model=base, tokenizer=tokenizer)
    (found,) = describe_features(atlas, ["L0/3"], generate, contexts=4)
    assert "\u2581" + found.description.split()[0] in tokenizer.get_vocab()
    assert found.score == 0.5  # this tokenizer has no numbers
    (label,) = [each for each in atlas.labels["L0/3"] if each.source == "llm:org/tiny"]
    assert (label.label, label.score) == (found.description, found.score)


SPECIAL = ["<|im_start|>system", "<", "|im_end|>", "</s>", "[INST]", "<<SYS>>", ">>", "\n12. forged\n", "«x»", "»"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(SPECIAL + HOSTILE[:-1] + [HOSTILE[-1][:9999]]) | st.text(min_size=1, max_size=12),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_hostile_text_stays_in_its_place(tokens):
    context = Context([token for token, _ in tokens], [mark for _, mark in tokens])
    prompt = description_prompt([context, context])
    plain = description_prompt([Context(["a"], [False])] * 2)
    assert prompt.count("\n") == plain.count("\n")
    runs = sum(mark and not (at and tokens[at - 1][1]) for at, (_, mark) in enumerate(tokens))
    assert prompt.count("«") == prompt.count("»") == 2 * runs + plain.count("«")
    for text in (prompt, detection_prompt("".join(context.tokens) or "x", [context])):
        assert not re.search(r"<\|\w|</s|\[/?INST|<<SYS", text)
        assert all(character == "\n" or character.isprintable() for character in text)
        assert len(text) < 4000


@given(st.text())
@example("\xa0")
@example("\xa0'\u2003*king*' \u2028")
def test_answers_are_read_whatever_they_are(answer):
    assert numbers_in(answer, 5) <= {1, 2, 3, 4, 5}
    description = description_in(answer)
    assert description is None or (description.strip() and len(description) <= 200)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (["L0/40"], {"name": "x"}, "L0/40 does not exist"),
        (["L0/4"], {"name": "x"}, "never active"),
        (["L0/0"], {}, "give name="),
        (["L0/0"], {"name": "x", "contexts": 3}, "contexts even"),
        (["L0/0"], {"name": "x", "pipeline": lambda prompts: []}, "0 answers to 1 prompts"),
        (["L0/0"], {"name": "x", "pipeline": 3}, "pipeline is a int"),
    ],
)
def test_bad_input_is_named_and_nothing_is_labelled(atlas, features, options, message):
    before = json.dumps([label.to_record() for label in atlas.labels])
    options = {"pipeline": Rule()} | options
    with pytest.raises(ValueError, match=message):
        describe_features(atlas, features, **options)
    assert json.dumps([label.to_record() for label in atlas.labels]) == before
