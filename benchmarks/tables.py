"""The tables of README.md and of pages under docs/, from the files under benchmarks/results/.

python -m benchmarks.tables    # writes them between their <!-- table: NAME --> and <!-- end --> marks
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import short_tables
from modeling_mfn.evaluation.report import deciding
from modeling_mfn.evaluation.result import MFN, POST_HOC_SAE, RESIDUAL_STREAM, PredictionResult, estimates_of
from modeling_mfn.utils.display import for_table_cell

ROOT = Path(__file__).parent.parent
FIDELITY = ROOT / "benchmarks" / "results" / "fidelity"
REAL = ROOT / "benchmarks" / "results" / "real_checkpoint"
PREDICTIONS = ROOT / "benchmarks" / "results" / "predictions"
SENSITIVITY = ROOT / "benchmarks" / "results" / "sensitivity" / "summary.json"
LABELS = ROOT / "benchmarks" / "results" / "labels.json"
DOCUMENTS = tuple(
    file
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "<!-- table: " in file.read_text(encoding="utf-8")
)
"""Documents with marked tables."""
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
OF_STEERING = ("held_out_words_per_1000", "held_out_perplexity", "perplexity_to_base")
"""Figures that are given as it is / steered / with the random feature."""
DOMAINS = ("drama", "dictionary", "code")
TITLES = {"llama": "Llama", "gpt2": "GPT-2"}
REMEDY_FIGURES = {
    "CV of firing rates": ("P1", MFN, "firing rate CV"),
    "overlap": ("P1", MFN, "RMS correlation"),
    "purity of z": ("P2", MFN, "purity"),
    "of h": ("P2", RESIDUAL_STREAM, "purity"),
    "linear probe on z": ("P2", MFN, "linear probe"),
    "on h": ("P2", RESIDUAL_STREAM, "linear probe"),
    "matched correlation": ("P3", MFN, "matched correlation"),
    "correlation of logits": ("P4", MFN, "correlation of logits"),
    "along a random direction": ("P4", "random direction in MFN", "correlation of logits"),
    "KL, in nats": ("P4", MFN, "KL"),
    "loss on the source": ("P5", MFN, "perplexity_loss_source"),
    "on other domains": ("P5", MFN, "perplexity_loss_targets"),
    "excess": ("P5", MFN, "excess_gap"),
    "explained variance there": ("P5", MFN, "explained_variance_targets"),
    "loss of SAEs on the source": ("P5", POST_HOC_SAE, "perplexity_loss_source"),
    "of SAEs on other domains": ("P5", POST_HOC_SAE, "perplexity_loss_targets"),
    "excess of SAEs": ("P5", POST_HOC_SAE, "excess_gap"),
}
"""Column -> prediction, subject and figure of what remedies change; not all have SAEs beside them."""


def load(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def read(family: str, group: str) -> dict[str, dict[str, Any]]:
    """Run name -> record, of the runs that were made."""
    files = sorted((FIDELITY / family / group).glob("*.json"))
    return {file.stem: load(file) for file in files}


def over(record: dict[str, Any], dense: dict[str, Any]) -> list[float]:
    """By how many percent each domain's perplexity is above that of the dense model."""
    return [100 * (record["perplexity"][domain] / dense["perplexity"][domain] - 1) for domain in DOMAINS]


def layers(record: dict[str, Any], figure: str) -> list[float]:
    """A figure of each MFN layer on held-out text."""
    return [found[figure] for found in record["features"].values()]


def span(values: list[float], form: str) -> str:
    """Least and largest."""
    low, high = (format(end, form) for end in (min(values), max(values)))
    return low if low == high else f"{low} - {high}"


def perplexities(record: dict[str, Any]) -> list[str]:
    return [f"{record['perplexity'][domain]:.1f}" for domain in DOMAINS]


def main_table() -> Iterator[list[str]]:
    """The long runs of both families."""
    yield ["", *DOMAINS, "above dense", "explained variance, by block", "dead"]
    for family, title in TITLES.items():
        runs = read(family, "main")
        if not runs:
            continue
        dense = runs.pop("dense")
        yield [f"{title}, dense", *perplexities(dense), "", "", ""]
        for name, record in runs.items():
            gaps = " / ".join(f"{gap:.1f}" for gap in over(record, dense))
            variance = " ".join(f"{value:.3f}" for value in layers(record, "explained_variance"))
            dead = span([100 * share for share in layers(record, "dead_share")], ".1f")
            yield [f"{title}, {name}", *perplexities(record), f"{gaps} %", variance, f"{dead} %"]


def change(record: dict[str, Any], usual: dict[str, Any]) -> str:
    """What was set otherwise than usual."""
    settings = record["settings"]
    return ", ".join(f"`{name}` {value}" for name, value in settings.items() if usual["settings"].get(name) != value)


def group_table(family: str, group: str) -> Iterator[list[str]]:
    """The runs of a group, on the short budget, beside dense training and the recipe alone."""
    dense, usual = (read(family, "short")[name] for name in ("dense", "recon-util"))
    yield ["run", "what differs", *DOMAINS, "above dense", "explained variance", "firing rate: std", "CV", "dead"]
    yield ["dense", "", *perplexities(dense), *[""] * 5]
    for name, record in ({"recon-util": usual} | read(family, group)).items():
        variance, std, cv, dead = (
            statistics.mean(layers(record, figure))
            for figure in ("explained_variance", "firing_rate_std", "firing_rate_cv", "dead_share")
        )
        gap = f"{statistics.mean(over(record, dense)):.1f} %"
        figures = [gap, f"{variance:.3f}", f"{std:.4f}", f"{cv:.2f}", f"{100 * dead:.1f} %"]
        yield [name, change(record, usual), *perplexities(record), *figures]


def real_table() -> Iterator[list[str]]:
    """What each method costs SmolLM2, in nats a token; blocks are read through features at once, or one alone."""
    summary = load(REAL / "summary.json")
    whole, each = summary["all_positions"]["all_layers"], summary["all_positions"]
    yield [
        "", *DOMAINS, "mean", "recovered of zero- / mean-ablation", "first tokens left alone: mean", "recovered",
        "mean, one block alone", "explained variance, by block", "dead",
    ]  # fmt: skip
    for name, found in whole.items():
        figures = load(REAL / "evaluate" / f"{name}.json")
        of_layers = [of for key, of in figures.items() if key.startswith("layer_")]
        kept = summary["without_first"]["all_layers"][name]
        variance = " ".join(f"{of['explained_variance']:.3f}" for of in of_layers)
        dead = span([100 * of["dead_share"] for of in of_layers], ".1f") + " %" if of_layers else ""
        alone = " ".join(f"{of[name]['delta']['mean']:.3f}" for place, of in each.items() if place != "all_layers")
        deltas = [f"{found['delta'][domain]:.3f}" for domain in (*DOMAINS, "mean")]
        yield [
            name, *deltas, recovered(found), f"{kept['delta']['mean']:.3f}", recovered(kept), alone, variance, dead
        ]  # fmt: skip


def recovered(found: dict[str, Any]) -> str:
    """The shares of what either ablation costs that a method saves."""
    return " / ".join(f"{100 * found[f'recovered_of_{ablated}']['mean']:.1f}" for ablated in ("zero", "mean")) + " %"


def verdict_table() -> Iterator[list[str]]:
    """The predictions' outcomes in both families, with the figure that decided and the paper's own criterion."""
    yield ["prediction", "", "outcome", "figure that decided", "MFN [95 %]", "baseline", "the paper's own criterion"]
    found = [(title, load(file)) for family, title in TITLES.items() for file in (PREDICTIONS / family).glob("P?.json")]
    told = None
    for title, of in sorted(found, key=lambda each: each[1]["prediction"]):
        result = PredictionResult.from_json({key: value for key, value in of.items() if key != "settings"})
        verdict = [result.outcome, *deciding(result), str(result.paper_criterion)]
        claim = "" if result.prediction == told else f" {result.claim}"
        yield [f"{result.prediction}{claim}", title, *verdict]
        told = result.prediction


def remedy_table(family: str, *groups: str) -> Iterator[list[str]]:
    """What was tried for one prediction, or for several of P1 to P4, beside what it was tried instead of."""
    of_source = groups == ("P5",)
    columns = {name: of for name, of in REMEDY_FIGURES.items() if (of[0] == "P5") == of_source}
    yield ["remedy", "what differs", *columns, *(f"perplexity, {domain}" for domain in DOMAINS)]
    folder = PREDICTIONS / family / "remedies"
    usual = folder / ("P5" if of_source else "all") / "as-it-is.json"
    tried = [each for group in groups for each in sorted((folder / group).glob("*.json")) if each != usual]
    for file in [usual, *tried]:
        of = load(file)
        own = {name: estimates_of(figures) for name, figures in of["figures"].items()}
        figures = [
            str(own[prediction].get(subject, {}).get(name, "")) for prediction, subject, name in columns.values()
        ]
        differs = ", ".join(f"{key} {json.dumps(value)}" for key, value in of["changes"].items())
        name = file.stem if len(groups) == 1 or file == usual else f"{file.parent.name}/{file.stem}"
        yield [name, differs, *figures, *(f"{statistics.mean(of['perplexity'][d]):.1f}" for d in DOMAINS)]


def sensitivity_table() -> Iterator[list[str]]:
    """What each setting changes, as a mean over seeds with the least and the largest."""
    found = load(SENSITIVITY)
    figures = [name for name in next(iter(found.values())) if name != "alpha"]
    yield ["run", *figures]
    for run, of in found.items():
        cells = []
        for figure in figures:
            form = "+.1f" if figure.endswith("%") else "+.3f"
            value, low, high = (format(of[figure][end], form) for end in ("value", "low", "high"))
            cells.append(value if low == high else f"{value} [{low}, {high}]")
        yield [run, *cells]


def label_table() -> Iterator[list[str]]:
    """The best features with a concept label."""
    yield ["concept", "feature", "area", "words alone", "precision", "recall", "fires on", "promotes", "example"]
    for of in load(LABELS)["features"]:
        figures = [f"{of[name]:.3f}" for name in ("auroc", "auroc_words", "precision", "recall")]
        promotes = " ".join(f"<code>{for_table_cell(token, 20)}</code>" for token in of["promotes"][:3])
        example = for_table_cell(" ".join(of["examples"][0].split()), 120)
        yield [of["concept"], of["feature"], *figures, f"{of['firing_rate']:.2%}", promotes, example]


def short_steering_table() -> Iterator[list[str]]:
    """How often a concept's words come while a feature is held."""
    yield ["concept", "words in 1,000 tokens: as it is", "feature held", "random feature held"]
    for run in load(LABELS)["steering"]:
        words = [f"{run[name]['words_per_1000']:.1f}" for name in ("none", "steered", "random")]
        yield [f"{run['concept']} ({run['feature']})", *words]


def steering_table() -> Iterator[list[str]]:
    """How often a concept's words come while a feature is held, and what that costs."""
    conditions = ("none", "steered", "random")
    yield [
        "concept", "feature / random one", "words in 1,000 tokens: as it is", "steered", "random feature",
        "of these held out", "perplexity of held-out text", "of the continuations to the base model",
    ]  # fmt: skip
    for run in load(LABELS)["steering"]:
        of = [run[name] for name in conditions]
        words = [f"{each['words_per_1000']:.1f} ± {each['words_standard_error']:.1f}" for each in of]
        others = (" / ".join(f"{each[name]:.1f}" for each in of) for name in OF_STEERING)
        yield [run["concept"], f"{run['feature']} / {run['random_feature']}", *words, *others]


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {
    "fidelity": main_table,
    "real-checkpoint": real_table,
    "verdicts": verdict_table,
    "sensitivity": sensitivity_table,
    "labels": label_table,
    "steering": steering_table,
    "steering-short": short_steering_table,
    **short_tables.TABLES,
    **{
        f"{family}-{group}": partial(group_table, family, group)
        for family in TITLES
        for group in ("losses", "noise", "sweep", "recipe")
    },
    **{
        f"{family}-{group}": partial(remedy_table, family, group)
        for family in TITLES
        for group in ("all", *(f"P{n}" for n in range(1, 6)))
    },
    "gpt2-P1-to-P4": partial(remedy_table, "gpt2", "P1", "P2", "P3", "P4"),
}


def markdown(rows: Iterator[list[str]]) -> str:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rewritten(document: str) -> str:
    """The document with every marked table made anew."""
    return MARKED.sub(lambda found: f"{found[1]}\n{markdown(TABLES[found['name']]())}\n{found[3]}", document)


def main() -> None:
    for file in DOCUMENTS:
        file.write_text(rewritten(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
