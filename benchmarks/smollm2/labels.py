"""Features with a concept label on held-out words, and what steering some of them does to sampled text.

The features in a model's atlas, or else in one of the three corpora, are labelled by WordNet's classes and groups on
text of these corpora. The ten best, one a concept as far as there are so many, make a table. Five of them are held at
a multiple of their typical activation while the model goes on from neutral prompts: how often the concept's words come,
beside the same without steering and with another feature of the same layer and firing rate held in the same way, and
what that costs in perplexity.

    python -m benchmarks.smollm2.labels [MODEL] [--tokens 300000 --strength 4 --samples 16 --new-tokens 64]

writes benchmarks/results/labels.json. MODEL is by default the one of `real_checkpoint.py`; its atlas, with the labels,
is in its folder.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
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

from benchmarks.common import concepts, corpora, word_lists
from benchmarks.smollm2.stages import trained_model
from modeling_mfn import Clamp, FeatureAtlas, MFNForCausalLM
from modeling_mfn.data.tokens import token_texts
from modeling_mfn.evaluation.measures.perplexity import perplexity
from modeling_mfn.features.atlas.labels import Label
from modeling_mfn.features.atlas.schema import FOLDER
from modeling_mfn.features.labelling.automatic import label_features
from modeling_mfn.features.labelling.concepts import HELD_IN, HELD_OUT, Concepts, Lexicon, WordFinder

RESULTS = Path(__file__).parents[1] / "results"
PROMPTS = (
    "The", "I think that", "It was", "There is a", "In the morning,", "She said that the", "One of the", "We have seen",
)  # fmt: skip


LISTS = (
    concepts.concepts, concepts.kinds, word_lists.parts_of_speech, word_lists.polarity, word_lists.names,
    word_lists.code_words,
)  # fmt: skip


class Sampling(NamedTuple):
    """How text is sampled."""

    prompts: tuple[str, ...]
    samples: int
    """Continuations of each prompt."""
    new_tokens: int
    seed: int


def inventory(tokenizer: Any) -> Concepts:
    """Closed classes and lists of words, and of all other words WordNet's classes, what is below each of its nouns, its
    names, parts of speech, polarity, and Python's words. Those with the fewest words come first, so that their halves
    are even."""
    closed = word_lists.closed_classes()
    taken = {word for words in closed.values() for (word,) in words}
    found = {name: words for make in LISTS for name, words in make(tokenizer).items()}
    rest = {name: [forms for forms in words if not taken & set(forms)] for name, words in found.items()}
    return dict(sorted({**closed, **rest}.items(), key=lambda item: len(item[1])))


def best_labels(atlas: FeatureAtlas, count: int) -> list[Label]:
    """Those of concepts with the largest scores: the best of each concept, then second ones where there are too few."""
    labels = [label for label in atlas.labels if label.details.get("method") == "concept"]
    ranked: list[tuple[int, float, Label]] = []
    seen: dict[str, int] = {}
    for label in sorted(labels, key=lambda label: -(label.score or 0)):
        ranked.append((seen.get(label.label, 0), -(label.score or 0), label))
        seen[label.label] = seen.get(label.label, 0) + 1
    return [label for *_, label in sorted(ranked, key=lambda item: item[:2])[:count]]


def described(atlas: FeatureAtlas, label: Label, examples: int = 3) -> dict[str, Any]:
    """A label's figures, with examples: the token in question in brackets."""
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


def like(atlas: FeatureAtlas, feature: str, seed: int) -> str:
    """One of the ten features without a concept label, of the same layer, whose firing rates are nearest."""
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
    """For each prompt, prompt and continuations (samples, T), and the tokens of the prompt."""
    for number, prompt in enumerate(how.prompts):
        torch.manual_seed(how.seed + number)
        inputs = tokenizer(prompt, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        text = model.generate(
            **inputs, do_sample=True, top_k=0, num_return_sequences=how.samples, max_new_tokens=how.new_tokens,
            min_new_tokens=how.new_tokens, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        yield text, length


class Written(NamedTuple):
    """What a model wrote, and what its perplexity is."""

    texts: list[tuple[torch.Tensor, int]]
    """As `continuations` gives them."""
    held_out_perplexity: float
    """Of the model, as it was when it wrote, on held-out text."""
    perplexity_to_base: float
    """Of what it wrote to the base model."""


def write(model: MFNForCausalLM, tokenizer: Any, how: Sampling, held_out: Dataset, steering: Any = None) -> Written:
    """Samples text from the model, steered or as it is."""
    with model.steer(steering) if steering else nullcontext():
        texts = list(continuations(model, tokenizer, how))
        own = perplexity(model, held_out)
    return Written(texts, round(own, 3), perplexity_of(model, texts))


def count_words(written: Written, finder: WordFinder, half_of: dict[int, int]) -> dict[str, float]:
    """Words of a concept (`half_of`: word -> half) in 1,000 tokens, with the standard error over continuations."""
    counts: dict[int, list[float]] = {HELD_IN: [], HELD_OUT: []}
    for text, length in written.texts:
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
def perplexity_of(model: MFNForCausalLM, texts: list[tuple[torch.Tensor, int]]) -> float:
    """Of continuations, to the base model, for which alpha is 0 meanwhile."""
    alpha = model.config.alpha
    model.set_blend(0.0)
    total, count = 0.0, 0
    for text, length in texts:
        logits = model(text, use_cache=False).logits[:, length - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, length:].flatten(), reduction="sum")
        total, count = total + loss.item(), count + text[:, length:].numel()
    model.set_blend(alpha)
    return round(math.exp(total / count), 3)


def steering_runs(
    model: MFNForCausalLM, tokenizer: Any, atlas: FeatureAtlas, labels: list[Label], concepts: Concepts, how: Sampling,
    strength: float, held_out: Dataset,
) -> list[dict[str, Any]]:  # fmt: skip
    """Each feature held at `strength` times its typical activation, another one of the same firing rate held alike, and
    none."""
    lexicon = Lexicon.of(concepts, how.seed)
    finder = WordFinder(lexicon, tokenizer, token_texts(tokenizer))
    plain = write(model, tokenizer, how, held_out)
    runs = []
    for label in track(labels, "steering"):
        of_concept = (lexicon.concepts == lexicon.names.index(label.label)).any(1)
        half_of = {int(word): int(lexicon.half[word]) for word in np.flatnonzero(of_concept)}
        other = like(atlas, label.feature, how.seed)
        rates = [round(atlas[name].firing_rate, 6) for name in (label.feature, other)]
        run = {"feature": label.feature, "concept": label.label, "random_feature": other, "firing_rates": rates}
        for condition, name in (("none", None), ("steered", label.feature), ("random", other)):
            chosen = atlas.steering({name: Clamp(strength)}) if name else None
            written = write(model, tokenizer, how, held_out, chosen) if name else plain
            run[condition] = count_words(written, finder, half_of) | {
                "tokens": sum(text[:, length:].numel() for text, length in written.texts),
                "held_out_perplexity": written.held_out_perplexity,
                "perplexity_to_base": written.perplexity_to_base,
                "example": tokenizer.decode(written.texts[0][0][0]),
            }
        runs.append(run)
    return runs


def label(
    model: MFNForCausalLM, tokenizer: Any, text: Dataset, concepts: Concepts, seed: int, folder: Path, **limits: Any
) -> dict[str, Any]:
    """Labels the atlas in `folder`, or one made of `text`, which is saved there."""
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


def study(
    model: MFNForCausalLM, tokenizer: Any, held_out: Dataset, concepts: Concepts, how: Sampling, *,
    strength: float, shown: int, steering: int, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """What the labels in `folder` are, and what steering by them does."""
    atlas = FeatureAtlas.from_pretrained(folder)
    return {
        "atlas": atlas.metadata["data"],
        "features": [described(atlas, label) for label in best_labels(atlas, shown)],
        "steering": steering_runs(
            model, tokenizer, atlas, best_labels(atlas, steering), concepts, how, strength, held_out
        ),
    }


def main(
    model: Annotated[Path | None, typer.Argument(help="Folder of an MFN model; that of real_checkpoint.py.")] = None,
    tokens: Annotated[int, typer.Option(help="To label by, of all corpora; 0: labelled before.")] = 300_000,
    held_out_tokens: Annotated[int, typer.Option(help="Tokens for the perplexity of steered models.")] = 6_144,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 128,
    strength: Annotated[float, typer.Option(help="Multiple of the typical activation.")] = 4.0,
    samples: Annotated[int, typer.Option(help="Continuations of each prompt.")] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 64,
    min_auroc: Annotated[float, typer.Option(help="Least score of a label.")] = 0.9,
    min_words: Annotated[float, typer.Option(help="Least number of words of a concept, in each half.")] = 4.0,
    shown: Annotated[int, typer.Option(help="Features in the table.")] = 10,
    steering: Annotated[int, typer.Option(help="Features that are steered.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the split of words, and of sampling.")] = 0,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
    result: Annotated[str, typer.Option(help="Name of the file of results.")] = "labels",
) -> None:
    torch.set_num_threads(threads)
    folder, file = model or trained_model(), RESULTS / f"{result}.json"
    mfn, tokenizer = MFNForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    mfn.set_blend(1.0)
    concepts, limits = inventory(tokenizer), {"min_auroc": min_auroc, "min_words": min_words}
    command = shlex.join(["python", "-m", "benchmarks.smollm2.labels", *sys.argv[1:]])
    if tokens:
        text = corpora.windows_by_source(tokenizer, 0, tokens, window)
        labelling = {"command": command} | label(mfn, tokenizer, text, concepts, seed, folder, **limits) | limits
    else:
        labelling = json.loads(file.read_text(encoding="utf-8"))["labelling"]
    how = Sampling(PROMPTS, samples, new_tokens, seed)
    settings = how._asdict() | {"strength": strength, "window": window}
    record = {"command": command, "model": folder.name, "settings": settings, "labelling": labelling}
    held_out = corpora.windows_by_source(tokenizer, 1, held_out_tokens, window)
    record |= study(
        mfn, tokenizer, held_out, concepts, how, strength=strength, shown=shown, steering=steering, folder=folder
    )
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
