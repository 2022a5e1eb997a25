"""How close a model that reads through features alone comes to its dense self.

Small models of both families are trained on three domains; then each goes on for the same number of tokens, dense and
with MFN layers in all blocks, at the same learning rate. Every run is evaluated on held-out text of each domain.

    python benchmarks/fidelity.py                             # every run that has no result yet: many hours
    python benchmarks/fidelity.py --only 'llama/main/*'       # those whose names match
    python benchmarks/fidelity.py --list

Each run writes benchmarks/results/fidelity/<name>.json; a run that has its file is left out.
"""

from __future__ import annotations

import fnmatch
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import corpora
import small_models
import torch
import typer
from datasets import Dataset
from transformers import AutoModelForCausalLM

from modeling_mfn import MFNForCausalLM, MFNTrainer, MFNTrainingArguments
from modeling_mfn.demo_assets import cache_folder
from modeling_mfn.evaluation.perplexity import perplexity
from modeling_mfn.feature_statistics import FeatureStatistics

RESULTS = Path(__file__).parent / "results" / "fidelity"
BASE_TOKENS, MAIN_TOKENS, SHORT_TOKENS = 4_014_080, 1_228_800, 307_200
BATCH = 4
CONTINUE = {"learning_rate": 1e-3, "lr_scheduler_type": "linear"}
RECIPE = {"mfn_learning_rate": 4e-3, "lambda_recon": 40.0}
FIVE = {"lambda_rate": 1e-2, "lambda_comp": 1.0, "lambda_stab": 1.0}
SHORT: dict[str, dict[str, Any]] = {
    "recon-1": {"lambda_recon": 1.0},
    "recon-10": {"lambda_recon": 10.0},
    "recon-40": {},
    "recon-200": {"lambda_recon": 200.0},
    "alpha-quarter": {"alpha_anneal": 0.25},
    "warmup": {"mfn_warmup": 0.1, "alpha_anneal": 0.3},
    "one-learning-rate": {"mfn_learning_rate": None},
    "gradient-into-backbone": {"stop_gradient": False},
    "k-from-128": {"k_start": 128, "k_end": 32, "alpha_anneal": 0.25},
    "no-aux": {"lambda_aux": 0.0},
    "aux-full": {"lambda_aux": RECIPE["lambda_recon"] / 32},
    "five": FIVE,
}
"""Recipes tried on a short budget, each a difference from `RECIPE`."""
Run = Callable[[], dict[str, Any]]


def continuation(tokens: int, seed: int) -> Dataset:
    """What every run goes on with: windows that the base model was not trained on."""
    return small_models.data().sample(tokens, after=BASE_TOKENS, seed=seed)


def perplexities(model: Any) -> dict[str, float]:
    data = small_models.data()
    return {domain: round(perplexity(model, data.evaluation(domain), 16), 3) for domain in corpora.DOMAINS}


def dense(family: str, tokens: int, seed: int = 0) -> dict[str, Any]:
    base = small_models.base_folder(family, 0, BASE_TOKENS)
    model = AutoModelForCausalLM.from_pretrained(base)
    before = perplexities(model)
    rows = continuation(tokens, seed)
    small_models.train_dense(model, rows, cache_folder() / "training", BATCH, seed, **CONTINUE)
    settings = CONTINUE | {"seed": seed, "tokens": tokens}
    return {"settings": settings, "base_perplexity": before, "perplexity": perplexities(model)}


def mfn(family: str, tokens: int, seed: int = 0, k: int = 32, **settings: Any) -> dict[str, Any]:
    """MFN layers in all blocks, m = 8 d, trained to alpha = 1 together with everything else."""
    rows = continuation(tokens, seed)
    calibration = {"input_ids": torch.tensor(rows[:16]["input_ids"])}
    torch.manual_seed(seed)
    base = small_models.base_folder(family, 0, BASE_TOKENS)
    model = MFNForCausalLM.from_base(base, expansion_factor=8, k=k, calibration=calibration)
    common = small_models.training_settings(rows, BATCH, seed) | CONTINUE | RECIPE
    arguments = MFNTrainingArguments(output_dir=str(cache_folder() / "training"), **(common | settings))
    trainer = MFNTrainer(model, arguments, train_dataset=rows)
    trainer.train()
    return {
        "settings": CONTINUE | RECIPE | settings | {"k": k, "seed": seed, "tokens": tokens},
        "perplexity": perplexities(model),
        "features": feature_figures(model),
        "last_log": trainer.state.log_history[-2],
    }


@torch.no_grad()
def feature_figures(model: MFNForCausalLM) -> dict[str, Any]:
    """What the features do on held-out text; `dead_share` is of those that are silent on all of it."""
    data = small_models.data()
    tokens = len(corpora.DOMAINS) * 32_768
    figures: dict[str, Any] = {}
    config = model.config
    statistics = FeatureStatistics(config.layers, config.num_features, config.hidden_size, 0.0, tokens)
    for domain in corpora.DOMAINS:
        for rows in torch.tensor(data.evaluation(domain)["input_ids"]).split(16):
            items = model(input_ids=rows, output_reconstructions=True, logits_to_keep=1).reconstructions
            statistics.count(model.mfn_layers, items, None)
    statistics.step()
    for layer, found in statistics.take().items():
        figures[f"layer_{layer}"] = {name: round(value, 5) for name, value in found.items()}
    return figures


def runs() -> dict[str, Run]:
    table: dict[str, Run] = {}
    for family in small_models.FAMILIES:
        for name, tokens in (("main", MAIN_TOKENS), ("short", SHORT_TOKENS)):
            table[f"{family}/{name}/dense"] = lambda family=family, tokens=tokens: dense(family, tokens)
        for name, settings in {"recon-util": {}, "five": FIVE}.items():
            table[f"{family}/main/{name}"] = lambda f=family, s=settings: mfn(f, MAIN_TOKENS, **s)
        for name, settings in SHORT.items():
            table[f"{family}/short/{name}"] = lambda f=family, s=settings: mfn(f, SHORT_TOKENS, **s)
    return table


def main(
    only: Annotated[str, typer.Option(help="Pattern of the names of runs.")] = "*",
    threads: Annotated[int, typer.Option(help="Threads of this process.")] = 2,
    names: Annotated[bool, typer.Option("--list", help="Show the runs instead.")] = False,
) -> None:
    torch.set_num_threads(threads)
    for name, run in runs().items():
        file = RESULTS / f"{name}.json"
        if not fnmatch.fnmatch(name, only) or file.exists():
            continue
        print(name, flush=True)
        if names:
            continue
        begun = time.time()
        record = {"command": f"python benchmarks/fidelity.py --only {shlex.quote(name)}"} | run()
        record["minutes"] = round((time.time() - begun) / 60, 1)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
