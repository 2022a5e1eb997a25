"""The paper's five predictions on models that this trains: a small Llama and a small GPT-2, or any checkpoint.

MFN models, and on the same tokens the baselines: post-hoc SAEs of the same place, size and k on the frozen base model,
a random SAE, MFN models without the rate loss; then, on one domain alone, MFN models, dense ones, SAEs, and these SAEs
fine-tuned on each other domain. All is measured on held-out text.

    python -m benchmarks.small.predictions                                   # both families, a process each
    python -m benchmarks.small.predictions --family llama
    python -m benchmarks.small.predictions --base FOLDER --name NAME --layers 6 --layers 12 --learning-rate 1e-4

Results go to benchmarks/results/predictions/<name>/; models to the folder of the demo's files. What is there stays. A
run that trains everything, base models too, leaves its minutes in benchmarks/results/predictions/time.json.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.common import corpora, small_models, word_lists
from benchmarks.small.fidelity import BASE_TOKENS, BATCH, COMMIT, CONTINUE, SHORT_TOKENS, K
from benchmarks.small.recipes import (
    EPOCHS,
    JOINT,
    ONE_DOMAIN,
    STUDY,
    Recipe,
    train_alone,
    train_together,
    training,
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
from modeling_mfn.utils.files import write_whole

RESULTS = Path(__file__).parents[1] / "results" / "predictions"
SOURCE = "dictionary"
"""The domain that features shall be carried over from."""
HELD_OUT_TOKENS = 65_536
"""A domain, or as many as there are: of 16,384, one concept in 16 has words enough to be probed."""


@dataclass(frozen=True)
class Study:
    """What is trained and measured."""

    name: str
    base: Path
    window: int
    layers: tuple[int, ...] | None
    """Blocks with an MFN layer; all of them where it is `None`."""
    num_features: int
    tokens: int
    """That every model learns from: each `EPOCHS` + 1 times."""
    held_out_tokens: int
    """A domain, if it has as many."""
    learning_rate: float
    """Of the backbone."""
    seeds: int
    skip: int = 0
    """Tokens that the base model was trained on."""

    @cached_property
    def data(self) -> small_models.Data:
        return small_models.tokenised(self.tokenizer, self.window)

    @property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.base)

    def rows(self, domain: str | None, seed: int) -> Dataset:
        """Training windows of all domains, others with each seed; or of one, the same in another order, since not every
        domain has enough that the base model was not trained on."""
        if domain is None:
            return self.data.sample(self.tokens, after=self.skip, seed=seed)
        return self.data.sample(self.tokens, after=self.skip, domains=[domain]).shuffle(seed=seed)

    def settings(self) -> dict[str, Any]:
        """What tells this study from another, without this machine's folders."""
        settings = {name: value for name, value in vars(self).items() if name not in ("base", "data")}
        saes = {"tuning_rate": TUNING_RATE} | training_settings(LEARNING_RATE)
        return settings | {"k": K, "cached_epochs": EPOCHS, "training": training(), "saes": saes, "source": SOURCE}


class Models(BaselineModels):
    """Beside the baselines, MFN models and dense ones."""

    def __init__(self, study: Study) -> None:
        layers = "all" if study.layers is None else list(study.layers)
        size = {"layers": layers, "num_features": study.num_features, "k": K}
        super().__init__(study.base, study.rows, size, EPOCHS + 1, cache_folder() / "predictions" / study.name)
        self.study = study

    def mfn(self, seed: int, domain: str | None = None, kind: str = "mfn", recipe: Recipe = STUDY) -> MFNForCausalLM:
        """Trained on a domain, or on all."""
        rate, rows = self.study.learning_rate, self.rows(domain, seed)
        before = self.before(seed, domain, recipe)
        made_from = {"training": training(), "recipe": asdict(recipe), "rate": rate, "before": before}
        return self.kept(
            f"{kind}-{domain or 'all'}-seed-{seed}",
            made_from | {"text": digest_of_rows(rows)},
            lambda: train_together(
                self.alone(seed, domain, recipe, before), rows, seed, self.folder / "training",
                learning_rate=rate, recipe=recipe,
            ),
        )  # fmt: skip

    def before(self, seed: int, domain: str | None, recipe: Recipe) -> dict[str, Any]:
        """What MFN layers that have learnt alone are made from. Recipes that differ only in what follows share them."""
        seeds = recipe.starts_from(seed), recipe.learns_alone(seed)
        return {
            "training": {name: of for name, of in training().items() if name in ("optimizer", "from_cache")},
            "recipe": {"size": recipe.size, "epochs": recipe.epochs, "unfamiliar": recipe.unfamiliar},
            "seeds": seeds,
            "texts": [digest_of_rows(self.rows(domain, each)) for each in seeds],
        }

    def alone(self, seed: int, domain: str | None, recipe: Recipe, before: Mapping[str, Any]) -> MFNForCausalLM:
        """Whose MFN layers have learnt alone."""
        digest = hashlib.sha256(json.dumps(before).encode()).hexdigest()[:16]
        text = partial(self.rows, domain)
        return self.kept(
            f"alone-{digest}", before, lambda: train_alone(self.base, text, seed, size=self.size, recipe=recipe)
        )

    def beside(self, recipe: Recipe) -> BaselineModels:
        """Post-hoc SAEs for models of the source: where these see random tokens, they do, too, in all their epochs."""
        if not recipe.unfamiliar:
            return self

        def rows(domain: str | None, seed: int) -> Dataset:
            rows = self.rows(domain, seed)
            if domain != SOURCE:
                return rows
            return with_random_tokens(rows, recipe.unfamiliar, self.base_model.config.vocab_size, seed)

        folder = self.folder / f"random-tokens-{recipe.unfamiliar:g}-{recipe.unfamiliar_windows:.2f}"
        return BaselineModels(self.base, rows, self.size, self.epochs, folder)

    def dense(self, seed: int, domain: str, recipe: Recipe) -> PreTrainedModel:
        """The base model, trained on for as long with the same learning rate and warm-up, to predict the same
        tokens."""
        windows = recipe.unfamiliar_windows
        vocabulary = self.base_model.config.vocab_size
        rows = with_random_windows(self.rows(domain, seed), windows, recipe.unfamiliar, vocabulary, seed)
        settings = CONTINUE | {"learning_rate": self.study.learning_rate, "warmup_steps": JOINT["warmup_steps"]}

        def train() -> PreTrainedModel:
            model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
            small_models.train_dense(model, rows, self.folder / "training", BATCH, seed, **settings)
            return model

        made_from = settings | small_models.OPTIMIZER | {"batch": BATCH, "text": digest_of_rows(rows)}
        return self.kept(f"dense-{domain}-{windows:.2f}-seed-{seed}", made_from, train)


def run(study: Study, predictions: list[str], threads: int) -> None:
    """Trains what is not there yet, and measures."""
    torch.set_num_threads(threads)
    models, seeds = Models(study), range(study.seeds)
    transfers = {}
    if "P5" in predictions:
        own = [models.mfn(seed, SOURCE, recipe=ONE_DOMAIN) for seed in seeds]
        dense = [models.dense(seed, SOURCE, ONE_DOMAIN) for seed in seeds]
        targets = [domain for domain in corpora.DOMAINS if domain != SOURCE]
        transfers = models.beside(ONE_DOMAIN).transfers(SOURCE, targets, own, dense)
    subjects = {
        MFN: [models.mfn(seed) for seed in seeds],
        NO_RATE_LOSS: [models.mfn(0, kind="no-rate", recipe=STUDY.with_settings(lambda_rate=0.0))],
        **models.subjects(study.seeds),
    }
    # what no recipe was chosen on
    held_out = {domain: study.data.fresh(domain, study.held_out_tokens) for domain in corpora.DOMAINS}
    settings = study.settings() | {
        "recipes": {"all domains": STUDY.changes(), "one domain": ONE_DOMAIN.changes()},
        "base_weights": models.base_digest,
        "digests": digests([model for of in subjects.values() for model in of], held_out),
    }
    found = evidence(models, subjects, transfers, held_out)
    measure_predictions(found, predictions, settings, RESULTS / study.name, COMMIT)


def digests(models: Iterable[PreTrainedModel], held_out: Mapping[str, Dataset]) -> list[str]:
    """What tells models and windows from others, which settings may not."""
    return [*map(digest_of, models), *map(digest_of_rows, held_out.values())]


def evidence(
    models: Models,
    subjects: Subjects,
    transfers: Mapping[str, Sequence[Transfer]],
    held_out: Mapping[str, Dataset],
    seed: int = 0,
    words: bool = True,
) -> Evidence:
    """Subjects and transfers on held-out windows; without `words`, for probes of formats alone."""
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


def small(family: str, seeds: int) -> Study:
    return Study(
        name=family,
        base=small_models.base_folder(family, 0, BASE_TOKENS),
        window=small_models.WINDOW,
        layers=None,
        num_features=8 * small_models.HIDDEN,
        tokens=SHORT_TOKENS,
        held_out_tokens=HELD_OUT_TOKENS,
        learning_rate=CONTINUE["learning_rate"],
        seeds=seeds,
        skip=BASE_TOKENS,
    )


def run_family(family: str, seeds: int, predictions: list[str], threads: int) -> None:
    torch.set_num_threads(threads)  # also for the base model, if that has to be trained first
    run(small(family, seeds), predictions, threads)


def prepare() -> None:
    """Makes what several processes would otherwise make at once."""
    small_models.data(), word_lists.groups()


def failures(work: Callable[[Any], None], on: Sequence[Any], processes: int) -> Iterator[tuple[Any, BaseException]]:
    """So many at a time, each in a process of its own; those that fail as soon as they do, while others go on."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(work, each): each for each in on}
        for done in as_completed(running):
            if error := done.exception():
                yield running[done], error


def in_processes(work: Callable[[Any], None], on: Sequence[Any], processes: int) -> None:
    """So many at a time; exits if one failed, once all others are through."""
    failed = []
    for each, error in failures(work, on, processes):
        print(f"{each} failed:", *traceback.format_exception(error), sep="\n", file=sys.stderr, flush=True)
        failed.append(str(each))
    if failed:
        sys.exit(f"no results of {', '.join(failed)}; what is there stays, run it again")


def main(
    family: Annotated[list[str] | None, typer.Option(help="llama or gpt2; both by default.")] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of another checkpoint to study instead.")] = None,
    name: Annotated[str, typer.Option(help="Of that study's results.")] = "checkpoint",
    layers: Annotated[list[int] | None, typer.Option(help="A block with an MFN layer there; once for each.")] = None,
    expansion_factor: Annotated[int, typer.Option(help="Features there, as a multiple of the hidden size.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of the backbone there.")] = 1e-4,
    window: Annotated[int, typer.Option(help="Tokens a window there.")] = 128,
    tokens: Annotated[int, typer.Option(help="That each model there learns from.")] = SHORT_TOKENS,
    seeds: Annotated[int, typer.Option(help="Seeds of MFN models and SAEs.")] = 3,
    predictions: Annotated[str, typer.Option(help="Which, such as P1,P3.")] = ",".join(PREDICTIONS),
    threads: Annotated[int, typer.Option(help="Threads of each process.")] = 1,
) -> None:
    chosen = check_predictions(predictions.split(","))
    if base is not None and family:
        raise typer.BadParameter(f"family is {', '.join(family)}, and base {base}; give one of the two")
    if base is not None:
        config = AutoConfig.from_pretrained(base)
        study = Study(
            name=name,
            base=base,
            window=window,
            layers=tuple(layers) if layers else None,
            num_features=expansion_factor * config.hidden_size,
            tokens=tokens,
            held_out_tokens=HELD_OUT_TOKENS,
            learning_rate=learning_rate,
            seeds=seeds,
        )
        run(study, chosen, threads)
        return
    families = family or list(small_models.FAMILIES)
    from_nothing = not any(small_models.trained()) and not (cache_folder() / "predictions").exists()
    results = [RESULTS / of / f"{prediction}.json" for of in families for prediction in chosen]
    before = {file: file.stat().st_mtime_ns for file in results if file.exists()}
    begun = time.monotonic()
    prepare()
    work = partial(run_family, seeds=seeds, predictions=chosen, threads=threads)
    in_processes(work, families, processes=len(families))
    if from_nothing and all(file.stat().st_mtime_ns != before.get(file) for file in results):
        took = {
            "command": shlex.join(["python", "-m", "benchmarks.small.predictions", *sys.argv[1:]]),
            "commit": COMMIT,
        }
        took |= {"families": families, "minutes": round((time.monotonic() - begun) / 60, 1)}
        write_whole(RESULTS / "time.json", json.dumps(took, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
