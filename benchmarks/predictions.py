"""The paper's five predictions on models that this trains: a small Llama and a small GPT-2, or any checkpoint.

MFN models, and on the same tokens the baselines: post-hoc SAEs of the same place, size and k on the frozen base model,
a random SAE, MFN models without the rate loss; then, on one domain alone, MFN models, dense ones, SAEs, and these SAEs
fine-tuned on each other domain. All is measured on held-out text.

    python benchmarks/predictions.py                                   # both families, a process each
    python benchmarks/predictions.py --family llama
    python benchmarks/predictions.py --base FOLDER --name NAME --layers 6 --layers 12 --learning-rate 1e-4

Results go to benchmarks/results/predictions/<name>/; models to the folder of the demo's files. What is there stays.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import concepts
import corpora
import small_models
import torch
import typer
import word_lists
from datasets import Dataset
from fidelity import BASE_TOKENS, BATCH, CONTINUE, RECIPE, SHORT_TOKENS, WEIGHTS, K, learn_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from modeling_mfn import MFNForCausalLM, MFNTrainer, MFNTrainingArguments
from modeling_mfn.demo_assets import cache_folder
from modeling_mfn.evaluation.baseline_models import BaselineModels, digest_of_rows
from modeling_mfn.evaluation.evidence import PREDICTIONS, Evidence, check_predictions, measure_predictions
from modeling_mfn.evaluation.result import MFN, NO_RATE_LOSS

RESULTS = Path(__file__).parent / "results" / "predictions"
SOURCE = "dictionary"
"""The domain that features shall be carried over from."""
EPOCHS = 2
"""That MFN layers learn alone from cached activations, before the one in which the model learns as a whole."""
JOINT = CONTINUE | RECIPE | WEIGHTS | {"alpha_anneal": 0.25, "mfn_learning_rate": 2e-3, "warmup_steps": 1 / 6}
"""`CACHE_FIRST` of `fidelity.py` in shares of the training."""


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
    """A domain."""
    learning_rate: float
    """Of the backbone."""
    seeds: int
    skip: int = 0
    """Tokens that the base model was trained on."""

    @cached_property
    def data(self) -> small_models.Data:
        tokenizer = self.tokenizer
        digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]
        return small_models.tokenised(tokenizer, self.window, cache_folder() / f"windows-{digest}-{self.window}.npz")

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
        return settings | {"k": K, "cached_epochs": EPOCHS, "training": JOINT, "source": SOURCE}


class Models(BaselineModels):
    """Beside the baselines, MFN models and dense ones."""

    def __init__(self, study: Study) -> None:
        layers = "all" if study.layers is None else list(study.layers)
        size = {"layers": layers, "num_features": study.num_features, "k": K}
        super().__init__(study.base, study.rows, size, EPOCHS + 1, cache_folder() / "predictions" / study.name)
        self.study = study

    def mfn(self, seed: int, domain: str | None = None, kind: str = "mfn", **changes: Any) -> MFNForCausalLM:
        rows = self.rows(domain, seed)

        def train() -> MFNForCausalLM:
            torch.manual_seed(seed)
            calibration = {"input_ids": torch.tensor(rows[:16]["input_ids"])}
            model = MFNForCausalLM.from_base(
                self.base, calibration=calibration, base_kwargs={"dtype": torch.float32}, **self.size
            )
            learn_from_cache(model, rows, EPOCHS, seed)
            settings = small_models.training_settings(rows, BATCH, seed) | JOINT
            settings |= {"learning_rate": self.study.learning_rate} | changes
            arguments = MFNTrainingArguments(output_dir=str(self.folder / "training"), **settings)
            MFNTrainer(model, arguments, train_dataset=rows).train()
            return model

        made_from = JOINT | changes | {"epochs": EPOCHS, "rate": self.study.learning_rate, "text": digest_of_rows(rows)}
        return self.kept(f"{kind}-{domain or 'all'}-seed-{seed}", made_from, train)

    def dense(self, seed: int, domain: str) -> PreTrainedModel:
        """The base model, trained on for as long with the same learning rate and warm-up."""
        rows = self.rows(domain, seed)
        settings = CONTINUE | {"learning_rate": self.study.learning_rate, "warmup_steps": JOINT["warmup_steps"]}

        def train() -> PreTrainedModel:
            model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
            small_models.train_dense(model, rows, self.folder / "training", BATCH, seed, **settings)
            return model

        return self.kept(f"dense-{domain}-seed-{seed}", settings | {"text": digest_of_rows(rows)}, train)


def run(study: Study, predictions: list[str], threads: int) -> None:
    """Trains what is not there yet, and measures."""
    torch.set_num_threads(threads)
    models, tokenizer, seeds = Models(study), study.tokenizer, range(study.seeds)
    transfers = {}
    if "P5" in predictions:
        of_source = [models.mfn(seed, SOURCE) for seed in seeds], [models.dense(seed, SOURCE) for seed in seeds]
        transfers = models.transfers(SOURCE, [domain for domain in corpora.DOMAINS if domain != SOURCE], *of_source)
    evidence = Evidence(
        subjects={
            MFN: [models.mfn(seed) for seed in seeds],
            NO_RATE_LOSS: [models.mfn(0, kind="no-rate", lambda_rate=0.0)],
            **models.subjects(study.seeds),
        },
        held_out={domain: study.data.fresh(domain, study.held_out_tokens) for domain in corpora.DOMAINS},
        choosing=study.data.sample(study.held_out_tokens, after=study.skip + study.seeds * study.tokens),
        tokenizer=tokenizer,
        groups={
            "concepts": concepts.concepts(),
            "polarity": word_lists.polarity(),
            "part of speech": word_lists.parts_of_speech(),
        },
        transfers=transfers,
        base=AutoModelForCausalLM.from_pretrained(study.base),
    )
    settings = study.settings() | {"base_weights": models.base_digest}
    measure_predictions(evidence, predictions, settings, RESULTS / study.name)


def small(family: str, seeds: int) -> Study:
    return Study(
        name=family,
        base=small_models.base_folder(family, 0, BASE_TOKENS),
        window=small_models.WINDOW,
        layers=None,
        num_features=8 * small_models.HIDDEN,
        tokens=SHORT_TOKENS,
        held_out_tokens=16_384,
        learning_rate=CONTINUE["learning_rate"],
        seeds=seeds,
        skip=BASE_TOKENS,
    )


def run_family(family: str, seeds: int, predictions: list[str], threads: int) -> None:
    torch.set_num_threads(threads)  # also for the base model, if that has to be trained first
    run(small(family, seeds), predictions, threads)


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
    if base is not None:
        config = AutoConfig.from_pretrained(base)
        study = Study(
            name=name,
            base=base,
            window=window,
            layers=tuple(layers) if layers else None,
            num_features=expansion_factor * config.hidden_size,
            tokens=tokens,
            held_out_tokens=16_384,
            learning_rate=learning_rate,
            seeds=seeds,
        )
        run(study, chosen, threads)
        return
    families = family or list(small_models.FAMILIES)
    # what both processes would otherwise make at once
    small_models.data(), concepts.concepts(), word_lists.polarity()
    with ProcessPoolExecutor(len(families), multiprocessing.get_context("spawn")) as processes:
        for done in [processes.submit(run_family, each, seeds, chosen, threads) for each in families]:
            done.result()


if __name__ == "__main__":
    typer.run(main)
