"""Descriptions of features by a language model, and how well they tell where a feature is active.

The method follows Bills et al. 2023 (explain from examples) with the detection score of Paulo et al. 2024 (EleutherAI's
delphi).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ...model.feature_names import FeatureName, format_feature, parse_feature
from ..atlas.atlas import FeatureAtlas
from ..atlas.labels import Label
from ..atlas.records import Example
from .prompts import (
    REASONING,
    Context,
    description_in,
    description_prompt,
    detection_prompt,
    numbers_in,
    without_reasoning,
)

Generate = Callable[[list[str]], list[str]]
"""Function from prompts to the text that continues each."""

CONTEXT_BEFORE, CONTEXT_AFTER = 11, 4
"""Tokens of a context before and after the one on which a feature is active."""
MAX_ANSWER_TOKENS = 48
"""Tokens that a pipeline may generate per answer."""
CANDIDATES_PER_CONTEXT = 8
"""Other features looked at per context in which the feature is to be silent."""
NO_REASONING = {"enable_thinking": False}
"""Variable of chat templates; templates that do not know it ignore it."""


class FeatureDescription(NamedTuple):
    """A language model's description of a feature."""

    feature: str
    """Name of the feature, `L6/1234`."""
    description: str | None
    """`None` if the model gave none; the feature then gets no label."""
    score: float | None
    """Balanced accuracy of telling by the description in which contexts the feature is active: 1 is perfect, 0.5 is
    chance. `None` if there were no contexts for the test, or if the model did not answer it."""
    contexts: int
    """Number of contexts in the test; the feature is active in half of them."""


def describe_features(
    atlas: FeatureAtlas,
    features: Iterable[FeatureName],
    pipeline: Generate | Any,
    *,
    name: str | None = None,
    examples: int = 10,
    contexts: int = 10,
    seed: int = 0,
) -> list[FeatureDescription]:
    """Lets a language model describe features, tests each description, and labels the features with them.

    The model sees contexts in which the feature is active, with the active tokens marked, and answers with a short
    phrase. Then it gets the phrase and shuffled new contexts, and says which of them match. The phrase becomes the
    feature's label, of source `llm:` and the name of the model. The label's score is the balanced accuracy of the test.

    In half of the test's contexts the feature is active. The others are around firings of other features of its layer.
    None of those is among its most co-active features, and no token there is one that it is known to fire on. An atlas
    cannot say for sure that the feature is silent in them.

    Text of the examples is not trusted. Each context is one line without line breaks, control characters, marks of this
    prompt, or special tokens of a chat.

    If a model reasons first, `<think> ... </think>`, only the text after the reasoning counts. There is no answer if
    the pipeline's limit of 48 tokens ends the reasoning. A chat template that knows `enable_thinking` is told to leave
    reasoning out. For a model that always reasons, give a function with a limit of its own.

    Args:
        atlas: Atlas with the examples; it receives the labels.
        features: Features to describe, `(layer, index)` or `"L6/1234"`.
        pipeline: Text-generation pipeline of transformers, or a function from a list of prompts to a list of answers.
            Prompts are messages of the user if the pipeline's tokenizer has a chat template.
        name: Name of the language model for the label's source; by default the pipeline's. A function needs one.
        examples: Contexts shown, the strongest first.
        contexts: Contexts in the test, an even number.
        seed: Seed for the choice of contexts and their order.

    Raises:
        ValueError: If a feature does not exist or was never active, or a number is out of range. Also if a function has
            no name, or does not give one text per prompt.
    """
    if examples < 1 or contexts < 2 or contexts % 2:
        raise ValueError(
            f"examples is {examples} and contexts {contexts}; examples must be at least 1, contexts even and at least 2"
        )
    names = [format_feature(*parse_feature(feature)) for feature in features]
    generate, source = _generator(pipeline), f"llm:{_model_name(pipeline, name)}"
    chosen = [_choose_contexts(atlas, feature, examples, contexts, seed) for feature in names]
    answers = _ask(generate, [description_prompt(each.shown) for each in chosen])
    descriptions = [description_in(answer) for answer in answers]
    tested = [at for at, text in enumerate(descriptions) if text and chosen[at].tested]
    replies = _ask(generate, [detection_prompt(descriptions[at] or "", chosen[at].tested) for at in tested])
    answered = [(at, reply) for at, reply in zip(tested, replies, strict=True) if reply.strip()]
    scores = {at: _balanced_accuracy(reply, chosen[at].active) for at, reply in answered}
    results = []
    for at, (feature, text) in enumerate(zip(names, descriptions, strict=True)):
        results.append(FeatureDescription(feature, text, scores.get(at), len(chosen[at].tested)))
        if text:
            details = {"method": "explanation", "contexts": len(chosen[at].tested)}
            atlas.labels.add(Label(feature, text, source, scores.get(at), details))
    return results


class _Contexts(NamedTuple):
    shown: list[Context]
    tested: list[Context]
    active: list[bool]
    """True for each tested context in which the feature is active."""


def _choose_contexts(atlas: FeatureAtlas, feature: str, examples: int, contexts: int, seed: int) -> _Contexts:
    """Chooses the contexts to show and to test; windows of text that are shown are not tested."""
    record = atlas[feature]
    if not record.examples:
        raise ValueError(f"{feature} has no examples: it was never active in the atlas' text")
    # one generator per feature, the same in every process
    generator = random.Random(int(hashlib.sha256(f"{seed} {feature}".encode()).hexdigest()[:8], 16))
    own = list({(example.window, example.position): example for example in record.examples}.values())
    # where examples are few, a third of them is kept for the test
    shown = own[: min(examples, max(1, len(own) - contexts // 2, len(own) * 2 // 3))]
    seen = {example.window for example in shown}
    unseen = [example for example in own[len(shown) :] if example.window not in seen]
    active = generator.sample(unseen, min(contexts // 2, len(unseen)))
    silent = _silent_examples(atlas, feature, len(active), generator)
    active = active[: len(silent)]
    tested = [(_context(example), True) for example in active]
    tested += [(_context(example, marked=False), False) for example in silent]
    generator.shuffle(tested)
    return _Contexts([_context(example) for example in shown], [c for c, _ in tested], [a for _, a in tested])


def _silent_examples(atlas: FeatureAtlas, feature: str, count: int, generator: random.Random) -> list[Example]:
    """Examples of other features of the layer, without a token on which this feature is known to be active."""
    record = atlas[feature]
    known = {
        token
        for example in record.examples
        for token, activation in zip(example.token_ids, example.activations, strict=True)
        if activation > 0
    }
    excluded = {partner["index"] for partner in record.co_active} | {record.index}
    columns = (atlas.features[name].to_pylist() for name in ("layer", "index", "firing_count"))
    candidates = [
        index
        for layer, index, fired in zip(*columns, strict=True)
        if layer == record.layer and fired and index not in excluded
    ]
    found: list[Example] = []
    for index in generator.sample(candidates, min(len(candidates), CANDIDATES_PER_CONTEXT * count)):
        example = generator.choice(atlas[record.layer, index].examples)
        start, end = _span(example)
        if not known & set(example.token_ids[start:end]):
            found.append(example)
        if len(found) == count:
            break
    return found


def _context(example: Example, marked: bool = True) -> Context:
    start, end = _span(example)
    activations = example.activations[start:end]
    return Context(example.tokens[start:end], [marked and activation > 0 for activation in activations])


def _span(example: Example) -> tuple[int, int]:
    return max(0, example.offset - CONTEXT_BEFORE), example.offset + CONTEXT_AFTER + 1


def _balanced_accuracy(reply: str, active: list[bool]) -> float:
    said = numbers_in(reply, len(active))
    hits = [(number in said) == is_active for number, is_active in enumerate(active, 1)]
    rates = [
        sum(hit for hit, is_active in zip(hits, active, strict=True) if is_active == kind) / active.count(kind)
        for kind in (True, False)
    ]
    return sum(rates) / 2


def _ask(generate: Generate, prompts: list[str]) -> list[str]:
    """Answers to the prompts, without the reasoning before them."""
    answers = list(generate(prompts)) if prompts else []
    if len(answers) != len(prompts) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(
            f"the pipeline gave {len(answers)} answers to {len(prompts)} prompts; it must give one text per prompt"
        )
    return list(map(without_reasoning, answers))


def _generator(pipeline: Any) -> Generate:
    """Wraps a pipeline of transformers as a function of prompts; a function stays as it is."""
    tokenizer = getattr(pipeline, "tokenizer", None)
    if tokenizer is None:
        if not callable(pipeline):
            raise ValueError(f"pipeline is a {type(pipeline).__name__}; it must be a pipeline or a function of prompts")
        return pipeline

    def generate(prompts: list[str]) -> list[str]:
        options = {"max_new_tokens": MAX_ANSWER_TOKENS, "do_sample": False, "return_full_text": False}
        if not getattr(tokenizer, "chat_template", None):
            return [output[0]["generated_text"] for output in pipeline(prompts, **options)]
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        outputs = pipeline(chats, **options, tokenizer_encode_kwargs=NO_REASONING)
        # a template may begin the reasoning itself; the mark is then missing in the generated text
        asked = tokenizer.apply_chat_template(chats[0], tokenize=False, add_generation_prompt=True, **NO_REASONING)
        begun = REASONING if asked.rstrip().endswith(REASONING) else ""
        return [begun + output[0]["generated_text"] for output in outputs]

    return generate


def _model_name(pipeline: Any, name: str | None) -> str:
    found = name or str(getattr(getattr(pipeline, "model", None), "name_or_path", "") or "")
    if not found:
        raise ValueError("the language model has no name for the labels' source; give name=")
    # a folder by its own name: an atlas may be shared, so it contains no local path
    return Path(found).resolve().name if name is None and Path(found).exists() else found


__all__ = ["FeatureDescription", "Generate", "describe_features"]
