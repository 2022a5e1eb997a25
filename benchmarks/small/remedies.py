"""What may help where one of the five predictions fails: MFN models whose training differs from the plain one that
`predictions.py` began with, measured as models are there, before and after.

    python -m benchmarks.small.remedies                        # every remedy that was not measured as it is now: hours
    python -m benchmarks.small.remedies --family gpt2 --only '*/as-it-is' --only 'P3/*'    # those whose names match

Each writes benchmarks/results/predictions/<family>/remedies/<name>.json.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import corpora, small_models
from benchmarks.small import predictions
from benchmarks.small.fidelity import COMMIT, WEIGHTS
from benchmarks.small.predictions import SOURCE, Models
from benchmarks.small.recipes import Recipe
from modeling_mfn import MFNForCausalLM
from modeling_mfn.evaluation.baselines.models import digest_of_rows
from modeling_mfn.evaluation.baselines.saes import (
    LEARNING_RATE,
    TUNING_RATE,
    fine_tune_sae,
    post_hoc_sae,
    random_sae,
    training_settings,
)
from modeling_mfn.evaluation.measures.perplexity import perplexity
from modeling_mfn.evaluation.predictions.p5_transfer import Transfer
from modeling_mfn.evaluation.result import MFN, POST_HOC_SAE, plain
from modeling_mfn.evaluation.study import PREDICTIONS, Evidence
from modeling_mfn.utils.files import write_whole

USUAL = "as-it-is"
SEED = 1
"""Of samples and of which words are held out; that of the study is 0."""
M = 8 * small_models.HIDDEN
STABLE = {"stability_pass": "model", "lambda_stab": 2.5}
REMEDIES: dict[str, dict[str, Recipe]] = {
    "all": {
        "random-tokens-and-stable-through-the-model": Recipe(STABLE, unfamiliar=0.3),
    },
    "P1": {
        "rate-x10": Recipe({"lambda_rate": 10 * WEIGHTS["lambda_rate"]}),
        "rate-x100": Recipe({"lambda_rate": 100 * WEIGHTS["lambda_rate"]}),
        "rate-and-competition-x10": Recipe({name: 10 * WEIGHTS[name] for name in ("lambda_rate", "lambda_comp")}),
    },
    "P2": {
        "twice-the-features": Recipe(size={"num_features": 2 * M}),
        "longer-alone": Recipe(epochs=8),
    },
    "P3": {
        "same-first-dictionary": Recipe(shared="first dictionary"),
        "same-learnt-dictionary": Recipe(shared="learnt dictionary"),
        "frozen-backbone": Recipe({"trainable": "mfn"}),
    },
    "P4": {
        "stable-through-the-model": Recipe(STABLE),
        "into-the-mlp-alone": Recipe(size={"blend_into": "mlp"}),
    },
    "P5": {
        "alpha-noise": Recipe(alpha_noise=0.2),
        "random-tokens": Recipe(unfamiliar=0.3),
        "frozen-backbone": Recipe({"trainable": "mfn"}),
        "random-tokens-throughout": Recipe(unfamiliar=0.3, unfamiliar_windows=1 / 3),
        "random-tokens-and-frozen-backbone": Recipe({"trainable": "mfn"}, unfamiliar=0.3),
    },
}
"""Prediction -> name -> what differs. Those for P5 learn from one domain; all others from all, and they are measured on
P1 to P4: what helps one prediction may hurt another. "all": what helps several, together. What seeds share tells where
features come from; it decides P3 by itself, so that it is never the study's default."""
ON_ALL = ("P1", "P2", "P3", "P4")


def recipes() -> dict[str, Recipe]:
    """Name -> recipe, each prediction's own and what it is held against."""
    table = {f"all/{USUAL}": Recipe(), f"P5/{USUAL}": Recipe()}
    return table | {f"{of}/{name}": recipe for of, own in REMEDIES.items() for name, recipe in own.items()}


def trained(models: Models, name: str, recipe: Recipe, seeds: int) -> list[MFNForCausalLM]:
    """The remedy's models; plain ones where it is nothing else."""
    domain = SOURCE if name.startswith("P5/") else None
    found = []
    for seed in range(seeds):
        usual = not recipe.changes() or (seed == 0 and set(recipe.changes()) == {"shared"})
        kind = "plain" if usual else name.replace("/", "-")
        found.append(models.mfn(seed, domain, kind, Recipe() if usual else recipe))
    return found


def saes(models: Models, recipe: Recipe, seeds: int) -> list[MFNForCausalLM]:
    """Post-hoc SAEs that have of a recipe what is not the MFN's own: size, epochs, and what seeds share, which makes
    features alike without any MFN. None where it has nothing of these: the study's stand beside `USUAL`."""
    changes = recipe.changes()
    if not changes:
        return [models.sae(seed) for seed in range(seeds)]
    return [sae(models, recipe, seed) for seed in range(seeds) if changes.keys() & {"size", "epochs", "shared"}]


def sae(models: Models, recipe: Recipe, seed: int) -> MFNForCausalLM:
    """Of one seed; as often through the text as the MFN model."""
    start, text, size = recipe.starts_from(seed), partial(models.rows, None), {**models.size, **recipe.size}
    shares_learnt = recipe.shared == "learnt dictionary"
    alone, rate = (recipe.epochs, TUNING_RATE) if shares_learnt else (0, LEARNING_RATE)

    def train() -> MFNForCausalLM:
        if shares_learnt:
            first = post_hoc_sae(models.base_model, text(start), epochs=alone, seed=start, **size)
        else:
            first = random_sae(models.base_model, text(start), seed=start, **size)
        epochs = recipe.epochs + 1 - alone
        return fine_tune_sae(first, text(seed), epochs=epochs, learning_rate=rate, seed=seed)

    made_from = {"recipe": {"size": recipe.size, "epochs": recipe.epochs, "shared": recipe.shared}}
    name = f"sae-{hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:8]}-seed-{seed}"
    made_from |= {"training": [training_settings(LEARNING_RATE), training_settings(rate)]}
    return models.kept(name, made_from | {"texts": [digest_of_rows(text(each)) for each in (start, seed)]}, train)


def evidence(models: Models, name: str, recipe: Recipe, seeds: int) -> Evidence:
    """Of such models, on windows and with a seed that no verdict of the study is from: remedies are chosen by these."""
    own, data = trained(models, name, recipe, seeds), models.study.data
    held_out = {domain: data.evaluation(domain, small_models.EVALUATION_TOKENS) for domain in corpora.DOMAINS}
    if name.startswith("P5/"):
        frozen = recipe.settings.get("trainable") == "mfn"
        dense = [None if frozen else models.dense(seed, SOURCE, recipe) for seed in range(seeds)]
        transfers = {MFN: [Transfer(SOURCE, *pair) for pair in zip(own, dense, strict=True)]}
        if not recipe.changes() or recipe.unfamiliar:
            beside = models.beside(recipe)
            transfers[POST_HOC_SAE] = [Transfer(SOURCE, beside.sae(seed, SOURCE, of)) for seed, of in enumerate(dense)]
        return predictions.evidence(models, {}, transfers, held_out, SEED, words=False)
    subjects = {MFN: own, POST_HOC_SAE: saes(models, recipe, seeds)}
    given = {subject: of for subject, of in subjects.items() if of}
    return predictions.evidence(models, given, {}, held_out, SEED)


def settings_of(models: Models, found: Evidence, seeds: int) -> dict[str, Any]:
    """What tells a measurement from others."""
    measured = [model for of in found.subjects.values() for model in of]
    for transfer in (transfer for of in found.transfers.values() for transfer in of):
        measured += [each for each in (transfer.model, transfer.reference) if each is not None]
    digests = predictions.digests(measured, found.held_out)
    return models.study.settings() | {
        "seeds": seeds, "seed": found.seed, "base_weights": models.base_digest, "digests": digests
    }  # fmt: skip


def measure(found: Evidence) -> dict[str, Any]:
    """The figures of the predictions that such models are for."""
    own = found.subjects.get(MFN) or [transfer.model for transfer in found.transfers[MFN]]
    losses = {domain: [round(perplexity(model, rows), 3) for model in own] for domain, rows in found.held_out.items()}
    chosen = ["P5"] if found.transfers else ON_ALL
    figures = {prediction: PREDICTIONS[prediction](found).figures for prediction in chosen}
    return {"perplexity": losses, "figures": plain(figures)}


def is_known(file: Path, settings: dict[str, Any]) -> bool:
    """Whether this was measured with the same settings and models."""
    if not file.exists():
        return False
    return bool(json.loads(file.read_text(encoding="utf-8"))["settings"] == json.loads(json.dumps(settings)))


def measure_remedy(of: tuple[str, str], seeds: int) -> None:
    """Writes the result of a family's remedy, unless it was measured with the same models."""
    family, name = of
    torch.set_num_threads(1)
    models, recipe = Models(predictions.small(family, seeds=3)), recipes()[name]  # three: training windows of the study
    found = evidence(models, name, recipe, seeds)
    settings = settings_of(models, found, seeds)
    file = results(family) / f"{name}.json"
    if is_known(file, settings):
        return
    print(f"measuring {family} {name}", flush=True)
    record = {"command": shlex.join(["python", "-m", "benchmarks.small.remedies", *sys.argv[1:]]), "commit": COMMIT}
    record |= {"settings": settings, "changes": recipe.changes()} | measure(found)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(record, indent=2, allow_nan=False) + "\n")


def main(
    family: Annotated[list[str] | None, typer.Option(help="llama or gpt2; both by default.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Pattern of the names of remedies; once for each.")] = None,
    seeds: Annotated[int, typer.Option(help="Of each remedy.")] = 2,
    processes: Annotated[int, typer.Option(help="Remedies at a time, of one thread each.")] = 2,
) -> None:
    predictions.prepare()
    chosen = [name for name in recipes() if any(fnmatch.fnmatch(name, pattern) for pattern in only or ["*"])]
    # what they are held against first: others start from what its MFN layers learn alone
    usual = [name for name in chosen if name.endswith(USUAL)]
    for names in (usual, [name for name in chosen if name not in usual]):
        of = [(each, name) for name in names for each in family or small_models.FAMILIES]
        predictions.in_processes(partial(measure_remedy, seeds=seeds), of, processes)


def results(family: str) -> Path:
    return predictions.RESULTS / family / "remedies"


if __name__ == "__main__":
    typer.run(main)
