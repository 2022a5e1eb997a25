"""Explanations of features by a language model, and how well they tell where a feature is active.

After Bills et al. 2023 (explain from examples) and the detection score of Paulo et al. 2024 (EleutherAI's delphi).
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
    detection_prompt,
    explanation_of,
    explanation_prompt,
    numbers_of,
    without_reasoning,
)

Generate = Callable[[list[str]], list[str]]
"""Prompts -> the text that goes on from each."""

CONTEXT_BEFORE, CONTEXT_AFTER = 11, 4
"""Tokens of a context around the one on which a feature is active."""
NO_REASONING = {"enable_thinking": False}
"""Said to chat templates; those that do not know it do not read it."""


class Explained(NamedTuple):
    """A feature's explanation."""

    feature: str
    explanation: str | None
    """`None` if the model gave none; the atlas then has no label."""
    score: float | None
    """Balanced accuracy of telling contexts in which the feature is active by the explanation: 1 is perfect, 0.5 is
    chance. `None` if there were no contexts to try it on, or the model did not say which of them match."""
    contexts: int
    """How many there were to try it on, half of them with the feature active."""


def explain_features(
    atlas: FeatureAtlas,
    features: Iterable[FeatureName],
    pipeline: Generate | Any,
    *,
    name: str | None = None,
    examples: int = 10,
    contexts: int = 10,
    seed: int = 0,
) -> list[Explained]:
    """Has a language model explain features, and tries each explanation.

    The model is shown contexts in which the feature is active, with the tokens marked, and asked for a short phrase.
    Then it is given the phrase and shuffled contexts, none of them seen before, and asked which of these match. The
    phrase becomes the feature's label of source `llm:` and the name of the model, with the balanced accuracy as score.

    Half of the contexts tried have the feature active. The others are around firings of other features of its layer, of
    which none is among its most co-active ones, and hold no token that this feature is known to fire on; an atlas does
    not say for sure that it is silent there.

    Text of the examples is hostile until proven otherwise: each context is one line, in which nothing is a line break,
    a control character, a mark of ours or a special token of a chat.

    Of a model that reasons first, `<think> ... </think>`, only what comes after counts; where a pipeline's limit of 48
    tokens cuts the reasoning off there is no answer. A chat template that knows `enable_thinking` is told to leave it
    out; for a model that always reasons, give a function with a limit of its own.

    Args:
        atlas: the atlas, whose examples are shown.
        features: `(layer, index)` or `"L6/1234"`.
        pipeline: a text-generation pipeline of transformers, or any function from a list of prompts to a list of
            answers. Where the pipeline's tokenizer has a chat template, prompts are messages of the user.
        name: of the language model, for the label's source; by default the pipeline's model. A function needs one.
        examples: contexts shown, the strongest first.
        contexts: contexts tried, an even number.
        seed: of the choice of contexts and their order.

    Raises:
        ValueError: on a feature that does not exist or was never active, a number that cannot be, or a function without
            a name or with not one text an answer.
    """
    if examples < 1 or contexts < 2 or contexts % 2:
        raise ValueError(
            f"examples is {examples} and contexts {contexts}; examples must be at least 1, contexts even and at least 2"
        )
    names = [format_feature(*parse_feature(feature)) for feature in features]
    generate, source = _generator(pipeline), f"llm:{_model_name(pipeline, name)}"
    chosen = [_choose(atlas, feature, examples, contexts, seed) for feature in names]
    answers = _ask(generate, [explanation_prompt(of.shown) for of in chosen])
    explanations = [explanation_of(answer) for answer in answers]
    tried = [at for at, text in enumerate(explanations) if text and chosen[at].tried]
    replies = _ask(generate, [detection_prompt(explanations[at] or "", chosen[at].tried) for at in tried])
    answered = [(at, reply) for at, reply in zip(tried, replies, strict=True) if reply.strip()]
    scores = {at: _balanced_accuracy(reply, chosen[at].active) for at, reply in answered}
    results = []
    for at, (feature, text) in enumerate(zip(names, explanations, strict=True)):
        results.append(Explained(feature, text, scores.get(at), len(chosen[at].tried)))
        if text:
            details = {"method": "explanation", "contexts": len(chosen[at].tried)}
            atlas.labels.add(Label(feature, text, source, scores.get(at), details))
    return results


class _Contexts(NamedTuple):
    shown: list[Context]
    tried: list[Context]
    active: list[bool]
    """Of those tried, whether the feature is active in them."""


def _choose(atlas: FeatureAtlas, feature: str, examples: int, contexts: int, seed: int) -> _Contexts:
    """Which contexts are shown, and which tried. Places in the text that are shown are not tried."""
    record = atlas[feature]
    if not record.examples:
        raise ValueError(f"{feature} has no examples: it was never active in the atlas' text")
    # a number of its own for each feature, the same in every process
    generator = random.Random(int(hashlib.sha256(f"{seed} {feature}".encode()).hexdigest()[:8], 16))
    places = {(example.window, example.position): example for example in record.examples}
    own = list(places.values())
    # at least a third is kept for the trial, if there are few
    shown = own[: min(examples, max(1, len(own) - contexts // 2, len(own) * 2 // 3))]
    seen = {example.window for example in shown}
    unseen = [example for example in own[len(shown) :] if example.window not in seen]
    active = generator.sample(unseen, min(contexts // 2, len(unseen)))
    silent = _elsewhere(atlas, feature, len(active), generator)
    active = active[: len(silent)]
    tried = [(_context(example), True) for example in active] + [
        (_context(example, False), False) for example in silent
    ]
    generator.shuffle(tried)
    return _Contexts([_context(example) for example in shown], [c for c, _ in tried], [a for _, a in tried])


def _elsewhere(atlas: FeatureAtlas, feature: str, count: int, generator: random.Random) -> list[Example]:
    """Examples of other features of the layer, in which this one is not known to be active."""
    record = atlas[feature]
    known = {
        token
        for example in record.examples
        for token, activation in zip(example.token_ids, example.activations, strict=True)
        if activation > 0
    }
    beside = {partner["index"] for partner in record.co_active} | {record.index}
    layers, others = atlas.features["layer"].to_pylist(), atlas.features["index"].to_pylist()
    counts = atlas.features["firing_count"].to_pylist()
    candidates = [
        index
        for layer, index, fired in zip(layers, others, counts, strict=True)
        if layer == record.layer and fired and index not in beside
    ]
    found: list[Example] = []
    for index in generator.sample(candidates, min(len(candidates), 8 * count)):
        example = generator.choice(atlas[record.layer, index].examples)
        start, end = _span(example)
        if not known & set(example.token_ids[start:end]):
            found.append(example)
        if len(found) == count:
            break
    return found


def _span(example: Example) -> tuple[int, int]:
    return max(0, example.offset - CONTEXT_BEFORE), example.offset + CONTEXT_AFTER + 1


def _context(example: Example, marked: bool = True) -> Context:
    start, end = _span(example)
    activations = example.activations[start:end]
    return Context(example.tokens[start:end], [marked and activation > 0 for activation in activations])


def _balanced_accuracy(reply: str, active: list[bool]) -> float:
    said = numbers_of(reply, len(active))
    hits = [(number in said) == is_active for number, is_active in enumerate(active, 1)]
    rates = [
        sum(hit for hit, is_active in zip(hits, active, strict=True) if is_active == kind) / active.count(kind)
        for kind in (True, False)
    ]
    return sum(rates) / 2


def _ask(generate: Generate, prompts: list[str]) -> list[str]:
    """The answers, without the reasoning before them."""
    answers = list(generate(prompts)) if prompts else []
    if len(answers) != len(prompts) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(
            f"the pipeline gave {len(answers)} answers to {len(prompts)} prompts; it must give a text each"
        )
    return list(map(without_reasoning, answers))


def _generator(pipeline: Any) -> Generate:
    """A pipeline of transformers as a function of prompts; a function stays what it is."""
    tokenizer = getattr(pipeline, "tokenizer", None)
    if tokenizer is None:
        if not callable(pipeline):
            raise ValueError(f"pipeline is a {type(pipeline).__name__}; it must be a pipeline or a function of prompts")
        return pipeline

    def generate(prompts: list[str]) -> list[str]:
        options = {"max_new_tokens": 48, "do_sample": False, "return_full_text": False}
        if not getattr(tokenizer, "chat_template", None):
            return [output[0]["generated_text"] for output in pipeline(prompts, **options)]
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        outputs = pipeline(chats, **options, tokenizer_encode_kwargs=NO_REASONING)
        # some templates begin the reasoning themselves, which is then no part of what is generated
        asked = tokenizer.apply_chat_template(chats[0], tokenize=False, add_generation_prompt=True, **NO_REASONING)
        begun = REASONING if asked.rstrip().endswith(REASONING) else ""
        return [begun + output[0]["generated_text"] for output in outputs]

    return generate


def _model_name(pipeline: Any, name: str | None) -> str:
    found = name or str(getattr(getattr(pipeline, "model", None), "name_or_path", "") or "")
    if not found:
        raise ValueError("the language model has no name for the labels' source; give name=")
    # a folder by its own name alone, since an atlas is made to be shared
    return Path(found).resolve().name if name is None and Path(found).exists() else found


__all__ = ["Explained", "Generate", "explain_features"]
