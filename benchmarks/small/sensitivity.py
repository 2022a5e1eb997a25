"""What each loss and each setting does to features and to perplexity (section 9 of the paper).

Models as those of `predictions.py`, each trained otherwise in one thing: by how pure a feature is, and by how alike
those of two seeds are; all less what the study's own models have, seed by seed.

    python -m benchmarks.small.sensitivity    # every run that has no result yet: hours
    python -m benchmarks.small.sensitivity --only 'without-*'  # those whose names match
    python -m benchmarks.small.sensitivity --figure            # summary and figure, from the results

Each run writes benchmarks/results/sensitivity/<name>.json; the differences go to summary.json there, the figure to
docs/images/sensitivity.svg.
"""

from __future__ import annotations

import fnmatch
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset, concatenate_datasets

from benchmarks.common import corpora, small_models
from benchmarks.small import predictions, remedies
from benchmarks.small.fidelity import COMMIT, RHO
from benchmarks.small.fidelity import WEIGHTS as SHAPING
from benchmarks.small.predictions import Models
from benchmarks.small.recipes import JOINT, STUDY, Recipe
from modeling_mfn import MFNForCausalLM
from modeling_mfn.evaluation.baselines.models import digest_of
from modeling_mfn.evaluation.intervals import mean
from modeling_mfn.evaluation.measures.perplexity import perplexity
from modeling_mfn.evaluation.measures.tasks import Task, word_tasks
from modeling_mfn.evaluation.predictions.p2_probe_purity import probe_model
from modeling_mfn.evaluation.predictions.p3_seed_alignment import cross_seed_alignment
from modeling_mfn.evaluation.result import MFN, plain
from modeling_mfn.utils.files import write_whole

RESULTS = Path(__file__).parents[1] / "results" / "sensitivity"
FIGURE = Path(__file__).parents[2] / "docs" / "images" / "sensitivity.svg"
SUMMARY = "summary"
REFERENCE = "all-five"
PROBES = ("purity", "five-feature probe", "linear probe")
ALIGNMENT, PERPLEXITY = "alignment: matched correlation", "perplexity, %"

RECON = JOINT["lambda_recon"]
WEIGHTS = {name: {**JOINT, **STUDY.settings}[name] for name in SHAPING}
"""Of rate, comp and stab in the study."""
NONE = dict.fromkeys(WEIGHTS, 0.0)
RUNS: dict[str, dict[str, Recipe]] = {
    "a loss left out": {
        f"without-{name[7:]}": STUDY.with_settings(**{name: 0.0}) for name in ("lambda_recon", *WEIGHTS, "lambda_util")
    },
    "one or none of rate, comp, stab": {
        "recon-util": STUDY.with_settings(**NONE),
        **{f"recon-util-{name[7:]}": STUDY.with_settings(**NONE | {name: weight}) for name, weight in WEIGHTS.items()},
    },
    "lambda": {
        **{f"{name[7:]}-x10": STUDY.with_settings(**{name: 10 * weight}) for name, weight in WEIGHTS.items()},
        **{f"recon-x{times:g}": STUDY.with_settings(lambda_recon=times * RECON) for times in (0.1, 5)},
    },
    "k": {f"k-{k}": replace(STUDY, size={"k": k}) for k in (8, 16, 64, 128)},
    "alpha at the end": {f"alpha-{alpha}": STUDY.with_settings(alpha_end=alpha) for alpha in (0.5, 0.75, 0.9)},
    "rho": {f"rho-x{times:g}": STUDY.with_settings(rho=times * RHO) for times in (0.5, 2)},
}
"""What is varied -> name -> the study's recipe but for that."""


@dataclass(frozen=True)
class Texts:
    """Text that nothing was trained on, other than what the study's verdicts are from."""

    by_domain: Mapping[str, Dataset]
    choosing: Dataset
    """Other windows, to match features on."""
    tasks: Sequence[Task]
    """Of words, on the windows of all domains one after the other."""

    @property
    def windows(self) -> Dataset:
        """Those of all domains."""
        return concatenate_datasets(list(self.by_domain.values()))


@cache
def models_of(family: str) -> Models:
    """The study's, so that what only the training as a whole differs in shares what goes before."""
    return Models(predictions.small(family, seeds=3))


@cache
def texts_of(family: str) -> Texts:
    """For a family's models."""
    study = models_of(family).study
    held_out = {domain: study.data.evaluation(domain, small_models.EVALUATION_TOKENS) for domain in corpora.DOMAINS}
    evidence = predictions.evidence(models_of(family), {}, {}, held_out)
    domains = [domain for domain, rows in held_out.items() for _ in range(len(rows))]
    tasks = word_tasks(evidence.groups, evidence.windows, study.tokenizer, sources=domains, seed=remedies.SEED)
    return Texts(held_out, evidence.choosing, tasks)


def recipes() -> dict[str, Recipe]:
    """Name -> recipe, the reference first."""
    return {REFERENCE: STUDY} | {name: recipe for of in RUNS.values() for name, recipe in of.items()}


def trained(family: str, name: str, seed: int) -> MFNForCausalLM:
    """A run's model; the study's own where it is nothing else."""
    kind = "mfn" if name == REFERENCE else f"sensitivity-{name}"
    return models_of(family).mfn(seed, kind=kind, recipe=recipes()[name])


def train_reference(seed: int, family: str) -> None:
    """Before all others, which start from what its MFN layers learn alone."""
    torch.set_num_threads(1)
    trained(family, REFERENCE, seed)


def measure_run(name: str, family: str, seeds: int) -> None:
    """Writes a run's result, unless it was measured with the same models."""
    torch.set_num_threads(1)
    own = [trained(family, name, seed) for seed in range(seeds)]
    settings = models_of(family).study.settings() | {"family": family, "digests": [digest_of(model) for model in own]}
    file = RESULTS / f"{name}.json"
    if remedies.is_known(file, settings):
        return
    record = {"command": shlex.join(["python", "-m", "benchmarks.small.sensitivity", *sys.argv[1:]]), "commit": COMMIT}
    record |= {"settings": settings, "changes": recipes()[name].changes()} | measure(own, texts_of(family))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(plain(record), indent=2, allow_nan=False) + "\n")


def measure(models: Sequence[MFNForCausalLM], texts: Texts) -> dict[str, Any]:
    """What is known of each seed, and what of all together."""
    seeds = []
    for model in models:
        table = probe_model(model, texts.windows, texts.tasks, residuals=False)
        scores = table.groupby(["probe", "task"])["held_out"].mean()
        losses = {domain: perplexity(model, rows) for domain, rows in texts.by_domain.items()}
        seeds.append({"perplexity": losses} | {probe: mean(scores[probe].to_numpy()) for probe in PROBES})
    figures: dict[str, Any] = {"alpha": models[0].config.alpha, "seeds": seeds}
    if len(models) > 1:
        found = cross_seed_alignment({MFN: models}, texts.windows, texts.choosing).figures[MFN]
        figures |= {f"alignment: {figure}": value for figure, value in found.items()}
    return figures


def read(name: str) -> dict[str, Any]:
    """A run's result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def differences(name: str) -> dict[str, list[float]]:
    """Figure -> a run's less the reference's, for each seed; perplexity in per cent, a mean over domains. Of two seeds
    together there is one alignment."""
    own, other = read(name), read(REFERENCE)
    pairs = list(zip(own["seeds"], other["seeds"], strict=True))
    found = {probe: [a[probe]["value"] - b[probe]["value"] for a, b in pairs] for probe in PROBES}
    found[PERPLEXITY] = [
        statistics.mean(100 * (a["perplexity"][d] / b["perplexity"][d] - 1) for d in b["perplexity"]) for a, b in pairs
    ]
    if ALIGNMENT in own:
        found[ALIGNMENT] = [own[ALIGNMENT]["value"] - other[ALIGNMENT]["value"]]
    return found


def summary() -> dict[str, Any]:
    """Run -> the alpha that it ends at, and of each difference the mean over seeds with the least and the largest."""
    return {
        name: {"alpha": read(name)["alpha"]}
        | {
            figure: {"value": statistics.mean(values), "low": min(values), "high": max(values)}
            for figure, values in differences(name).items()
        }
        for name in recipes()
        if name != REFERENCE and (RESULTS / f"{name}.json").exists()
    }


def draw(found: Mapping[str, Any]) -> None:
    """Purity, and alignment, against what a run costs in perplexity, all less the reference; bars reach from seed to
    seed. Hollow: alpha ends below 1, so that the model does not read through features alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    titles = {"purity": "purity (AUROC of one feature)", ALIGNMENT: "matched correlation of two seeds"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for number, (varied, runs) in enumerate(RUNS.items()):
            label: str | None = varied
            for name in (name for name in runs if key in found.get(name, {})):
                x, y = found[name][PERPLEXITY], found[name][key]
                bars = [[[each["value"] - each["low"]], [each["high"] - each["value"]]] for each in (y, x)]
                axes.errorbar(
                    x["value"], y["value"], *bars, fmt="o", color=f"C{number}", elinewidth=0.5, markersize=5,
                    markerfacecolor="white" if found[name]["alpha"] < 1 else None, label=label,
                )  # fmt: skip
                outwards = -1 if x["value"] < 0 else 1
                axes.annotate(
                    name, (x["value"], y["value"]), fontsize=6, xytext=(4 * outwards, 2), textcoords="offset points",
                    ha="right" if outwards < 0 else "left",
                )  # fmt: skip
                label = None
        axes.axhline(0, color="grey", linewidth=0.5)
        axes.axvline(0, color="grey", linewidth=0.5)
        axes.set_xscale("symlog", linthresh=1, linscale=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(x=0.15)
        axes.set_xlabel(f"perplexity above that of {REFERENCE}, %")
        axes.set_ylabel(f"{title}, less that of {REFERENCE}")
    axes.legend(fontsize=7)
    figure.suptitle("mean over seeds, bars from seed to seed; hollow: alpha ends below 1, no bottleneck")
    figure.savefig(FIGURE, metadata={"Date": None})


def main(
    family: Annotated[str, typer.Option(help="llama or gpt2.")] = "llama",
    only: Annotated[list[str] | None, typer.Option(help="Pattern of the names of runs; once for each.")] = None,
    seeds: Annotated[int, typer.Option(help="Of each run.")] = 2,
    processes: Annotated[int, typer.Option(help="Runs at a time, of one thread each.")] = 2,
    only_figure: Annotated[
        bool, typer.Option("--figure", help="Summarise and draw the results that are there, nothing more.")
    ] = False,
) -> None:
    if not only_figure:
        predictions.prepare()
        models_of(family)  # and the base model
        predictions.in_processes(partial(train_reference, family=family), list(range(seeds)), processes)
        patterns = [REFERENCE, *(only or ["*"])]
        names = [name for name in recipes() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        predictions.in_processes(partial(measure_run, family=family, seeds=seeds), names, processes)
    found = summary()
    write_whole(RESULTS / f"{SUMMARY}.json", json.dumps(found, indent=2) + "\n")
    draw(found)


if __name__ == "__main__":
    typer.run(main)
