"""The paper's five predictions, measured on a small Llama and a small GPT-2, or on any checkpoint.

Models of all domains are MFN models, MFN models without the rate loss, and post-hoc SAEs on the frozen base model. The
SAEs have the same place, size and k. A random SAE is compared, too. Models of one domain are MFN models, dense models,
SAEs, and these SAEs fine-tuned on each other domain. All models are measured on held-out text.

    python -m benchmarks.small.predictions                                   # both families, one process each
    python -m benchmarks.small.predictions --family llama
    python -m benchmarks.small.predictions --base FOLDER --name NAME --layers 6 --layers 12 --learning-rate 1e-4

Results go to benchmarks/results/predictions/<name>/, with `--codes update` to <name>-update/. Models go to the cache
folder (`MFN_CACHE`). Existing results and models are reused if their settings are the same. A run that trains
everything, including the base models, writes its minutes to benchmarks/results/predictions/time.json.
"""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.common import corpora, records, small_models, word_lists
from benchmarks.small.fidelity import BASE_TOKENS, BATCH, CONTINUE, SHORT_TOKENS, K
from benchmarks.small.recipes import (
    EPOCHS,
    JOINT,
    ONE_DOMAIN,
    REALIGNMENT,
    STUDY,
    Recipe,
    realign,
    train_alone,
    train_together,
    training,
    with_other_windows,
    with_random_tokens,
    with_random_windows,
)
from modeling_mfn import MFNForCausalLM
from modeling_mfn.demo.assets import cache_folder
from modeling_mfn.evaluation.baselines.models import BaselineModels, digest_of, digest_of_rows
from modeling_mfn.evaluation.baselines.saes import LEARNING_RATE, TUNING_RATE, training_settings
from modeling_mfn.evaluation.predictions.p5_transfer import Transfer
from modeling_mfn.evaluation.result import MFN, NO_RATE_LOSS, Subjects
from modeling_mfn.evaluation.study import PREDICTIONS, Evidence, check_predictions, measure_predictions

RESULTS = records.RESULTS / "predictions"
SOURCE = "dictionary"
"""Domain whose features are tested on other domains (P5)."""
OF_TRAINING_ALONE = ("size", "epochs", "alone", "unfamiliar", "aligned", "whitened")
"""Fields of a recipe that change how MFN layers learn on their own."""
HELD_OUT_TOKENS = 65_536
"""Tokens per domain, or all if there are fewer. With 16,384, only one concept in 16 has enough words for a probe."""


@dataclass(frozen=True)
class PredictionStudy:
    """Settings of the models that are trained and measured."""

    name: str
    """Folder of the results."""
    base: Path
    """Folder of the base model."""
    window: int
    """Tokens per window."""
    layers: tuple[int, ...] | None
    """Blocks with an MFN layer; `None` for all."""
    num_features: int
    tokens: int
    """Training tokens. Every model sees them `EPOCHS` + 1 times."""
    held_out_tokens: int
    """Tokens per domain, or all if there are fewer."""
    learning_rate: float
    """Learning rate of the backbone."""
    seeds: int
    """Number of MFN models and SAEs."""
    skip: int = 0
    """Tokens that the base model was trained on."""
    codes: str = "stream"
    """What MFN layers and SAEs code: `"stream"` or `"update"`."""

    @cached_property
    def data(self) -> small_models.Data:
        """Windows of all domains in the base model's tokens."""
        return small_models.tokenised(self.tokenizer, self.window)

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the base model."""
        return AutoTokenizer.from_pretrained(self.base)

    def rows(self, domain: str | None, seed: int) -> Dataset:
        """Training windows of one domain, or of all domains (`None`).

        Windows of all domains differ by seed. Windows of one domain differ by seed in their order only, because some
        domains are too short for more.
        """
        if domain is None:
            return self.data.sample(self.tokens, after=self.skip, seed=seed)
        return self.data.sample(self.tokens, after=self.skip, domains=[domain]).shuffle(seed=seed)

    def settings(self) -> dict[str, Any]:
        """Everything that results depend on, without local paths."""
        settings = {name: value for name, value in vars(self).items() if name not in ("base", "data")}
        saes = {"tuning_rate": TUNING_RATE} | training_settings(LEARNING_RATE)
        return settings | {"k": K, "cached_epochs": EPOCHS, "training": training(), "saes": saes, "source": SOURCE}


class StudyModels(BaselineModels):
    """MFN models and dense models of a study, next to its baselines. Each model is trained once and kept."""

    def __init__(self, study: PredictionStudy) -> None:
        layers = "all" if study.layers is None else list(study.layers)
        size = {"layers": layers, "num_features": study.num_features, "k": K, "codes": study.codes}
        super().__init__(study.base, study.rows, size, EPOCHS + 1, cache_folder() / "predictions" / study.name)
        self.study = study

    def mfn(self, seed: int, domain: str | None = None, kind: str = "mfn", recipe: Recipe = STUDY) -> MFNForCausalLM:
        """MFN model trained on one domain, or on all (`None`)."""
        rate, rows = self.study.learning_rate, self.text(domain, recipe)(seed)
        before = self.alone_made_from(seed, domain, recipe)
        made_from = {"training": training(), "recipe": recipe.changes(), "rate": rate, "before": before}
        return self.kept(
            f"{kind}-{domain or 'all'}-seed-{seed}",
            made_from | {"text": digest_of_rows(rows)},
            lambda: train_together(
                self.alone(seed, domain, recipe, before), rows, seed, self.folder / "training",
                learning_rate=rate, recipe=recipe,
            ),
        )  # fmt: skip

    def text(self, domain: str | None, recipe: Recipe) -> Callable[[int], Dataset]:
        """Seed -> training windows of one domain, with the recipe's share of windows of the other domains."""
        others = [each for each in corpora.DOMAINS if each != domain]

        def rows(seed: int) -> Dataset:
            own = self.rows(domain, seed)
            if domain is None or not recipe.other_text:
                return own
            other = self.study.data.sample(self.study.tokens, after=self.study.skip, seed=seed, domains=others)
            return with_other_windows(own, other, recipe.other_text, seed + 2)

        return rows

    def realigned(self, model: MFNForCausalLM, seed: int, domain: str, kind: str) -> MFNForCausalLM:
        """MFN model whose layers went on with the windows of another domain."""
        rows = self.rows(domain, seed)
        made_from = {"training": REALIGNMENT | small_models.OPTIMIZER, "text": digest_of_rows(rows)}
        return self.kept(
            f"{kind}-realigned-on-{domain}-seed-{seed}",
            made_from | {"batch": BATCH, "of": digest_of(model)},
            lambda: realign(copy.deepcopy(model), rows, seed, self.folder / "training"),
        )

    def alone_made_from(self, seed: int, domain: str | None, recipe: Recipe) -> dict[str, Any]:
        """Identity of the model after the training of its MFN layers alone.

        Recipes that differ only in the joint training share this model.
        """
        seeds = recipe.starts_from(seed), recipe.learns_alone(seed)
        return {
            "training": {name: of for name, of in training().items() if name in ("optimizer", "from_cache")},
            "recipe": {name: of for name, of in recipe.changes().items() if name in OF_TRAINING_ALONE},
            "seeds": seeds,
            "texts": [digest_of_rows(self.text(domain, recipe)(each)) for each in seeds],
        }

    def alone(self, seed: int, domain: str | None, recipe: Recipe, before: Mapping[str, Any]) -> MFNForCausalLM:
        """Model whose MFN layers learnt on their own, from cached activations."""
        digest = hashlib.sha256(json.dumps(before).encode()).hexdigest()[:16]
        text = self.text(domain, recipe)
        return self.kept(
            f"alone-{digest}", before, lambda: train_alone(self.base, text, seed, size=self.size, recipe=recipe)
        )

    def baselines_for(self, recipe: Recipe) -> BaselineModels:
        """Post-hoc SAEs to compare with models of one domain.

        They see the recipe's random tokens and its windows of other domains in all of their epochs.
        """
        if not recipe.unfamiliar and not recipe.other_text:
            return self

        def rows(domain: str | None, seed: int) -> Dataset:
            if domain != SOURCE:
                return self.rows(domain, seed)
            text = self.text(domain, recipe)(seed)
            return with_random_tokens(text, recipe.unfamiliar, self.base_model.config.vocab_size, seed)

        folder = f"random-tokens-{recipe.unfamiliar:g}-{recipe.unfamiliar_windows:.2f}"
        if recipe.other_text:
            folder += f"-other-text-{recipe.other_text:g}"
        return BaselineModels(self.base, rows, {**self.size, **recipe.size}, self.epochs, self.folder / folder)

    def dense(self, seed: int, domain: str, recipe: Recipe) -> PreTrainedModel:
        """Base model trained without MFN layers, with the windows, labels and learning rate of the MFN model."""
        windows = recipe.unfamiliar_windows
        vocabulary = self.base_model.config.vocab_size
        rows = with_random_windows(self.text(domain, recipe)(seed), windows, recipe.unfamiliar, vocabulary, seed)
        settings = CONTINUE | {"learning_rate": self.study.learning_rate, "warmup_steps": JOINT["warmup_steps"]}

        def train() -> PreTrainedModel:
            model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
            small_models.train_dense(model, rows, self.folder / "training", BATCH, seed, **settings)
            return model

        made_from = settings | small_models.OPTIMIZER | {"batch": BATCH, "text": digest_of_rows(rows)}
        name = f"dense-{domain}-{windows:.2f}" + (f"-other-{recipe.other_text:g}" if recipe.other_text else "")
        return self.kept(f"{name}-seed-{seed}", made_from, train)


def run_study(study: PredictionStudy, predictions: list[str], threads: int) -> None:
    """Trains the models that are missing, measures the predictions and writes their results."""
    torch.set_num_threads(threads)
    models, seeds = StudyModels(study), range(study.seeds)
    transfers = {}
    if "P5" in predictions:
        own = [models.mfn(seed, SOURCE, recipe=ONE_DOMAIN) for seed in seeds]
        dense = [models.dense(seed, SOURCE, ONE_DOMAIN) for seed in seeds]
        targets = [domain for domain in corpora.DOMAINS if domain != SOURCE]
        transfers = models.baselines_for(ONE_DOMAIN).transfers(SOURCE, targets, own, dense)
    subjects = {
        MFN: [models.mfn(seed) for seed in seeds],
        NO_RATE_LOSS: [models.mfn(0, kind="no-rate", recipe=STUDY.with_settings(lambda_rate=0.0))],
        **models.subjects(study.seeds),
    }
    # no recipe was chosen on these windows
    held_out = {domain: study.data.fresh(domain, study.held_out_tokens) for domain in corpora.DOMAINS}
    settings = study.settings() | {
        "recipes": {"all domains": STUDY.changes(), "one domain": ONE_DOMAIN.changes()},
        "base_weights": models.base_digest,
        "digests": digests([model for of in subjects.values() for model in of], held_out),
    }
    evidence = evidence_of(models, subjects, transfers, held_out)
    measure_predictions(evidence, predictions, settings, RESULTS / study.name, records.COMMIT)


def digests(models: Iterable[PreTrainedModel], held_out: Mapping[str, Dataset]) -> list[str]:
    """Digests of weights and windows. Digests differ where models or texts differ, even if settings are equal."""
    return [*map(digest_of, models), *map(digest_of_rows, held_out.values())]


def evidence_of(
    models: StudyModels,
    subjects: Subjects,
    transfers: Mapping[str, Sequence[Transfer]],
    held_out: Mapping[str, Dataset],
    seed: int = 0,
    words: bool = True,
) -> Evidence:
    """Everything that the predictions are measured on.

    Args:
        models: models of a study.
        subjects: models of P1 to P4.
        transfers: models of P5.
        held_out: domain -> windows to measure on.
        seed: seed of samples and of the words that probes are tested on.
        words: True to probe concepts. Otherwise only formats are probed.
    """
    study = models.study
    return Evidence(
        subjects=subjects,
        held_out=held_out,
        choosing=study.data.sample(study.held_out_tokens, after=study.skip + study.seeds * study.tokens),
        tokenizer=study.tokenizer,
        groups=word_lists.groups() if words else {},
        transfers=transfers,
        seed=seed,
    )


def study_name(family: str, codes: str) -> str:
    """Folder of the results of a family's small models."""
    return family if codes == "stream" else f"{family}-{codes}"


def small_study(family: str, seeds: int, codes: str = "stream") -> PredictionStudy:
    """Study of a small model. A missing base model is trained."""
    return PredictionStudy(
        name=study_name(family, codes),
        base=small_models.base_folder(family, 0, BASE_TOKENS),
        window=small_models.WINDOW,
        layers=None,
        num_features=8 * small_models.HIDDEN,
        tokens=SHORT_TOKENS,
        held_out_tokens=HELD_OUT_TOKENS,
        learning_rate=CONTINUE["learning_rate"],
        seeds=seeds,
        skip=BASE_TOKENS,
        codes=codes,
    )


def run_family(family: str, seeds: int, codes: str, predictions: list[str], threads: int) -> None:
    """Measures the predictions on a family's small models."""
    torch.set_num_threads(threads)  # the base model may have to be trained first
    run_study(small_study(family, seeds, codes), predictions, threads)


def prepare() -> None:
    """Makes files that several processes would otherwise make at the same time."""
    small_models.data(), word_lists.groups()


def failures(work: Callable[[Any], None], on: Sequence[Any], processes: int) -> Iterator[tuple[Any, BaseException]]:
    """Runs the work on each item, in several processes at a time. Yields an item and its error as soon as it fails."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(work, each): each for each in on}
        for done in as_completed(running):
            if error := done.exception():
                yield running[done], error


def in_processes(work: Callable[[Any], None], on: Sequence[Any], processes: int) -> None:
    """Runs the work on each item, in several processes at a time. Exits after the last item if any item failed."""
    failed = []
    for each, error in failures(work, on, processes):
        print(f"{each} failed:", *traceback.format_exception(error), sep="\n", file=sys.stderr, flush=True)
        failed.append(str(each))
    if failed:
        sys.exit(f"no results of {', '.join(failed)}; run the command again, it reuses the results that are there")


def main(
    family: Annotated[
        list[str] | None, typer.Option(help="Family to study: llama or gpt2. Repeat it for several; default: both.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of a checkpoint to study instead of small models.")] = None,
    name: Annotated[str, typer.Option(help="Folder of the results with --base.")] = "checkpoint",
    layers: Annotated[
        list[int] | None, typer.Option(help="Block of --base that gets an MFN layer. Repeat it; default: all.")
    ] = None,
    expansion_factor: Annotated[int, typer.Option(help="Features of --base per dimension of its hidden size.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the backbone with --base.")] = 1e-4,
    window: Annotated[int, typer.Option(help="Tokens per window with --base.")] = 128,
    tokens: Annotated[int, typer.Option(help="Training tokens of each model with --base.")] = SHORT_TOKENS,
    seeds: Annotated[int, typer.Option(help="Number of seeds of MFN models and SAEs.")] = 3,
    codes: Annotated[
        Literal["stream", "update"], typer.Option(help="What MFN layers and SAEs code: stream or update.")
    ] = "stream",
    predictions: Annotated[str, typer.Option(help="Predictions to measure, such as P1,P3.")] = ",".join(PREDICTIONS),
    threads: Annotated[int, typer.Option(help="Threads per process.")] = 1,
) -> None:
    """Trains the models of the study and measures the predictions on them."""
    chosen = check_predictions(predictions.split(","))
    if base is not None and family:
        raise typer.BadParameter(f"family is {', '.join(family)}, and base {base}; give one of the two")
    if base is not None:
        config = AutoConfig.from_pretrained(base)
        study = PredictionStudy(
            name=name,
            base=base,
            window=window,
            layers=tuple(layers) if layers else None,
            num_features=expansion_factor * config.hidden_size,
            tokens=tokens,
            held_out_tokens=HELD_OUT_TOKENS,
            learning_rate=learning_rate,
            seeds=seeds,
            codes=codes,
        )
        run_study(study, chosen, threads)
        return
    families = family or list(small_models.FAMILIES)
    from_nothing = not any(small_models.trained()) and not (cache_folder() / "predictions").exists()
    results = [RESULTS / study_name(of, codes) / f"{prediction}.json" for of in families for prediction in chosen]
    before = {file: file.stat().st_mtime_ns for file in results if file.exists()}
    begun = time.monotonic()
    prepare()
    work = partial(run_family, seeds=seeds, codes=codes, predictions=chosen, threads=threads)
    in_processes(work, families, processes=len(families))
    if from_nothing and all(file.stat().st_mtime_ns != before.get(file) for file in results):
        took = {"command": records.command_line("small.predictions"), "commit": records.COMMIT}
        took |= {"families": families, "minutes": round((time.monotonic() - begun) / 60, 1)}
        records.write_record(RESULTS / "time.json", took)


if __name__ == "__main__":
    typer.run(main)
