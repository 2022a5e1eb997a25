"""Small tables of README.md and of the results pages, a function each, from the files under benchmarks/results/."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from modeling_mfn.utils.display import for_table_cell

RESULTS = Path(__file__).parent / "results"
FAMILIES = {"llama": "Llama", "gpt2": "GPT-2"}
ROWS = ("titles of rank", "place names", "time", "body: body part")
"""Concepts that README shows."""


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def feature_rows() -> Iterator[list[str]]:
    """Four features with a label, and the effect and the cost of holding them up."""
    yield [
        "label", "feature", "top tokens", "words per 1,000 tokens: without", "with steering", "perplexity: without",
        "with steering",
    ]  # fmt: skip
    labels = load("labels.json")
    tokens = {of["feature"]: top_tokens(of["examples"]) for of in labels["features"]}
    runs = {run["concept"]: run for run in labels["steering"]}
    for concept in ROWS:
        run = runs[concept]
        words = [f"{run[name]['words_per_1000']:.1f}" for name in ("none", "steered")]
        cost = [f"{run[name]['held_out_perplexity']:.0f}" for name in ("none", "steered")]
        yield [concept.partition(": ")[2] or concept, run["feature"], tokens[run["feature"]], *words, *cost]


def top_tokens(examples: list[str]) -> str:
    """The tokens in brackets of a feature's strongest examples."""
    found = dict.fromkeys(example.partition("[")[2].partition("]")[0].strip() for example in examples)
    return ", ".join(for_table_cell(token, 20) for token in found)


def streams() -> Iterator[list[str]]:
    """Shares of the standardised residual stream that a constant vector and the position tell, block by block."""
    yield ["model and run", "same in every token", "of the rest told by the position", "features active on most tokens"]
    for name, blocks in load("residual_streams.json").items():
        if "/" in name:
            family, group, run = name.split("/")
            budget = "long" if group == "main" else "short"
            shares = [
                " ".join(f"{100 * max(0.0, of[figure]):.0f}" for of in blocks.values()) + " %"
                for figure in ("same_in_every_token", "of_the_rest_told_by_position")
            ]
            most = " ".join(str(of["features_active_on_most_tokens"]) for of in blocks.values())
            yield [f"{FAMILIES[family]}, {run}, {budget}", *shares, most]


def without_features() -> Iterator[list[str]]:
    """Perplexity of the long runs through features, and of their backbones with the features left out."""
    yield ["run", "through features: drama", "dictionary", "code", "features left out: drama", "dictionary", "code"]
    for family, title in FAMILIES.items():
        for file in sorted((RESULTS / "fidelity" / family / "main").glob("*.json")):
            of = json.loads(file.read_text(encoding="utf-8"))
            columns = [of["perplexity"], of.get("perplexity_at_alpha_0", {})]
            cells = [f"{column[domain]:.1f}" if column else "" for column in columns for domain in of["perplexity"]]
            yield [f"{title}, {file.stem}", *cells]


def real_tried() -> Iterator[list[str]]:
    """Every setting that was tried on the real checkpoint, with the loss that chose among them."""
    yield ["method", "settings", "loss on validation text"]
    for method in ("features", "sae-standardised", "sae-raw"):
        for of in load(f"real_checkpoint/{method}.json")["tried"]:
            settings = ", ".join(f"`{name}` {value}" for name, value in of["settings"].items())
            yield [method, settings, f"{of['validation_loss']:.3f}"]


def label_counts() -> Iterator[list[str]]:
    """How many features get a label of which kind."""
    of = load("labels.json")["labelling"]
    yield ["labels", "features"]
    yield [f"one of {len(of['concepts'])} concepts", str(of["labelled"])]
    yield ["one of these concepts, with words dealt out by chance", str(of["with_shuffled_words"])]
    yield ["a set of tokens", f"{of['token_sets']:,}"]
    atlas = load("atlas.json")["atlas"]
    yield ["all features of the model", f"{len(atlas['layers']) * atlas['num_features']:,}"]


def transfer() -> Iterator[list[str]]:
    """What features of one domain lose on others, in MFN models and in post-hoc SAEs."""
    figures = {"perplexity_loss_source": "source", "perplexity_loss_targets": "other domains", "excess_gap": "excess"}
    yield ["", *(f"{name}: {of}" for name in figures.values() for of in ("MFN", "SAE"))]
    for family, title in FAMILIES.items():
        found = load(f"predictions/{family}/P5.json")["figures"]
        yield [title, *(f"{found[of][name]['value']:.2f}" for name in figures for of in ("MFN", "post-hoc SAE"))]


def layer_speed() -> Iterator[list[str]]:
    """Time of one layer as a ratio to its encoder product."""
    yield ["", "forward", "forward and backward"]
    for name, ratios in load("layer.json")["ratios"].items():
        yield [name, f"{ratios['forward']:.2f}", f"{ratios['both']:.2f}"]


def atlas_speed() -> Iterator[list[str]]:
    """Speed and memory of a harvest."""
    of = load("atlas.json")
    yield ["figure", "value"]
    for name, speed in of["speed"]["tokens_per_second"].items():
        yield [f"tokens per second: {name}", f"{speed:.0f}"]
    for name in ("without", "with"):
        share = of["speed"][f"harvest_speed_of_forward_{name}_head"]["clock"]
        yield [f"speed of the harvest compared with the forward pass {name} the LM head", f"{share:.2f}"]
    for name, memory in of["atlas"]["resident_mb"].items():
        yield [f"resident memory, {name}", f"{memory:,.0f} MB"]
    yield [f"files of an atlas of {of['atlas']['tokens']:,} tokens", f"{of['atlas']['files_mb']:.0f} MB"]


def demo() -> Iterator[list[str]]:
    """Perplexities of the demo, and its size."""
    of = load("demo.json")
    yield ["", "value"]
    for title, name in (
        ("perplexity: base model (4-bit weights made float32)", "base_perplexity"),
        ("perplexity: MFN model, alpha 0 (logits equal bit for bit)", "perplexity_alpha_0"),
        ("perplexity: MFN model, alpha 1", "perplexity_alpha_1"),
        ("perplexity: MFN model, alpha 1, before training", "untrained_perplexity_alpha_1"),
    ):
        yield [title, f"{of[name]:,.1f}"]
    yield ["training tokens", f"{sum(phase['tokens'] for phase in of['training']):,}"]
    yield ["seconds of training", str(of["training_seconds"])]


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {
    "feature-rows": feature_rows,
    "streams": streams,
    "without-features": without_features,
    "real-tried": real_tried,
    "label-counts": label_counts,
    "transfer": transfer,
    "layer-speed": layer_speed,
    "atlas-speed": atlas_speed,
    "demo": demo,
}
