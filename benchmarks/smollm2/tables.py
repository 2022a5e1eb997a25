"""Tables of the benchmarks on SmolLM2-135M. `python -m benchmarks.tables` writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.common import records
from benchmarks.small.tables import DOMAINS, as_settings, value_range
from modeling_mfn.utils.display import for_table_cell

CONDITIONS = ("none", "steered", "random")
"""Text without steering, with a feature, and with a control feature."""
FEATURE_ROWS = ("titles of rank", "place names", "time", "plant")
"""Concepts in the short table of features."""
ABLATIONS = {"zero": "zero ablation", "mean": "mean ablation"}
CURVES = {"dense": "dense control", "joint": "MFN model, alpha 1"}
"""Stage of `all_blocks.py` -> column."""
ALL_BLOCKS = {
    "base": "base model",
    "joint": "MFN model",
    "joint-in-4-rounds": "MFN model, coded in four rounds",
    "base-in-bfloat16": "base model in bfloat16",
    "joint-in-bfloat16": "MFN model in bfloat16",
    "cached": "MFN layers from the cache alone",
    "cached-tuned": "the same, at twice the learning rate",
    "cached-in-4-rounds": "MFN layers from the cache alone, coded in four rounds",
    "sae-update": "SAEs of the update",
    "sae-stream": "SAEs of the stream",
    "mean-update": "mean update",
    "mean-stream": "mean stream",
}
"""Method of `all_blocks.py` -> row."""


def real_checkpoint() -> Iterator[list[str]]:
    """Loss of each method above the base model, in nats per token."""
    summary = records.result("real_checkpoint/summary")
    all_positions, first_kept = summary["all_positions"], summary["without_first"]["all_layers"]
    single = [of for blocks, of in all_positions.items() if blocks != "all_layers"]
    yield [
        "method", *DOMAINS, "mean", "recovered (zero / mean ablation)", "first tokens kept: mean",
        "first tokens kept: recovered", "one block alone: mean", "explained variance, by block", "dead features",
    ]  # fmt: skip
    for method, found in all_positions["all_layers"].items():
        record = records.result(f"real_checkpoint/evaluate/{method}")
        layers = [of for name, of in record.items() if name.startswith("layer_")]
        dead = value_range([100 * of["dead_share"] for of in layers], ".1f") + " %" if layers else ""
        yield [
            ABLATIONS.get(method, method),
            *(f"{found['delta'][domain]:.3f}" for domain in (*DOMAINS, "mean")),
            recovered(found),
            f"{first_kept[method]['delta']['mean']:.3f}",
            recovered(first_kept[method]),
            " ".join(f"{of[method]['delta']['mean']:.3f}" for of in single),
            " ".join(f"{of['explained_variance']:.3f}" for of in layers),
            dead,
        ]


def recovered(found: dict[str, Any]) -> str:
    """Shares of the two ablations' loss that a method recovers."""
    return " / ".join(f"{100 * found[f'recovered_of_{ablated}']['mean']:.1f}" for ablated in ABLATIONS) + " %"


def real_tried() -> Iterator[list[str]]:
    """All settings that were tried on the real checkpoint, with their validation loss."""
    yield ["method", "settings", "loss on validation text"]
    for method in ("features", "sae-standardised", "sae-raw"):
        for of in records.result(f"real_checkpoint/{method}")["tried"]:
            yield [method, as_settings(of["settings"]), f"{of['validation_loss']:.3f}"]


def all_blocks() -> Iterator[list[str]]:
    """Loss of each method with all blocks read through features, above the dense control, in nats per token."""
    yield ["method", *DOMAINS, "mean", "above the base: mean", "explained variance, least and most"]
    found = records.results("all_blocks/evaluate/*")
    base, dense = found["base"]["loss"], found["dense"]["loss"]
    for method, record in ((method, found[method]) for method in ALL_BLOCKS if method in found):
        lost = [f"{record['loss'][domain] - dense[domain]:.3f}" for domain in (*DOMAINS, "mean")]
        variance = [of["explained_variance_standardised"] for of in record.get("layers", {}).values()]
        told = value_range(variance, ".2f") if variance else ""
        yield [ALL_BLOCKS[method], *lost, f"{record['loss']['mean'] - base['mean']:.3f}", told]


def all_blocks_curve() -> Iterator[list[str]]:
    """Loss of the MFN model on validation text by tokens of its training, next to the dense control at its end."""
    dense, joint = (records.result(f"all_blocks/{stage}")["curve"] for stage in CURVES)
    yield ["tokens inside the model", "loss", "above the dense control at its end"]
    for at in joint:
        yield [f"{at['tokens']:,}", f"{at['loss']:.3f}", f"{at['loss'] - dense[-1]['loss']:.3f}"]


def labels() -> Iterator[list[str]]:
    """Best features with a concept label."""
    yield ["concept", "feature", "area", "words alone", "precision", "recall", "fires on", "promotes", "example"]
    for of in records.result("labels")["features"]:
        figures = [f"{of[name]:.3f}" for name in ("auroc", "auroc_words", "precision", "recall")]
        promotes = " ".join(f"<code>{for_table_cell(token, 20)}</code>" for token in of["promotes"][:3])
        example = for_table_cell(" ".join(of["examples"][0].split()), 120)
        yield [of["concept"], of["feature"], *figures, f"{of['firing_rate']:.2%}", promotes, example]


def label_counts() -> Iterator[list[str]]:
    """Number of features with each kind of label."""
    of = records.result("labels")["labelling"]
    yield ["label", "features"]
    yield [f"one of {len(of['concepts'])} concepts", str(of["labelled"])]
    yield ["one of these concepts, with words dealt out by chance", str(of["with_shuffled_words"])]
    yield ["a set of tokens", f"{of['token_sets']:,}"]
    atlas = records.result("atlas")["atlas"]
    yield ["all features of the model", f"{len(atlas['layers']) * atlas['num_features']:,}"]


def feature_rows() -> Iterator[list[str]]:
    """Four features with a label, and the effect and the cost of steering by them."""
    yield [
        "label", "feature", "top tokens", "words per 1,000 tokens: without", "with steering", "perplexity: without",
        "with steering",
    ]  # fmt: skip
    record = records.result("labels")
    tokens = {of["feature"]: top_tokens(of["examples"]) for of in record["features"]}
    runs = {run["concept"]: run for run in record["steering"]}
    for concept in FEATURE_ROWS:
        run = runs[concept]
        words = [f"{run[name]['words_per_1000']:.1f}" for name in ("none", "steered")]
        cost = [f"{run[name]['held_out_perplexity']:.0f}" for name in ("none", "steered")]
        yield [concept.partition(": ")[2] or concept, run["feature"], tokens[run["feature"]], *words, *cost]


def top_tokens(examples: list[str]) -> str:
    """Tokens in brackets of a feature's strongest examples."""
    found = dict.fromkeys(example.partition("[")[2].partition("]")[0].strip() for example in examples)
    return ", ".join(for_table_cell(token, 20) for token in found)


def steering() -> Iterator[list[str]]:
    """Words of a concept in sampled text, and the cost, without steering, with a feature and with a control feature."""
    yield [
        "concept", "feature", "control feature", "words per 1,000 tokens: no steering", "feature", "control",
        "held-out words: no steering / feature / control", "perplexity of held-out text",
        "perplexity of the base model on the sampled text",
    ]  # fmt: skip
    others = ("held_out_words_per_1000", "held_out_perplexity", "perplexity_to_base")
    for run in records.result("labels")["steering"]:
        of = [run[name] for name in CONDITIONS]
        words = [f"{each['words_per_1000']:.1f} ± {each['words_standard_error']:.1f}" for each in of]
        rest = (" / ".join(f"{each[name]:.1f}" for each in of) for name in others)
        yield [run["concept"], run["feature"], run["random_feature"], *words, *rest]


def demo() -> Iterator[list[str]]:
    """Perplexities of the demo, and its size."""
    of = records.result("demo")
    yield ["figure", "value"]
    for title, name in (
        ("perplexity: base model (4-bit weights made float32)", "base_perplexity"),
        ("perplexity: MFN model, alpha 0 (logits equal bit for bit)", "perplexity_alpha_0"),
        ("perplexity: MFN model, alpha 1", "perplexity_alpha_1"),
    ):
        yield [title, f"{of[name]:,.1f}"]
    yield ["training tokens", f"{sum(phase['tokens'] for phase in of['training']):,}"]
    yield ["seconds of training", str(of["seconds"]["training"])]
    yield ["seconds of the whole demo", str(of["seconds"]["all"])]
    yield ["of these, for downloads", str(of["seconds"]["assets"])]
    yield ["peak memory", f"{of['peak_memory_gb']} GB"]


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {
    "real-checkpoint": real_checkpoint,
    "real-tried": real_tried,
    "all-blocks": all_blocks,
    "all-blocks-curve": all_blocks_curve,
    "labels": labels,
    "label-counts": label_counts,
    "feature-rows": feature_rows,
    "steering": steering,
    "demo": demo,
}
