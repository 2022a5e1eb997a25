"""Remedies for predictions that fail: changes of the training, measured before and after.

Models without a remedy have the plain training (`Recipe()`), the first one of the study. Figures are defined as in
`predictions.py`.

    python -m benchmarks.small.remedies                        # all remedies without an up-to-date result: hours
    python -m benchmarks.small.remedies --family gpt2 --only '*/as-it-is' --only 'P3/*'    # remedies whose names match

A remedy writes benchmarks/results/predictions/<family>/remedies/<name>.json.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import corpora, records, small_models
from benchmarks.small import predictions
from benchmarks.small.fidelity import WEIGHTS
from benchmarks.small.predictions import SOURCE, StudyModels
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

PLAIN = "as-it-is"
"""Name of the models without a remedy."""
SEED = 1
"""Seed of samples and of the held-out words. The study has seed 0, so that no remedy is chosen on its words."""
M = 8 * small_models.HIDDEN
STABLE = {"stability_pass": "model", "lambda_stab": 2.5}
UPDATE = {"codes": "update"}
REMEDIES: dict[str, dict[str, Recipe]] = {
    "all": {
        "random-tokens-and-stable-through-the-model": Recipe(STABLE, unfamiliar=0.3),
    },
    "coding": {
        "stream": Recipe(STABLE),
        "update": Recipe(STABLE, UPDATE),
        "update-refined": Recipe(STABLE, UPDATE | {"refine_steps": 1}),
        **{
            f"update-in-{rounds}-rounds": Recipe(STABLE, UPDATE | {"coding_rounds": rounds, "refine_steps": 1})
            for rounds in (2, 4)
        },
        "update-losses-alone": Recipe(STABLE, UPDATE, alone=WEIGHTS),
        "update-aligned": Recipe(STABLE, UPDATE, aligned=True),
        "update-weight-decay": Recipe(STABLE | {"weight_decay": 0.1}, UPDATE, alone={"weight_decay": 0.1}),
        "update-frozen-backbone": Recipe(STABLE | {"trainable": "mfn"}, UPDATE),
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
"""Prediction -> name -> recipe.

Remedies for P5 learn from one domain. All others learn from all domains and are measured on P1 to P4, because a remedy
for one prediction may hurt another. "all" combines remedies for several predictions. "coding" changes what MFN layers
code, and how. A shared dictionary decides P3 on its own and is never the study's default.
"""
ON_ALL = ("P1", "P2", "P3", "P4")


def recipes() -> dict[str, Recipe]:
    """Name -> recipe, the plain training first."""
    table = {f"all/{PLAIN}": Recipe(), f"P5/{PLAIN}": Recipe()}
    return table | {f"{of}/{name}": recipe for of, own in REMEDIES.items() for name, recipe in own.items()}


def remedy_models(models: StudyModels, name: str, recipe: Recipe, seeds: int) -> list[MFNForCausalLM]:
    """Models of a remedy, one per seed. A seed in which the remedy changes nothing has the plain model."""
    domain = SOURCE if name.startswith("P5/") else None
    found = []
    for seed in range(seeds):
        plain_model = not recipe.changes() or (seed == 0 and set(recipe.changes()) == {"shared"})
        kind = "plain" if plain_model else name.replace("/", "-")
        found.append(models.mfn(seed, domain, kind, Recipe() if plain_model else recipe))
    return found


def remedy_saes(models: StudyModels, recipe: Recipe, seeds: int) -> list[MFNForCausalLM]:
    """Post-hoc SAEs with the size, epochs and shared dictionary of a recipe.

    The list is empty if the recipe changes only other things. The plain models are compared with the study's SAEs.
    """
    changes = recipe.changes()
    if not changes:
        return [models.sae(seed) for seed in range(seeds)]
    return [remedy_sae(models, recipe, seed) for seed in range(seeds) if changes.keys() & {"size", "epochs", "shared"}]


def remedy_sae(models: StudyModels, recipe: Recipe, seed: int) -> MFNForCausalLM:
    """Post-hoc SAE of one seed. The SAE sees the text as often as the MFN model."""
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


def remedy_evidence(models: StudyModels, name: str, recipe: Recipe, seeds: int) -> Evidence:
    """Models of a remedy and the text to measure them on. The study's verdicts are from other text and other words."""
    own, data = remedy_models(models, name, recipe, seeds), models.study.data
    held_out = {domain: data.evaluation(domain, small_models.EVALUATION_TOKENS) for domain in corpora.DOMAINS}
    if name.startswith("P5/"):
        frozen = recipe.settings.get("trainable") == "mfn"
        dense = [None if frozen else models.dense(seed, SOURCE, recipe) for seed in range(seeds)]
        transfers = {MFN: [Transfer(SOURCE, *pair) for pair in zip(own, dense, strict=True)]}
        if not recipe.changes() or recipe.unfamiliar:
            baselines = models.baselines_for(recipe)
            saes = [baselines.sae(seed, SOURCE, of) for seed, of in enumerate(dense)]
            transfers[POST_HOC_SAE] = [Transfer(SOURCE, sae) for sae in saes]
        return predictions.evidence_of(models, {}, transfers, held_out, SEED, words=False)
    subjects = {MFN: own, POST_HOC_SAE: remedy_saes(models, recipe, seeds)}
    given = {subject: of for subject, of in subjects.items() if of}
    return predictions.evidence_of(models, given, {}, held_out, SEED)


def settings_of(models: StudyModels, evidence: Evidence, seeds: int) -> dict[str, Any]:
    """Everything that a remedy's figures depend on, without local paths."""
    measured = [model for of in evidence.subjects.values() for model in of]
    for transfer in (transfer for of in evidence.transfers.values() for transfer in of):
        measured += [each for each in (transfer.model, transfer.reference) if each is not None]
    return models.study.settings() | {
        "seeds": seeds,
        "seed": evidence.seed,
        "base_weights": models.base_digest,
        "digests": predictions.digests(measured, evidence.held_out),
    }


def measure(evidence: Evidence) -> dict[str, Any]:
    """Perplexities, and the figures of P5 or of P1 to P4."""
    own = evidence.subjects.get(MFN) or [transfer.model for transfer in evidence.transfers[MFN]]
    held_out = evidence.held_out.items()
    losses = {domain: [round(perplexity(model, rows), 3) for model in own] for domain, rows in held_out}
    chosen = ["P5"] if evidence.transfers else ON_ALL
    figures = {prediction: PREDICTIONS[prediction](evidence).figures for prediction in chosen}
    return {"perplexity": losses, "figures": plain(figures)}


def is_up_to_date(file: Path, settings: dict[str, Any]) -> bool:
    """Returns True if a file has a result with these settings."""
    return file.exists() and bool(records.read_record(file)["settings"] == json.loads(json.dumps(settings)))


def measure_remedy(of: tuple[str, str], seeds: int) -> None:
    """Writes the result of a remedy, `(family, name)`, unless an up-to-date one is there."""
    family, name = of
    torch.set_num_threads(1)
    # three seeds as in the study, so that both use the same windows
    models, recipe = StudyModels(predictions.small_study(family, seeds=3)), recipes()[name]
    evidence = remedy_evidence(models, name, recipe, seeds)
    settings = settings_of(models, evidence, seeds)
    file = predictions.RESULTS / family / "remedies" / f"{name}.json"
    if is_up_to_date(file, settings):
        return
    print(f"measuring {family} {name}", flush=True)
    record = {"command": records.command_line("small.remedies"), "commit": records.COMMIT}
    record |= {"settings": settings, "changes": recipe.changes()}
    records.write_record(file, record | measure(evidence))


def main(
    family: Annotated[
        list[str] | None, typer.Option(help="Family: llama or gpt2. Repeat it for several; default: both.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Pattern that the names of remedies must match. Repeat it for several.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of models per remedy.")] = 2,
    processes: Annotated[int, typer.Option(help="Remedies at a time, with one thread each.")] = 2,
) -> None:
    """Trains and measures all remedies that have no up-to-date result."""
    predictions.prepare()
    chosen = [name for name in recipes() if any(fnmatch.fnmatch(name, pattern) for pattern in only or ["*"])]
    # plain models first: other remedies start from their MFN layers
    plain_ones = [name for name in chosen if name.endswith(PLAIN)]
    for names in (plain_ones, [name for name in chosen if name not in plain_ones]):
        of = [(each, name) for name in names for each in family or small_models.FAMILIES]
        predictions.in_processes(partial(measure_remedy, seeds=seeds), of, processes)


if __name__ == "__main__":
    typer.run(main)
