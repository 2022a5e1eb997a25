"""Tables of the benchmarks on small models. `python -m benchmarks.tables` writes them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from benchmarks.common import records
from benchmarks.small.predictions import study_name
from modeling_mfn.evaluation.report import deciding
from modeling_mfn.evaluation.result import MFN, POST_HOC_SAE, RESIDUAL_STREAM, PredictionResult, estimates_of

DOMAINS = ("drama", "dictionary", "code")
FAMILIES = {"llama": "Llama", "gpt2": "GPT-2"}
BY_DOMAIN = " / ".join(DOMAINS)
CLAIMS = {
    "P1": "Firing rates are even",
    "P2": "Features are purer than h",
    "P3": "Features align across seeds",
    "P4": "Interventions are predictable",
    "P5": "Features transfer across domains",
}
"""The paper's predictions in a few words."""
PLAIN = "as-it-is"
"""Name of the remedy that changes nothing."""
REMEDY_FIGURES = {
    "firing rate CV": ("P1", MFN, "firing rate CV"),
    "overlap": ("P1", MFN, "RMS correlation"),
    "purity, z": ("P2", MFN, "purity"),
    "purity, h": ("P2", RESIDUAL_STREAM, "purity"),
    "linear probe, z": ("P2", MFN, "linear probe"),
    "linear probe, h": ("P2", RESIDUAL_STREAM, "linear probe"),
    "matched correlation": ("P3", MFN, "matched correlation"),
    "matched correlation, SAE": ("P3", POST_HOC_SAE, "matched correlation"),
    "logit correlation": ("P4", MFN, "correlation of logits"),
    "logit correlation, SAE": ("P4", POST_HOC_SAE, "correlation of logits"),
    "logit correlation, random direction": ("P4", "random direction in MFN", "correlation of logits"),
    "KL, nats": ("P4", MFN, "KL"),
    "loss, source": ("P5", MFN, "perplexity_loss_source"),
    "loss, other domains": ("P5", MFN, "perplexity_loss_targets"),
    "excess": ("P5", MFN, "excess_gap"),
    "explained variance, other domains": ("P5", MFN, "explained_variance_targets"),
    "SAE loss, source": ("P5", POST_HOC_SAE, "perplexity_loss_source"),
    "SAE loss, other domains": ("P5", POST_HOC_SAE, "perplexity_loss_targets"),
    "SAE excess": ("P5", POST_HOC_SAE, "excess_gap"),
}
"""Column -> prediction, subject and figure."""
RECIPE_FIELDS = {
    "epochs": "epochs from the cache",
    "shared": "shared by the seeds",
    "unfamiliar": "share of random tokens",
    "unfamiliar_windows": "share of joint windows with random tokens",
    "alpha_noise": "standard deviation of alpha",
    "aligned": "encoder rows aligned with directions",
    "whitened": "reconstruction of whitened updates",
    "other_text": "share of other text",
    "realigned": "trained once more on each domain",
}
"""Field of `recipes.Recipe` -> column text; settings and sizes are shown as they are."""


class Verdict(NamedTuple):
    """Result of a prediction on one family."""

    family: str
    result: PredictionResult


def verdicts(codes: str = "update") -> list[Verdict]:
    """Results of all predictions on both families, by prediction, with models that code the update or the stream."""
    found = []
    for family, title in FAMILIES.items():
        for record in records.results(f"predictions/{study_name(family, codes)}/P?").values():
            fields = {key: value for key, value in record.items() if key != "settings"}
            found.append(Verdict(title, PredictionResult.from_json(fields)))
    return sorted(found, key=lambda verdict: verdict.result.prediction)


def fidelity_runs(family: str, group: str) -> dict[str, dict[str, Any]]:
    """Name -> record of the runs of a group."""
    return records.results(f"fidelity/{family}/{group}/*")


def percent_above(record: Mapping[str, Any], dense: Mapping[str, Any]) -> list[float]:
    """Perplexity above that of the dense model in percent, by domain."""
    return [100 * (record["perplexity"][domain] / dense["perplexity"][domain] - 1) for domain in DOMAINS]


def perplexities(record: Mapping[str, Any]) -> list[str]:
    """Perplexity of each domain."""
    return [f"{record['perplexity'][domain]:.1f}" for domain in DOMAINS]


def by_layer(record: Mapping[str, Any], figure: str) -> list[float]:
    """A figure of each MFN layer."""
    return [found[figure] for found in record["features"].values()]


def value_range(values: list[float], form: str) -> str:
    """Smallest and largest value."""
    low, high = (format(end, form) for end in (min(values), max(values)))
    return low if low == high else f"{low} - {high}"


def as_settings(settings: Mapping[str, Any]) -> str:
    """Settings as code, with short numbers."""
    return ", ".join(f"`{name}={short_value(value)}`" for name, value in settings.items())


def short_value(value: Any) -> str:
    """A value of a setting, with three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else json.dumps(value)


def changes_of(recipe: Mapping[str, Any], reference: Mapping[str, Any] | None = None) -> str:
    """Fields of a recipe that differ from a reference."""
    told = []
    for field, value in recipe.items():
        before = (reference or {}).get(field)
        if field in ("settings", "size", "alone"):
            changed = as_settings({name: of for name, of in value.items() if (before or {}).get(name) != of})
            told.append(f"from the cache: {changed}" if changed and field == "alone" else changed)
        elif value != before:
            told.append(f"{RECIPE_FIELDS[field]}: {short_value(value)}")
    return ", ".join(text for text in told if text)


def fidelity() -> Iterator[list[str]]:
    """Long runs of both families."""
    yield ["model and run", *DOMAINS, "above dense, by domain", "explained variance, by block", "dead features"]
    for family, title in FAMILIES.items():
        runs = fidelity_runs(family, "main")
        if not runs:
            continue
        dense = runs.pop("dense")
        yield [f"{title}, dense", *perplexities(dense), "", "", ""]
        for name, record in runs.items():
            gaps = " / ".join(f"{gap:.1f}" for gap in percent_above(record, dense))
            variance = " ".join(f"{value:.3f}" for value in by_layer(record, "explained_variance"))
            dead = value_range([100 * share for share in by_layer(record, "dead_share")], ".1f")
            yield [f"{title}, {name}", *perplexities(record), f"{gaps} %", variance, f"{dead} %"]


def fidelity_group(family: str, group: str) -> Iterator[list[str]]:
    """Runs of a group on the short budget. Dense training and the recipe alone come first."""
    short_runs = fidelity_runs(family, "short")
    dense, recipe = short_runs["dense"], short_runs["recon-util"]
    yield [
        "run", "what differs", *DOMAINS, "above dense, mean", "explained variance", "firing rate std", "firing rate CV",
        "dead features",
    ]  # fmt: skip
    yield ["dense", "", *perplexities(dense), *[""] * 5]
    for name, record in ({"recon-util": recipe} | fidelity_runs(family, group)).items():
        variance, std, cv, dead = (
            statistics.mean(by_layer(record, figure))
            for figure in ("explained_variance", "firing_rate_std", "firing_rate_cv", "dead_share")
        )
        gap = f"{statistics.mean(percent_above(record, dense)):.1f} %"
        figures = [gap, f"{variance:.3f}", f"{std:.4f}", f"{cv:.2f}", f"{100 * dead:.1f} %"]
        differs = {key: of for key, of in record["settings"].items() if recipe["settings"].get(key) != of}
        yield [name, as_settings(differs), *perplexities(record), *figures]


def coding(group: str = "coding") -> Iterator[list[str]]:
    """Runs of both families that differ in what MFN layers code, and how: their differences from `update`."""
    yield [
        "model and run", "what differs", *DOMAINS, "above dense, by domain", "mean", "without features, mean",
        "explained variance, by block", "dead features",
    ]  # fmt: skip
    for family, title in FAMILIES.items():
        runs, plain = fidelity_runs(family, group), fidelity_runs(family, "coding")["update"]["settings"]
        if not runs:
            continue
        dense = runs.pop("dense")
        yield [f"{title}, dense", "", *perplexities(dense), *[""] * 5]
        for name, record in sorted(runs.items(), key=lambda run: run[0] not in ("stream", "update")):
            differs = {
                key: of
                for key, of in record["settings"].items()
                if plain.get(key) != of and key != "tokens" and (key, of) != ("start", "base")
            }
            gaps = percent_above(record, dense)
            without = percent_above({"perplexity": record["perplexity_at_alpha_0"]}, dense)
            variance = " ".join(f"{value:.3f}" for value in by_layer(record, "explained_variance"))
            dead = value_range([100 * share for share in by_layer(record, "dead_share")], ".1f")
            yield [
                f"{title}, {name}", as_settings(differs), *perplexities(record),
                " / ".join(f"{gap:.1f}" for gap in gaps) + " %", f"{statistics.mean(gaps):.1f} %",
                f"{statistics.mean(without):.1f} %", variance, f"{dead} %",
            ]  # fmt: skip


def streams() -> Iterator[list[str]]:
    """Shares of the standardised residual stream that a constant vector and the position explain, by block."""
    yield ["model and run", "constant", "of the rest, explained by position", "features active on most tokens"]
    for name, blocks in records.result("residual_streams").items():
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
    """Perplexity of the long runs through features, and of their backbones without features."""
    yield ["model and run", f"through features: {BY_DOMAIN}", f"without features: {BY_DOMAIN}"]
    for family, title in FAMILIES.items():
        for name, record in fidelity_runs(family, "main").items():
            columns = [record["perplexity"], record.get("perplexity_at_alpha_0", {})]
            yield [f"{title}, {name}", *(" / ".join(f"{value:.1f}" for value in of.values()) for of in columns)]


def verdict_table(codes: str) -> Iterator[list[str]]:
    """Outcomes of the predictions in both families, with the deciding figure and the paper's own criterion."""
    yield [
        "prediction",
        "model",
        "outcome",
        "deciding figure",
        "MFN [95 %]",
        "baseline [95 %]",
        "the paper's criterion",
    ]
    told = None
    for family, result in verdicts(codes):
        claim = "" if result.prediction == told else f" {result.claim}"
        outcome = [result.outcome, *deciding(result), str(result.paper_criterion)]
        yield [f"{result.prediction}{claim}", family, *outcome]
        told = result.prediction


def transfer(codes: str) -> Iterator[list[str]]:
    """Loss of features of one domain on others, in MFN models and in post-hoc SAEs."""
    figures = {"perplexity_loss_source": "source", "perplexity_loss_targets": "other domains", "excess_gap": "excess"}
    yield ["model", *(f"{name}: {of}" for name in figures.values() for of in ("MFN", "SAE"))]
    for family, title in FAMILIES.items():
        found = records.result(f"predictions/{study_name(family, codes)}/P5")["figures"]
        yield [title, *(f"{found[of][name]['value']:.2f}" for name in figures for of in (MFN, POST_HOC_SAE))]


def remedies(study: str, *groups: str) -> Iterator[list[str]]:
    """Remedies for one prediction, or for several of P1 to P4. The plain training comes first."""
    of_source = groups == ("P5",)
    columns = {name: of for name, of in REMEDY_FIGURES.items() if (of[0] == "P5") == of_source}
    yield ["remedy", "what differs", *columns, f"perplexity: {BY_DOMAIN}"]
    folder = f"predictions/{study}/remedies"
    found = {PLAIN: records.result(f"{folder}/{'P5' if of_source else 'all'}/{PLAIN}")}
    for group in groups:
        heading = "" if len(groups) == 1 else f"{group}/"
        runs = records.results(f"{folder}/{group}/*")
        found |= {f"{heading}{name}": of for name, of in runs.items() if name != PLAIN}
    # where MFN layers code the stream, remedies are compared with the plain training
    recipes = records.result(f"predictions/{study}/P1")["settings"]["recipes"] if study.endswith("-update") else {}
    plain = recipes.get("one domain" if of_source else "all domains")
    for name, of in found.items():
        own = {prediction: estimates_of(figures) for prediction, figures in of["figures"].items()}
        figures = [str(own[prediction].get(subject, {}).get(key, "")) for prediction, subject, key in columns.values()]
        means = " / ".join(f"{statistics.mean(of['perplexity'][domain]):.1f}" for domain in DOMAINS)
        yield [name, changes_of(of["changes"], plain), *figures, means]


def longer_alone() -> Iterator[list[str]]:
    """Alignment and predictability of features after two and after eight passes through the cache, on one machine."""
    folder = "predictions/llama/remedies"
    runs = [records.result(f"{folder}/{name}") for name in (f"all/{PLAIN}-on-another-machine", "P2/longer-alone")]
    yield ["figure", "two passes", "eight passes"]
    for name, (prediction, subject, key) in REMEDY_FIGURES.items():
        if prediction in ("P3", "P4") and name != "KL, nats":
            yield [name, *(f"{run['figures'][prediction][subject][key]['value']:.3f}" for run in runs)]


def sensitivity() -> Iterator[list[str]]:
    """Differences from the study's own models: the mean over seeds, with the smallest and the largest."""
    found = records.result("sensitivity/summary")
    reference = records.result("sensitivity/all-five")["changes"]
    figures = [name for name in next(iter(found.values())) if name != "alpha"]
    yield ["run", "what differs", *(name.removeprefix("alignment: ") for name in figures)]
    for run, of in found.items():
        cells = []
        for figure in figures:
            form = "+.1f" if figure.endswith("%") else "+.3f"
            value, low, high = (format(of[figure][end], form) for end in ("value", "low", "high"))
            cells.append(value if low == high else f"{value} [{low}, {high}]")
        yield [run, changes_of(records.result(f"sensitivity/{run}")["changes"], reference), *cells]


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {
    "fidelity": fidelity,
    "coding": coding,
    "coding-long": partial(coding, "coding-long"),
    "coding-long-k-16": partial(coding, "coding-long-k-16"),
    "streams": streams,
    "without-features": without_features,
    "verdicts": partial(verdict_table, "update"),
    "verdicts-stream": partial(verdict_table, "stream"),
    "transfer": partial(transfer, "update"),
    "transfer-stream": partial(transfer, "stream"),
    "longer-alone": longer_alone,
    "sensitivity": sensitivity,
    **{f"llama-{group}": partial(fidelity_group, "llama", group) for group in ("losses", "noise", "sweep", "recipe")},
    **{f"gpt2-{group}": partial(fidelity_group, "gpt2", group) for group in ("losses", "recipe")},
    **{f"llama-{group}": partial(remedies, "llama", group) for group in ("all", "P1", "P2", "P3", "P4", "P5")},
    "llama-update-P1-to-P4": partial(remedies, "llama-update", "all", "P1", "P2", "P3", "P4"),
    "llama-update-P5": partial(remedies, "llama-update", "P5"),
    "gpt2-P1-to-P4": partial(remedies, "gpt2", "P1", "P2", "P3", "P4"),
    "gpt2-P5": partial(remedies, "gpt2", "P5"),
}
