"""What may help where one of the five predictions fails: MFN models trained otherwise than those of `predictions.py`,
measured as these are, before and after.

    python benchmarks/remedies.py                        # every remedy that has no result yet: hours
    python benchmarks/remedies.py --only 'P3/*'          # those whose names match
    python benchmarks/remedies.py --family gpt2 --only '*/as-it-is'

Each writes benchmarks/results/predictions/<family>/remedies/<name>.json.
"""

from __future__ import annotations

import fnmatch
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import predictions
import small_models
import torch
import typer
from fidelity import K
from predictions import SOURCE, Models, Study
from recipes import Recipe

from modeling_mfn import MFNForCausalLM
from modeling_mfn.evaluation.evidence import PREDICTIONS
from modeling_mfn.evaluation.perplexity import perplexity
from modeling_mfn.evaluation.result import MFN, plain
from modeling_mfn.evaluation.transfer import Transfer
from modeling_mfn.whole_files import write_whole

USUAL = "as-it-is"
M = 8 * small_models.HIDDEN
REMEDIES: dict[str, dict[str, Recipe]] = {
    "P2": {
        "competition-x10": Recipe({"lambda_comp": 2.5}),
        "twice-the-features": Recipe(size={"num_features": 2 * M}),
        "half-of-k": Recipe(size={"k": K // 2}),
        "longer-alone": Recipe(epochs=8),
    },
    "P3": {
        "same-first-dictionary": Recipe(shared="first dictionary"),
        "same-learnt-dictionary": Recipe(shared="learnt dictionary"),
        "quarter-of-the-features": Recipe(size={"num_features": M // 4}),
    },
    "P4": {
        "stable-through-the-model": Recipe({"stability_pass": "model", "lambda_stab": 2.5}),
        "four-times-k": Recipe(size={"k": 4 * K}),
        "into-the-mlp-alone": Recipe(size={"blend_into": "mlp"}),
    },
    "P5": {
        "alpha-noise": Recipe(alpha_noise=0.2),
        "random-tokens": Recipe(unfamiliar=0.3),
        "frozen-backbone": Recipe({"trainable": "mfn"}),
        "reconstruction-x5": Recipe({"lambda_recon": 50.0}),
    },
}
"""Prediction -> name -> what differs. Those for P5 learn from one domain; all others from all, and they are measured on
P1 to P4: what helps one prediction may hurt another."""
ON_ALL = ("P1", "P2", "P3", "P4")


def recipes() -> dict[str, Recipe]:
    """Name -> recipe, each prediction's own and what it is held against."""
    table = {f"all/{USUAL}": Recipe(), f"P5/{USUAL}": Recipe()}
    return table | {f"{of}/{name}": recipe for of, own in REMEDIES.items() for name, recipe in own.items()}


def trained(models: Models, name: str, recipe: Recipe, seeds: int) -> list[MFNForCausalLM]:
    """The remedy's models; the study's own where it is nothing else."""
    domain = SOURCE if name.startswith("P5/") else None
    found = []
    for seed in range(seeds):
        usual = not recipe.changes() or (seed == 0 and set(recipe.changes()) == {"shared"})
        kind = "mfn" if usual else name.replace("/", "-")
        found.append(models.mfn(seed, domain, kind, Recipe() if usual else recipe))
    return found


def measure(study: Study, models: Models, name: str, recipe: Recipe, seeds: int) -> dict[str, Any]:
    """The figures of the predictions that such models are for."""
    own = trained(models, name, recipe, seeds)
    if name.startswith("P5/"):
        frozen = recipe.settings.get("trainable") == "mfn"
        dense = [None if frozen else models.dense(seed, SOURCE) for seed in range(seeds)]
        transfers = {MFN: [Transfer(SOURCE, *pair) for pair in zip(own, dense, strict=True)]}
        found, chosen = predictions.evidence(study, {}, transfers, words=False), ["P5"]
    else:
        found, chosen = predictions.evidence(study, {MFN: own}, {}), list(ON_ALL)
    losses = {domain: [round(perplexity(model, rows), 3) for model in own] for domain, rows in found.held_out.items()}
    figures = {prediction: PREDICTIONS[prediction](found).figures for prediction in chosen}
    return {"changes": recipe.changes(), "perplexity": losses, "figures": plain(figures)}


def main(
    family: Annotated[str, typer.Option(help="llama or gpt2.")] = "llama",
    only: Annotated[str, typer.Option(help="Pattern of the names of remedies.")] = "*",
    seeds: Annotated[int, typer.Option(help="Of each remedy.")] = 2,
    threads: Annotated[int, typer.Option(help="Threads of this process.")] = 2,
) -> None:
    torch.set_num_threads(threads)
    study = predictions.small(family, seeds=3)  # so that the windows are the study's
    models = Models(study)
    for name, recipe in recipes().items():
        file = results(family) / f"{name}.json"
        if not fnmatch.fnmatch(name, only) or file.exists():
            continue
        print(name, flush=True)
        record = {"command": shlex.join(["python", "benchmarks/remedies.py", *sys.argv[1:]]), "seeds": seeds}
        record |= measure(study, models, name, recipe, seeds)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(record, indent=2, allow_nan=False) + "\n")


def results(family: str) -> Path:
    return predictions.RESULTS / family / "remedies"


if __name__ == "__main__":
    typer.run(main)
