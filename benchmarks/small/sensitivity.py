"""Effect of each loss and each setting on features and perplexity (section 9 of the paper).

Each run changes one thing in the training of `predictions.py`. Purity, alignment and perplexity of a run are compared
with the study's own models, seed by seed.

    python -m benchmarks.small.sensitivity                     # all runs without an up-to-date result: hours
    python -m benchmarks.small.sensitivity --only 'without-*'  # runs whose names match
    python -m benchmarks.small.sensitivity --summary           # only the summary of existing results

A run writes benchmarks/results/sensitivity/<name>.json. Differences go to summary.json in the same folder;
`python -m benchmarks.figures` draws them.
"""

from __future__ import annotations

import fnmatch
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset, concatenate_datasets

from benchmarks.common import corpora, records, small_models
from benchmarks.small import fidelity, predictions, remedies
from benchmarks.small.predictions import StudyModels
from benchmarks.small.recipes import JOINT, STUDY, Recipe
from modeling_mfn import MFNForCausalLM
from modeling_mfn.evaluation.baselines.models import digest_of
from modeling_mfn.evaluation.intervals import mean
from modeling_mfn.evaluation.measures.perplexity import perplexity
from modeling_mfn.evaluation.measures.probe_scores import probe_model
from modeling_mfn.evaluation.measures.tasks import Task, word_tasks
from modeling_mfn.evaluation.predictions.p3_seed_alignment import cross_seed_alignment
from modeling_mfn.evaluation.result import MFN, plain

RESULTS = records.RESULTS / "sensitivity"
REFERENCE = "all-five"
"""Name of the study's own models."""
PROBES = ("purity", "five-feature probe", "linear probe")
ALIGNMENT, PERPLEXITY = "alignment: matched correlation", "perplexity, %"

RECON = JOINT["lambda_recon"]
WEIGHTS = {name: {**JOINT, **STUDY.settings}[name] for name in fidelity.WEIGHTS}
"""Weights of the rate, competition and stability losses in the study."""
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
    "rho": {f"rho-x{times:g}": STUDY.with_settings(rho=times * fidelity.RHO) for times in (0.5, 2)},
}
"""Varied setting -> name of the run -> recipe."""


@dataclass(frozen=True)
class Texts:
    """Held-out text. The study's verdicts are from other held-out text."""

    by_domain: Mapping[str, Dataset]
    """Domain -> windows."""
    choosing: Dataset
    """Other windows, on which features of two seeds are matched."""
    tasks: Sequence[Task]
    """Probing tasks of words in `windows`."""

    @property
    def windows(self) -> Dataset:
        """Windows of all domains, one domain after the other."""
        return concatenate_datasets(list(self.by_domain.values()))


@cache
def models_of(family: str) -> StudyModels:
    """Models of the study. Runs that differ only in the joint training share everything before it."""
    return StudyModels(predictions.small_study(family, seeds=3))


@cache
def texts_of(family: str) -> Texts:
    """Held-out text for a family's models."""
    study = models_of(family).study
    held_out = {domain: study.data.evaluation(domain, small_models.EVALUATION_TOKENS) for domain in corpora.DOMAINS}
    evidence = predictions.evidence_of(models_of(family), {}, {}, held_out)
    domains = [domain for domain, rows in held_out.items() for _ in range(len(rows))]
    tasks = word_tasks(evidence.groups, evidence.windows, study.tokenizer, sources=domains, seed=remedies.SEED)
    return Texts(held_out, evidence.choosing, tasks)


def recipes() -> dict[str, Recipe]:
    """Name -> recipe, `REFERENCE` first."""
    return {REFERENCE: STUDY} | {name: recipe for of in RUNS.values() for name, recipe in of.items()}


def trained(family: str, name: str, seed: int) -> MFNForCausalLM:
    """Model of a run. The model of `REFERENCE` is the study's own."""
    kind = "mfn" if name == REFERENCE else f"sensitivity-{name}"
    return models_of(family).mfn(seed, kind=kind, recipe=recipes()[name])


def train_reference(seed: int, family: str) -> None:
    """Trains the reference model of a seed.

    Runs that differ only in the joint training start from its MFN layers, as they were before that training.
    """
    torch.set_num_threads(1)
    trained(family, REFERENCE, seed)


def measure_run(name: str, family: str, seeds: int) -> None:
    """Writes the result of a run, unless an up-to-date one is there."""
    torch.set_num_threads(1)
    own = [trained(family, name, seed) for seed in range(seeds)]
    settings = models_of(family).study.settings() | {"family": family, "digests": [digest_of(model) for model in own]}
    file = RESULTS / f"{name}.json"
    if remedies.is_up_to_date(file, settings):
        return
    record = {"command": records.command_line("small.sensitivity"), "commit": records.COMMIT}
    record |= {"settings": settings, "changes": recipes()[name].changes()}
    records.write_record(file, plain(record | measure(own, texts_of(family))))


def measure(models: Sequence[MFNForCausalLM], texts: Texts) -> dict[str, Any]:
    """Perplexity and probes of each seed, and the alignment of all seeds."""
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


def differences(name: str) -> dict[str, list[float]]:
    """Figure -> difference from the reference for each seed.

    Perplexity is in percent, as a mean over domains. Alignment is one value for both seeds.
    """
    own, other = (records.read_record(RESULTS / f"{each}.json") for each in (name, REFERENCE))
    pairs = list(zip(own["seeds"], other["seeds"], strict=True))
    found = {probe: [a[probe]["value"] - b[probe]["value"] for a, b in pairs] for probe in PROBES}
    found[PERPLEXITY] = [
        statistics.mean(100 * (a["perplexity"][d] / b["perplexity"][d] - 1) for d in b["perplexity"]) for a, b in pairs
    ]
    if ALIGNMENT in own:
        found[ALIGNMENT] = [own[ALIGNMENT]["value"] - other[ALIGNMENT]["value"]]
    return found


def summary() -> dict[str, Any]:
    """Run -> its final alpha, and for each figure the mean, minimum and maximum difference over seeds."""
    return {
        name: {"alpha": records.read_record(RESULTS / f"{name}.json")["alpha"]}
        | {
            figure: {"value": statistics.mean(values), "low": min(values), "high": max(values)}
            for figure, values in differences(name).items()
        }
        for name in recipes()
        if name != REFERENCE and (RESULTS / f"{name}.json").exists()
    }


def main(
    family: Annotated[str, typer.Option(help="Family: llama or gpt2.")] = "llama",
    only: Annotated[
        list[str] | None, typer.Option(help="Pattern that the names of runs must match. Repeat it for several.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of models per run.")] = 2,
    processes: Annotated[int, typer.Option(help="Runs at a time, with one thread each.")] = 2,
    only_summary: Annotated[bool, typer.Option("--summary", help="Only summarise existing results.")] = False,
) -> None:
    """Trains and measures all runs that have no up-to-date result, then writes the summary."""
    if not only_summary:
        predictions.prepare()
        models_of(family)  # trains a missing base model
        predictions.in_processes(partial(train_reference, family=family), list(range(seeds)), processes)
        patterns = [REFERENCE, *(only or ["*"])]
        names = [name for name in recipes() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        predictions.in_processes(partial(measure_run, family=family, seeds=seeds), names, processes)
    records.write_record(RESULTS / "summary.json", summary())


if __name__ == "__main__":
    typer.run(main)
