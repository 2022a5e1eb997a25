"""Labels of features on held-out words, and the effect of steering by them on sampled text.

The features of a model's atlas are labelled by WordNet's classes and groups on text of three domains. A model without
an atlas gets one first. The best features make a table, one per concept if there are enough concepts.

Some features are clamped to a multiple of their typical activation while the model continues neutral prompts. Words of
the concept are counted without steering, with the feature, and with a control. The control is another feature of the
same layer and of about the same firing rate. Perplexity shows the cost.

    python -m benchmarks.smollm2.labels [MODEL] [--tokens 300000 --strength 4 --samples 16 --new-tokens 64]

writes benchmarks/results/labels.json, and the atlas with its labels into the folder of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from transformers import AutoTokenizer

from benchmarks.common import concepts, corpora, records, word_lists
from benchmarks.smollm2.stages import trained_model
from modeling_mfn import Clamp, FeatureAtlas, MFNForCausalLM
from modeling_mfn.data.tokens import token_texts
from modeling_mfn.evaluation.measures.perplexity import perplexity
from modeling_mfn.features.atlas.labels import Label
from modeling_mfn.features.atlas.schema import FOLDER
from modeling_mfn.features.labelling.automatic import label_features
from modeling_mfn.features.labelling.concepts import HELD_IN, HELD_OUT, Concepts, Lexicon, WordFinder
from modeling_mfn.model.modes import at_alpha

PROMPTS = (
    "The", "I think that", "It was", "There is a", "In the morning,", "She said that the", "One of the", "We have seen",
)  # fmt: skip


LISTS = (
    concepts.concepts, concepts.kinds, word_lists.parts_of_speech, word_lists.polarity, word_lists.names,
    word_lists.code_words,
)  # fmt: skip


class Sampling(NamedTuple):
    """Settings of sampled text."""

    prompts: tuple[str, ...]
    samples: int
    """Continuations per prompt."""
    new_tokens: int
    """Tokens per continuation."""
    seed: int


def inventory(tokenizer: Any) -> Concepts:
    """All concepts to choose labels from: closed classes, and `LISTS` of all other words.

    Concepts with few words come first, so that their words are split evenly into halves.
    """
    closed = word_lists.closed_classes()
    taken = {word for words in closed.values() for (word,) in words}
    found = {name: words for make in LISTS for name, words in make(tokenizer).items()}
    rest = {name: [forms for forms in words if not taken & set(forms)] for name, words in found.items()}
    return dict(sorted({**closed, **rest}.items(), key=lambda item: len(item[1])))


def best_labels(atlas: FeatureAtlas, count: int) -> list[Label]:
    """Concept labels with the largest scores: first the best label of each concept, then the second best, and so on."""
    labels = [label for label in atlas.labels if label.details.get("method") == "concept"]
    ranked: list[tuple[int, float, Label]] = []
    seen: dict[str, int] = {}
    for label in sorted(labels, key=lambda label: -(label.score or 0)):
        ranked.append((seen.get(label.label, 0), -(label.score or 0), label))
        seen[label.label] = seen.get(label.label, 0) + 1
    return [label for *_, label in sorted(ranked, key=lambda item: item[:2])[:count]]


def label_record(atlas: FeatureAtlas, label: Label, examples: int = 3) -> dict[str, Any]:
    """Figures of a label, with examples in which the active token is in brackets."""
    record = atlas[label.feature]
    texts = []
    for example in record.examples[:examples]:
        tokens = [f"[{token}]" if at == example.offset else token for at, token in enumerate(example.tokens)]
        texts.append("".join(tokens[max(0, example.offset - 10) : example.offset + 5]))
    figures = {key: label.details[key] for key in label.details if key not in ("method", "concept")}
    return {
        "feature": label.feature,
        "concept": label.label,
        "score": label.score,
        "firing_rate": round(record.firing_rate, 6),
        "typical_activation": record.mean_activation,
        **figures,
        "promotes": [entry["token"] for entry in record.promoted[:5]],
        "examples": texts,
    }


def control_feature(atlas: FeatureAtlas, feature: str, seed: int) -> str:
    """Random feature without a concept label, among the ten of the same layer that are closest in firing rate."""
    record = atlas[feature]
    labelled = {label.feature for label in atlas.labels if label.details.get("method") == "concept"}
    frame = atlas.to_pandas()
    frame = frame[
        (frame["layer"] == record.layer) & ~frame["name"].isin({*labelled, feature}) & (frame.firing_count > 0)
    ]
    nearest = (np.log(frame["firing_rate"]) - math.log(record.firing_rate)).abs().nsmallest(10).index
    return str(frame.loc[nearest, "name"].sample(1, random_state=seed).item())


@torch.no_grad()
def continuations(model: MFNForCausalLM, tokenizer: Any, how: Sampling) -> Iterator[tuple[torch.Tensor, int]]:
    """Yields for each prompt its continuations, (samples, T) with the prompt, and the length of the prompt."""
    for number, prompt in enumerate(how.prompts):
        torch.manual_seed(how.seed + number)
        inputs = tokenizer(prompt, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        text = model.generate(
            **inputs, do_sample=True, top_k=0, num_return_sequences=how.samples, max_new_tokens=how.new_tokens,
            min_new_tokens=how.new_tokens, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        yield text, length


class SampledText(NamedTuple):
    """Text that a model wrote, with perplexities."""

    texts: list[tuple[torch.Tensor, int]]
    """Results of [`continuations`]."""
    held_out_perplexity: float
    """Perplexity of the steered model on held-out text."""
    perplexity_to_base: float
    """Perplexity of the base model on the continuations."""


def sample_text(
    model: MFNForCausalLM, tokenizer: Any, how: Sampling, held_out: Dataset, steering: Any = None
) -> SampledText:
    """Samples text from the model, with or without steering."""
    with model.steer(steering) if steering else nullcontext():
        texts = list(continuations(model, tokenizer, how))
        own = perplexity(model, held_out)
    return SampledText(texts, round(own, 3), base_perplexity(model, texts))


def count_words(sampled: SampledText, finder: WordFinder, half_of: dict[int, int]) -> dict[str, float]:
    """Words of a concept per 1,000 tokens, with the standard error over continuations.

    Args:
        sampled: text to count in.
        finder: finds words in tokens.
        half_of: word of the concept -> its half, held in or held out.
    """
    counts: dict[int, list[float]] = {HELD_IN: [], HELD_OUT: []}
    for text, length in sampled.texts:
        words = finder.find(text.numpy())[:, length:]
        halves = np.vectorize(lambda word: half_of.get(word, -1), otypes=[int])(words)
        for half, rates in counts.items():
            rates += ((halves == half).mean(1) * 1000).tolist()
    figures = {}
    held_in, held_out = np.array(counts[HELD_IN]), np.array(counts[HELD_OUT])
    for name, rates in (("words", held_in + held_out), ("held_in_words", held_in), ("held_out_words", held_out)):
        figures[f"{name}_per_1000"] = round(float(rates.mean()), 3)
        figures[f"{name}_standard_error"] = round(float(rates.std(ddof=1) / math.sqrt(len(rates))), 3)
    return figures


@torch.no_grad()
def base_perplexity(model: MFNForCausalLM, texts: list[tuple[torch.Tensor, int]]) -> float:
    """Perplexity of the base model on continuations, given their prompts."""
    total, count = 0.0, 0
    with at_alpha(model, 0.0):
        for text, length in texts:
            logits = model(text, use_cache=False).logits[:, length - 1 : -1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, length:].flatten(), reduction="sum")
            total, count = total + loss.item(), count + text[:, length:].numel()
    return round(math.exp(total / count), 3)


def steering_runs(
    model: MFNForCausalLM, tokenizer: Any, atlas: FeatureAtlas, labels: list[Label], concepts: Concepts, how: Sampling,
    strength: float, held_out: Dataset,
) -> list[dict[str, Any]]:  # fmt: skip
    """Record per label: text without steering, with the feature, and with a control feature.

    Features are clamped to `strength` times their typical activation.
    """
    lexicon = Lexicon.of(concepts, how.seed)
    finder = WordFinder(lexicon, tokenizer, token_texts(tokenizer))
    plain = sample_text(model, tokenizer, how, held_out)
    runs = []
    for label in track(labels, "steering"):
        of_concept = (lexicon.concepts == lexicon.names.index(label.label)).any(1)
        half_of = {int(word): int(lexicon.half[word]) for word in np.flatnonzero(of_concept)}
        other = control_feature(atlas, label.feature, how.seed)
        rates = [round(atlas[name].firing_rate, 6) for name in (label.feature, other)]
        run = {"feature": label.feature, "concept": label.label, "random_feature": other, "firing_rates": rates}
        for condition, name in (("none", None), ("steered", label.feature), ("random", other)):
            chosen = atlas.steering({name: Clamp(strength)}) if name else None
            sampled = sample_text(model, tokenizer, how, held_out, chosen) if name else plain
            run[condition] = count_words(sampled, finder, half_of) | {
                "tokens": sum(text[:, length:].numel() for text, length in sampled.texts),
                "held_out_perplexity": sampled.held_out_perplexity,
                "perplexity_to_base": sampled.perplexity_to_base,
                "example": tokenizer.decode(sampled.texts[0][0][0]),
            }
        runs.append(run)
    return runs


def label_atlas(
    model: MFNForCausalLM, tokenizer: Any, text: Dataset, concepts: Concepts, seed: int, folder: Path, **limits: Any
) -> dict[str, Any]:
    """Labels the atlas in a folder and saves it there. Builds a missing atlas from `text`.

    Returns:
        Numbers of labels.
    """
    there = (folder / FOLDER).exists()
    atlas = FeatureAtlas.from_pretrained(folder) if there else FeatureAtlas.build(model, tokenizer, text)
    report = label_features(atlas, model, tokenizer, text, concepts, seed=seed, **limits)
    Console().print(report)
    atlas.save_pretrained(folder)
    return {
        "tokens": report.tokens,
        "labelled": report.labelled,
        "with_shuffled_words": report.control,
        "token_sets": report.token_sets,
        "concepts": {of.name: of.features for of in report.concepts if of.enough},
    }


def table_and_steering(
    model: MFNForCausalLM, tokenizer: Any, held_out: Dataset, concepts: Concepts, how: Sampling, *,
    strength: float, shown: int, steering: int, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Record of the best labels in a folder's atlas, and of steering by them.

    Args:
        model: an MFN model.
        tokenizer: tokenizer of the model.
        held_out: windows for the perplexity of steered models.
        concepts: concepts that labels were chosen from.
        how: settings of sampled text.
        strength: multiple of the typical activation.
        shown: number of labels in the table.
        steering: number of labels to steer by.
        folder: folder of the atlas.
    """
    atlas = FeatureAtlas.from_pretrained(folder)
    return {
        "atlas": atlas.metadata["data"],
        "features": [label_record(atlas, label) for label in best_labels(atlas, shown)],
        "steering": steering_runs(
            model, tokenizer, atlas, best_labels(atlas, steering), concepts, how, strength, held_out
        ),
    }


def main(
    model: Annotated[
        Path | None, typer.Argument(help="Folder of an MFN model; default: the model of real_checkpoint.py.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to label by; 0 keeps the labels of an earlier run.")] = 300_000,
    held_out_tokens: Annotated[int, typer.Option(help="Tokens for the perplexity of steered models.")] = 6_144,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    strength: Annotated[float, typer.Option(help="Multiple of the typical activation.")] = 4.0,
    samples: Annotated[int, typer.Option(help="Continuations per prompt.")] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens per continuation.")] = 64,
    min_auroc: Annotated[float, typer.Option(help="Minimum score of a label.")] = 0.9,
    min_words: Annotated[float, typer.Option(help="Minimum number of words of a concept in each half.")] = 4.0,
    shown: Annotated[int, typer.Option(help="Features in the table.")] = 10,
    steering: Annotated[int, typer.Option(help="Features to steer by.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the split of words and of sampling.")] = 0,
    threads: Annotated[int, typer.Option(help="Number of threads.")] = 1,
    result: Annotated[str, typer.Option(help="Name of the results file.")] = "labels",
) -> None:
    """Labels the atlas, steers by the best labels and writes the results."""
    torch.set_num_threads(threads)
    folder, file = model or trained_model(), records.RESULTS / f"{result}.json"
    mfn, tokenizer = MFNForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    mfn.set_blend(1.0)
    concepts, limits = inventory(tokenizer), {"min_auroc": min_auroc, "min_words": min_words}
    command = records.command_line("smollm2.labels")
    if tokens:
        text = corpora.windows_by_source(tokenizer, 0, tokens, window)
        labelling = {"command": command} | label_atlas(mfn, tokenizer, text, concepts, seed, folder, **limits) | limits
    else:
        labelling = records.read_record(file)["labelling"]
    how = Sampling(PROMPTS, samples, new_tokens, seed)
    settings = how._asdict() | {"strength": strength, "window": window}
    record = {"command": command, "model": folder.name, "settings": settings, "labelling": labelling}
    held_out = corpora.windows_by_source(tokenizer, 1, held_out_tokens, window)
    record |= table_and_steering(
        mfn, tokenizer, held_out, concepts, how, strength=strength, shown=shown, steering=steering, folder=folder
    )
    records.write_record(file, record)


if __name__ == "__main__":
    typer.run(main)
