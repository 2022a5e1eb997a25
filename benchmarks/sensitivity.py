"""What each loss and each setting does to features and to perplexity (section 9 of the paper): the models of
`fidelity.py`'s losses and sweeps, by how pure a feature is, and by how alike those of two seeds are; all less what
stands beside them, seed by seed.

    python benchmarks/sensitivity.py             # every model of fidelity.py that is there, and was not measured yet
    python benchmarks/sensitivity.py --figure    # summary and figure, from the results

Each model's result goes to benchmarks/results/sensitivity/<name>.json, the differences to summary.json there, the
figure to docs/sensitivity.svg.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import concepts
import corpora
import fidelity
import small_models
import tables
import torch
import typer
import word_lists
from datasets import Dataset, concatenate_datasets

from modeling_mfn import MFNForCausalLM
from modeling_mfn.demo_assets import cache_folder
from modeling_mfn.evaluation.alignment import cross_seed_alignment
from modeling_mfn.evaluation.baseline_models import digest_of
from modeling_mfn.evaluation.probing import probe_model
from modeling_mfn.evaluation.result import MFN, mean, plain
from modeling_mfn.evaluation.tasks import Task, word_tasks
from modeling_mfn.whole_files import write_whole

RESULTS = Path(__file__).parent / "results" / "sensitivity"
FIGURE = Path(__file__).parent.parent / "docs" / "sensitivity.svg"
FAMILY = "llama"
GROUPS = ("short", "losses", "sweep")
FIVE, RECIPE_ALONE = "losses/five", "short/recon-util"
PROBES = ("purity", "five-feature probe", "linear probe")
ALIGNMENT, PERPLEXITY = "alignment: matched correlation", "perplexity, %"


class Texts:
    """Held-out windows, the tasks of words on them, and other windows to match features on."""

    @cached_property
    def by_domain(self) -> dict[str, Dataset]:
        return {domain: small_models.data().evaluation(domain) for domain in corpora.DOMAINS}

    @cached_property
    def held_out(self) -> Dataset:
        return concatenate_datasets(list(self.by_domain.values()))

    @cached_property
    def choosing(self) -> Dataset:
        return small_models.data().sample(
            small_models.EVALUATION_TOKENS, after=fidelity.BASE_TOKENS + 2 * fidelity.SHORT_TOKENS
        )

    @cached_property
    def tasks(self) -> list[Task]:
        tokenizer = corpora.tokenizer(small_models.VOCABULARY)
        groups = {
            "concepts": concepts.concepts(),
            "polarity": word_lists.polarity(),
            "part of speech": word_lists.parts_of_speech(),
        }
        domains = [domain for domain, rows in self.by_domain.items() for _ in range(len(rows))]
        return word_tasks(groups, self.held_out, tokenizer, sources=domains)


def twin(name: str) -> str:
    """The same run with another seed."""
    own = name.partition("/")[2]
    return f"noise/{own}-seed-1" if own in ("recon-util", "five") else f"twin/{own}"


def reference(name: str) -> str:
    """The run that this one differs from: losses are switched on and off around all five, settings are swept with the
    recipe alone."""
    return RECIPE_ALONE if name.startswith("sweep/") else FIVE


def models_of(name: str) -> dict[str, MFNForCausalLM]:
    """The run and its twin, where they are there."""
    made = [each for each in (name, twin(name)) if (tables.FIDELITY / FAMILY / f"{each}.json").exists()]
    folders = {each: cache_folder() / "fidelity" / FAMILY / each for each in made}
    return {each: MFNForCausalLM.from_pretrained(folder) for each, folder in folders.items() if folder.exists()}


def measure(models: Mapping[str, MFNForCausalLM], texts: Texts) -> dict[str, Any]:
    """What is known of each seed, and what of both."""
    seeds = []
    for name, model in models.items():
        table = probe_model(model, texts.held_out, texts.tasks, residuals=False)
        scores = table.groupby(["probe", "task"])["held_out"].mean()
        group, _, run = name.partition("/")
        probes = {probe: mean(scores[probe].to_numpy()) for probe in PROBES}
        seeds.append({"run": name, "perplexity": tables.read(FAMILY, group)[run]["perplexity"]} | probes)
    figures: dict[str, Any] = {"alpha": next(iter(models.values())).config.alpha, "seeds": seeds}
    if len(models) > 1:
        found = cross_seed_alignment({MFN: list(models.values())}, texts.held_out, texts.choosing).figures[MFN]
        figures |= {f"alignment: {figure}": value for figure, value in found.items()}
    return figures


def read(name: str) -> dict[str, Any]:
    """A run's result; empty if there is none."""
    file = RESULTS / f"{name}.json"
    return tables.load(file) if file.exists() else {}


def differences(name: str) -> dict[str, list[float]]:
    """Figure -> a run's less its reference's, for each seed that both have; perplexity in per cent, a mean over
    domains. Of two seeds together there is one alignment."""
    own, other = read(name), read(reference(name))
    pairs = list(zip(own["seeds"], other.get("seeds", []), strict=False))
    found = {probe: [a[probe]["value"] - b[probe]["value"] for a, b in pairs] for probe in PROBES}
    found[PERPLEXITY] = [statistics.mean(tables.over(a, b)) for a, b in pairs]
    found[ALIGNMENT] = (
        [own[ALIGNMENT]["value"] - other[ALIGNMENT]["value"]] if ALIGNMENT in own and ALIGNMENT in other else []
    )
    return {figure: values for figure, values in found.items() if values}


def summary() -> dict[str, Any]:
    """Run -> its reference, the alpha that it ends at, and of each difference the mean over seeds with the least and
    the largest."""
    names = [f"{file.parent.name}/{file.stem}" for file in sorted(RESULTS.glob("*/*.json"))]
    return {
        name: {"against": reference(name), "alpha": read(name)["alpha"]}
        | {
            figure: {"value": statistics.mean(values), "low": min(values), "high": max(values), "seeds": len(values)}
            for figure, values in differences(name).items()
        }
        for name in names
    }


def draw(found: Mapping[str, Any]) -> None:
    """Purity, and alignment, against what a run costs in perplexity, all less the reference; bars reach from seed to
    seed. Hollow: alpha ends below 1, so that the model does not read through features alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 11), layout="constrained")
    titles = {"purity": "purity (AUROC of one feature)", ALIGNMENT: "matched correlation of two seeds"}
    for row, (key, title) in zip(figure.subplots(2, 2), titles.items(), strict=True):
        for axes, against in zip(row, (FIVE, RECIPE_ALONE), strict=True):
            for name, of in found.items():
                if of["against"] != against or name == against or key not in of or PERPLEXITY not in of:
                    continue
                x, y = of[PERPLEXITY], of[key]
                bars = [[[each["value"] - each["low"]], [each["high"] - each["value"]]] for each in (y, x)]
                axes.errorbar(
                    x["value"], y["value"], *bars, fmt="o", color="#b2182b", elinewidth=0.5, markersize=5,
                    markerfacecolor="white" if of["alpha"] < 1 else None,
                )  # fmt: skip
                axes.annotate(
                    f"{name.partition('/')[2]} ({y['seeds']})", (x["value"], y["value"]), fontsize=7, xytext=(3, 3),
                    textcoords="offset points",
                )  # fmt: skip
            axes.axhline(0, color="grey", linewidth=0.5)
            axes.axvline(0, color="grey", linewidth=0.5)
            axes.set_xlabel(f"perplexity above that of {against}, %")
            axes.set_ylabel(f"{title}, less that of {against}")
            axes.set_xscale("symlog", linthresh=1)
    figure.suptitle("mean over seeds, bars from seed to seed, (n) values; hollow: alpha ends below 1, no bottleneck")
    figure.savefig(FIGURE, metadata={"Date": None})


def main(
    only_figure: Annotated[
        bool, typer.Option("--figure", help="Summarise and draw the results that are there, nothing more.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads of this process.")] = 2,
) -> None:
    torch.set_num_threads(threads)
    texts = Texts()
    runs = [name.partition("/")[2] for name in fidelity.runs() if name.startswith(f"{FAMILY}/")]
    for name in (name for name in runs if name.partition("/")[0] in GROUPS and not only_figure):
        models = models_of(name) if name != "short/dense" else {}
        digests = [digest_of(model) for model in models.values()]
        if name not in models or read(name).get("digests") == digests:
            continue
        print(name, flush=True)
        record = {"commit": fidelity.commit(), "digests": digests} | measure(models, texts)
        file = RESULTS / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(plain(record), indent=2, allow_nan=False) + "\n")
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = summary()
    write_whole(RESULTS / "summary.json", json.dumps(found, indent=2) + "\n")
    draw(found)


if __name__ == "__main__":
    typer.run(main)
