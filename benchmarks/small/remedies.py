"""Remedies for predictions that fail: changes of the training, measured before and after.

Where MFN layers code the stream, models without a remedy have the plain training (`Recipe()`), the first one of the
study. Where they code the update, they are the models of the study. Figures are defined as in `predictions.py`.

    python -m benchmarks.small.remedies                        # all remedies without an up-to-date result: hours
    python -m benchmarks.small.remedies --codes update
    python -m benchmarks.small.remedies --family gpt2 --only '*/as-it-is' --only 'P3/*'    # remedies whose names match

A remedy writes benchmarks/results/predictions/<family>/remedies/<name>.json, with `--codes update` to <family>-update/.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer

from benchmarks.common import corpora, records, small_models
from benchmarks.small import predictions
from benchmarks.small.fidelity import WEIGHTS
from benchmarks.small.predictions import SOURCE, StudyModels
from benchmarks.small.recipes import ONE_DOMAIN, STUDY, Recipe
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
OF_STREAM: dict[str, dict[str, Recipe]] = {
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
"""Prediction -> name -> recipe, where MFN layers code the stream.

Remedies for P5 learn from one domain. All others learn from all domains and are measured on P1 to P4, because a remedy
for one prediction may hurt another. "all" combines remedies for several predictions. A shared dictionary decides P3 on
its own and is never the study's default.
"""
OF_UPDATE: dict[str, dict[str, Recipe]] = {
    "all": {
        "losses-alone": replace(STUDY, alone=WEIGHTS),
        **{
            f"in-{rounds}-rounds": replace(STUDY, size={"coding_rounds": rounds, "refine_steps": 1})
            for rounds in (2, 4)
        },
    },
    "P1": {
        "rate-x3": STUDY.with_settings(lambda_rate=3 * WEIGHTS["lambda_rate"]),
    },
    "P2": {
        "whitened": replace(STUDY, whitened=True),
    },
    "P3": {
        "aligned": replace(STUDY, aligned=True),
        "weight-decay": replace(STUDY.with_settings(weight_decay=0.1), alone={"weight_decay": 0.1}),
        "frozen-backbone": STUDY.with_settings(trainable="mfn"),
    },
    "P5": {
        "other-text": replace(ONE_DOMAIN, other_text=0.1),
        "realigned": replace(ONE_DOMAIN, realigned=True),
    },
}
"""The same where MFN layers code the update. The models without a remedy are the study's."""


class Remedies(NamedTuple):
    """Remedies of a study, and the recipe of the models without a remedy."""

    plain: Recipe
    """Recipe of models of all domains."""
    plain_of_source: Recipe
    """Recipe of models of one domain."""
    kind: str
    """Name of these models in the cache folder."""
    table: dict[str, dict[str, Recipe]]
    """Prediction -> name -> recipe."""

    def recipes(self) -> dict[str, Recipe]:
        """Name -> recipe, the plain training first."""
        table = {f"all/{PLAIN}": self.plain, f"P5/{PLAIN}": self.plain_of_source}
        return table | {f"{of}/{name}": recipe for of, own in self.table.items() for name, recipe in own.items()}

    def plain_for(self, name: str) -> Recipe:
        """Recipe that a remedy is compared with."""
        return self.plain_of_source if name.startswith("P5/") else self.plain

    def changes(self, name: str) -> dict[str, Any]:
        """What a remedy changes."""
        return self.recipes()[name].changes(self.plain_for(name))


REMEDIES = {
    "stream": Remedies(Recipe(), Recipe(), "plain", OF_STREAM),
    "update": Remedies(STUDY, ONE_DOMAIN, "mfn", OF_UPDATE),
}
"""What MFN layers code -> the remedies."""
ON_ALL = ("P1", "P2", "P3", "P4")


def remedy_models(models: StudyModels, name: str, seeds: int) -> list[MFNForCausalLM]:
    """Models of a remedy, one per seed. A seed in which the remedy changes no training has the plain model."""
    remedies = REMEDIES[models.study.codes]
    domain, changed = SOURCE if name.startswith("P5/") else None, set(remedies.changes(name))
    found = []
    for seed in range(seeds):
        plain_model = not changed - {"realigned"} or (seed == 0 and changed == {"shared"})
        kind = remedies.kind if plain_model else name.replace("/", "-")
        recipe = remedies.plain_for(name) if plain_model else remedies.recipes()[name]
        found.append(models.mfn(seed, domain, kind, recipe))
    return found


def remedy_saes(models: StudyModels, name: str, seeds: int) -> list[MFNForCausalLM]:
    """Post-hoc SAEs with the size, epochs and shared dictionary of a recipe.

    The list is empty if the recipe changes only other things, or the rounds, which SAEs do not have. The plain models
    are compared with the study's SAEs.
    """
    remedies = REMEDIES[models.study.codes]
    changed, recipe = remedies.changes(name).keys(), remedies.recipes()[name]
    if not changed:
        return [models.sae(seed) for seed in range(seeds)]
    if not changed & {"size", "epochs", "shared"} or recipe.size.keys() == {"coding_rounds", "refine_steps"}:
        return []
    return [remedy_sae(models, recipe, seed) for seed in range(seeds)]


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


def remedy_evidence(models: StudyModels, name: str, seeds: int) -> Evidence:
    """Models of a remedy and the text to measure them on. The study's verdicts are from other text and other words."""
    data = models.study.data
    held_out = {domain: data.evaluation(domain, small_models.EVALUATION_TOKENS) for domain in corpora.DOMAINS}
    if name.startswith("P5/"):
        transfers = remedy_transfers(models, name, seeds)
        return predictions.evidence_of(models, {}, transfers, held_out, SEED, words=False)
    subjects = {MFN: remedy_models(models, name, seeds), POST_HOC_SAE: remedy_saes(models, name, seeds)}
    given = {subject: of for subject, of in subjects.items() if of}
    return predictions.evidence_of(models, given, {}, held_out, SEED)


def remedy_transfers(models: StudyModels, name: str, seeds: int) -> dict[str, list[Transfer]]:
    """Models of P5 of a remedy. SAEs are next to the plain models, and where the text differs from theirs."""
    remedies = REMEDIES[models.study.codes]
    own, recipe = remedy_models(models, name, seeds), remedies.recipes()[name]
    frozen = recipe.settings.get("trainable") == "mfn"
    dense = [None if frozen else models.dense(seed, SOURCE, recipe) for seed in range(seeds)]
    targets = [domain for domain in corpora.DOMAINS if domain != SOURCE]
    if recipe.realigned:
        found, kind = models.baselines_for(recipe).transfers(SOURCE, targets, own, dense), name.replace("/", "-")
        found[MFN] = [
            replace(of, tuned={domain: models.realigned(of.model, seed, domain, kind) for domain in targets})
            for seed, of in enumerate(found[MFN])
        ]
        return found
    transfers = {MFN: [Transfer(SOURCE, *pair) for pair in zip(own, dense, strict=True)]}
    if not remedies.changes(name) or recipe.unfamiliar or recipe.other_text:
        baselines = models.baselines_for(recipe)
        transfers[POST_HOC_SAE] = [Transfer(SOURCE, baselines.sae(seed, SOURCE, of)) for seed, of in enumerate(dense)]
    return transfers


def settings_of(models: StudyModels, evidence: Evidence, seeds: int) -> dict[str, Any]:
    """Everything that a remedy's figures depend on, without local paths."""
    measured = [model for of in evidence.subjects.values() for model in of]
    for transfer in (transfer for of in evidence.transfers.values() for transfer in of):
        given = (transfer.model, transfer.reference, *transfer.tuned.values())
        measured += [each for each in given if each is not None]
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


def measure_remedy(of: tuple[str, str], codes: str, seeds: int) -> None:
    """Writes the result of a remedy, `(family, name)`, unless an up-to-date one is there."""
    family, name = of
    torch.set_num_threads(1)
    # three seeds as in the study, so that both use the same windows
    models = StudyModels(predictions.small_study(family, seeds=3, codes=codes))
    evidence = remedy_evidence(models, name, seeds)
    settings = settings_of(models, evidence, seeds)
    file = predictions.RESULTS / predictions.study_name(family, codes) / "remedies" / f"{name}.json"
    if is_up_to_date(file, settings):
        return
    print(f"measuring {family} {name}", flush=True)
    record = {"command": records.command_line("small.remedies"), "commit": records.COMMIT}
    record |= {"settings": settings, "changes": REMEDIES[codes].changes(name)}
    records.write_record(file, record | measure(evidence))


def main(
    family: Annotated[
        list[str] | None, typer.Option(help="Family: llama or gpt2. Repeat it for several; default: both.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Pattern that the names of remedies must match. Repeat it for several.")
    ] = None,
    codes: Annotated[
        Literal["stream", "update"], typer.Option(help="What MFN layers and SAEs code: stream or update.")
    ] = "stream",
    seeds: Annotated[int, typer.Option(help="Number of models per remedy.")] = 2,
    processes: Annotated[int, typer.Option(help="Remedies at a time, with one thread each.")] = 2,
) -> None:
    """Trains and measures all remedies that have no up-to-date result."""
    predictions.prepare()
    chosen = [
        name for name in REMEDIES[codes].recipes() if any(fnmatch.fnmatch(name, pattern) for pattern in only or ["*"])
    ]
    # plain models first: other remedies start from their MFN layers
    plain_ones = [name for name in chosen if name.endswith(PLAIN)]
    for names in (plain_ones, [name for name in chosen if name not in plain_ones]):
        of = [(each, name) for name in names for each in family or small_models.FAMILIES]
        predictions.in_processes(partial(measure_remedy, codes=codes, seeds=seeds), of, processes)


if __name__ == "__main__":
    typer.run(main)
