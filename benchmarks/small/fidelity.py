"""Perplexity of small models with MFN layers in all blocks, compared with dense models.

Small models of both families are trained on three domains. Training then continues for the same number of tokens and
at the same learning rate, once dense and once with MFN layers. Each run is evaluated on held-out text of each domain.

    python -m benchmarks.small.fidelity                             # all runs without a result: many hours
    python -m benchmarks.small.fidelity --only 'llama/main/*'       # runs whose names match
    python -m benchmarks.small.fidelity --list

A run writes benchmarks/results/fidelity/<name>.json and skips itself if this file exists. Its model goes to
fidelity/<name> in the cache folder (`MFN_CACHE`).
"""

from __future__ import annotations

import fnmatch
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from benchmarks.common import corpora, records, small_models
from modeling_mfn import MFNForCausalLM, MFNTrainer, MFNTrainingArguments
from modeling_mfn.demo.assets import cache_folder
from modeling_mfn.evaluation.measures.perplexity import perplexity
from modeling_mfn.model.conversion import CONVERSION_SETTINGS
from modeling_mfn.training.activation_cache import ActivationCache, CachedResiduals
from modeling_mfn.training.feature_sums import FeatureSums, kept_features
from modeling_mfn.training.measurements import layer_figures

RESULTS = records.RESULTS / "fidelity"
BASE_TOKENS, MAIN_TOKENS, SHORT_TOKENS = 4_014_080, 1_638_400, 307_200
BATCH, K = 4, 32
SIZE = {"expansion_factor": 8, "k": K, "codes": "stream"}
CONTINUE = {"learning_rate": 1e-3, "lr_scheduler_type": "linear"}
RECIPE = {"mfn_learning_rate": 4e-3, "lambda_recon": 10.0, "alpha_anneal": 0.5}
WEIGHTS = {"lambda_rate": 2.5e-3, "lambda_comp": 0.25, "lambda_stab": 0.25}
"""Weights of the three losses that the run `recon-util` (`RECIPE` alone) leaves out."""
FROM_CACHE: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "learning_rate": 8e-3,
    "lr_scheduler_type": "linear",
    "lambda_util": 0.0,
    "alpha_end": 0.0,
    "trainable": "mfn",
}
"""Training arguments of MFN layers that learn on their own from cached activations."""
RHO = K / (8 * small_models.HIDDEN)

LOSSES: dict[str, dict[str, Any]] = {
    "five": WEIGHTS,
    **{f"with-{name[7:]}": {name: weight} for name, weight in WEIGHTS.items()},
    **{f"five-without-{name[7:]}": WEIGHTS | {name: 0.0} for name in (*WEIGHTS, "lambda_recon", "lambda_util")},
}
SWEEP: dict[str, dict[str, Any]] = {
    **{f"k-{k}": {"k": k} for k in (8, 16, 64, 128)},
    **{f"alpha-{alpha}": {"alpha_end": alpha} for alpha in (0.5, 0.75, 0.9)},
    **{f"recon-{weight:g}": {"lambda_recon": weight} for weight in (0.25, 2.5, 50.0)},
    **{f"{name[7:]}-x{times:g}": {name: times * WEIGHTS[name]} for name in WEIGHTS for times in (0.1, 10.0)},
    **{f"rho-x{times:g}": {"rho": times * RHO, "lambda_rate": WEIGHTS["lambda_rate"]} for times in (0.5, 2.0)},
}
CACHE_FIRST: dict[str, Any] = {
    "cached_epochs": 5,
    "alpha_anneal": 0.25,
    # the weights are trained, but the optimizer starts without moments
    "mfn_learning_rate": 2e-3,
    "warmup_steps": 100,
}
RECIPES: dict[str, dict[str, Any]] = {
    "distilled": {"teacher": "dense"},
    "recon-into-backbone": {"stop_gradient": False},
    "alpha-in-a-quarter": {"alpha_anneal": 0.25},
    "warmup": {"mfn_warmup": 0.1, "alpha_anneal": 0.3},
    "k-from-128": {"k_start": 128, "k_end": K, "alpha_anneal": 0.25},
    "one-learning-rate": {"mfn_learning_rate": None},
    "higher-mfn-learning-rate": {"mfn_learning_rate": 1e-2},
    "higher-learning-rates": {"learning_rate": 2e-3, "mfn_learning_rate": 8e-3},
    "cache-first-gently": CACHE_FIRST,
    "cache-first-abruptly": CACHE_FIRST | {"mfn_learning_rate": 4e-3, "warmup_steps": 0},
    "cache-first-20-epochs": CACHE_FIRST | {"cached_epochs": 20},
    "cache-first-distilled": CACHE_FIRST | {"teacher": "dense"},
    "no-aux": {"lambda_aux": 0.0},
    "dead-start-again": {"reinit_dead_every": 100},
}
"""Differences from `RECIPE`, on the short budget."""
GPT2_RECIPES: dict[str, dict[str, Any]] = {
    name: CACHE_FIRST | {"teacher": "dense"} | changes
    for name, changes in {
        "cache-first-distilled": {},
        "dead-start-again": {"reinit_dead_every": 100},
        "lower-mfn-learning-rate": {"mfn_learning_rate": 1e-3},
        "higher-mfn-learning-rate": {"mfn_learning_rate": 4e-3},
        "k-128": {"k": 128},
    }.items()
}
"""Remedies for features that die in the upper blocks of GPT-2."""
DISTILLED: dict[str, Any] = CACHE_FIRST | {"teacher": "dense"}
UPDATE: dict[str, Any] = DISTILLED | {"codes": "update"}
REFINED: dict[str, Any] = UPDATE | {"refine_steps": 2}
PURSUIT: dict[str, Any] = UPDATE | {"coding_rounds": 4, "refine_steps": 1}
FROM_DENSE: dict[str, Any] = {"start": "dense", "learning_rate": 3e-4}
CODING: dict[str, dict[str, Any]] = {
    "update": UPDATE,
    "update-refined": REFINED,
    "stream": DISTILLED,
    "update-streams": UPDATE | {"lambda_streams": 1.0},
    "update-20-epochs": UPDATE | {"cached_epochs": 20},
    "update-32-d": UPDATE | {"expansion_factor": 32},
    **{f"update-recon-{weight:g}": UPDATE | {"lambda_recon": weight} for weight in (0.1, 0.5, 2.5)},
    "update-from-dense": UPDATE | FROM_DENSE,
    **{f"pursuit-{rounds}": PURSUIT | {"coding_rounds": rounds} for rounds in (2, 4, 8)},
    "pursuit-4-stream": PURSUIT | {"codes": "stream"},
    "pursuit-4-k-16": PURSUIT | {"k": 16},
    "pursuit-4-from-dense": PURSUIT | FROM_DENSE,
    "pursuit-8-from-dense": PURSUIT | FROM_DENSE | {"coding_rounds": 8},
    "pursuit-8-from-dense-streams": PURSUIT | FROM_DENSE | {"coding_rounds": 8, "lambda_streams": 1.0},
    "update-k-16": UPDATE | {"k": 16},
    "update-refined-k-16": REFINED | {"k": 16},
    "stream-refined": DISTILLED | {"refine_steps": 2},
    "update-refined-once": UPDATE | {"refine_steps": 1},
}
"""What the MFN layers code, and how, on the short budget."""
CODING_LONG: dict[str, dict[str, Any]] = {
    **{name: CODING[name] for name in ("update", "pursuit-4", "pursuit-4-from-dense", "pursuit-8-from-dense-streams")},
    **{f"{name}-k-16": CODING[name] | {"k": 16} for name in ("update", "pursuit-4-from-dense")},
}
"""The same on the long budget."""
OTHER_MACHINE = ("pursuit-4-from-dense-k-16",)
"""Runs of `CODING_LONG` that GPT-2 has in a group of their own, next to a dense model of the same machine."""
NOISE: dict[str, dict[str, Any]] = {
    f"{name}-seed-{seed}": settings | {"seed": seed}
    for seed in (1, 2)
    for name, settings in {"recon-util": {}, "five": WEIGHTS}.items()
}
"""Repetitions with another seed. The seed sets the order of the text and the initial MFN weights."""
MAIN: dict[str, dict[str, Any]] = {
    "recon-util": {},
    "cache-first": CACHE_FIRST,
    "cache-first-distilled": CACHE_FIRST | {"teacher": "dense"},
    "cache-first-distilled-five": CACHE_FIRST | {"teacher": "dense"} | WEIGHTS,
    "cache-first-distilled-k-128": CACHE_FIRST | {"teacher": "dense", "k": 128},
}
Run = Callable[[], dict[str, Any]]


def continuation(tokens: int, seed: int) -> Dataset:
    """Windows that every run continues on. The base model was not trained on these windows."""
    return small_models.data().sample(tokens, after=BASE_TOKENS, seed=seed)


def perplexities(model: Any) -> dict[str, float]:
    """Held-out perplexity by domain."""
    data = small_models.data()
    return {domain: round(perplexity(model, data.evaluation(domain), 16), 3) for domain in corpora.DOMAINS}


def dense_folder(family: str, tokens: int, seed: int) -> Path:
    """Folder of the base model after its dense continuation. A missing model is trained."""
    folder = cache_folder() / f"{family}-dense-{tokens}-tokens-seed-{seed}"
    if not folder.exists():
        model = AutoModelForCausalLM.from_pretrained(small_models.base_folder(family, 0, BASE_TOKENS))
        rows = continuation(tokens, seed)
        small_models.train_dense(model, rows, folder.with_suffix(".training"), BATCH, seed, **CONTINUE)
        model.save_pretrained(folder)
    return folder


def run_dense(family: str, tokens: int, seed: int = 0) -> dict[str, Any]:
    """Record of a dense continuation."""
    before, after = (
        perplexities(AutoModelForCausalLM.from_pretrained(folder))
        for folder in (small_models.base_folder(family, 0, BASE_TOKENS), dense_folder(family, tokens, seed))
    )
    settings = CONTINUE | {"seed": seed, "tokens": tokens}
    return {"settings": settings, "base_perplexity": before, "perplexity": after}


def run_mfn(
    folder: Path,
    family: str,
    tokens: int,
    seed: int = 0,
    start: Literal["base", "dense"] = "base",
    teacher: Literal["dense"] | None = None,
    cached_epochs: int = 0,
    by_layer: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Record of a continuation with MFN layers in all blocks, trained to alpha = 1 with the backbone.

    Args:
        folder: folder for the trained model.
        family: family of the base model.
        tokens: number of training tokens.
        seed: seed of the order of the text and of the initial MFN weights.
        start: model that gets MFN layers: the base, or the dense model of the same tokens. Its backbone then sees these
            tokens twice.
        teacher: `"dense"` makes the distribution of the dense model of the same tokens the target.
        cached_epochs: epochs in which MFN layers first learn on their own from the first tokens of the same text.
        by_layer: True to measure also with each MFN layer left out.
        settings: fields of `MFNConfig`, which take precedence over `SIZE`, and of `MFNTrainingArguments`, which take
            precedence over `RECIPE`.
    """
    size = SIZE | {name: settings.pop(name) for name in sorted(CONVERSION_SETTINGS & settings.keys())}
    rows = continuation(tokens, seed)
    calibration = {"input_ids": torch.tensor(rows[:16]["input_ids"])}
    torch.manual_seed(seed)
    base = small_models.base_folder(family, 0, BASE_TOKENS) if start == "base" else dense_folder(family, tokens, seed)
    model = MFNForCausalLM.from_base(base, calibration=calibration, **size)
    common = small_models.training_settings(rows, BATCH, seed) | CONTINUE | RECIPE
    told = {"start": start, "seed": seed, "tokens": tokens}
    chosen, base_model = CONTINUE | RECIPE | settings | size | told, None
    if cached_epochs:
        chosen["cached_epochs"] = cached_epochs
        first = rows.select(range(min(len(rows), SHORT_TOKENS // small_models.WINDOW)))
        learn_from_cache(model, first, cached_epochs, seed)
    if teacher:
        base_model = AutoModelForCausalLM.from_pretrained(dense_folder(family, tokens, seed))
        chosen["teacher"], settings["util_target"] = teacher, "kl"
    arguments = MFNTrainingArguments(output_dir=str(cache_folder() / "training"), **(common | settings))
    trainer = MFNTrainer(model, arguments, base_model=base_model, train_dataset=rows)
    trainer.train()
    model.save_pretrained(folder)
    record = {
        "settings": chosen,
        "perplexity": perplexities(model),
        "features": feature_figures(model),
        "last_log": trainer.state.log_history[-2],
    }
    if by_layer:
        record["perplexity_without"] = {
            f"layer_{number}": perplexities_without(model, number) for number in model.mfn_layers
        }
    model.set_blend(0.0)  # the trained backbone without the features' error
    return record | {"perplexity_at_alpha_0": perplexities(model)}


def learn_from_cache(
    model: MFNForCausalLM,
    rows: Dataset,
    epochs: int,
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
    trainer: type[MFNTrainer] = MFNTrainer,
    **settings: Any,
) -> None:
    """Trains the MFN layers alone, on residual streams that the backbone computes once.

    `settings` take precedence over `FROM_CACHE`.
    """
    batch = FROM_CACHE["per_device_train_batch_size"]
    settings = small_models.training_settings(rows, batch, seed) | FROM_CACHE | settings
    settings["max_steps"] = epochs * len(rows) // batch
    arguments = MFNTrainingArguments(output_dir=str(cache_folder() / "training"), **settings)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        cache = ActivationCache.write(model, rows, folder)
        trainer(CachedResiduals(model), arguments, train_dataset=cache, callbacks=[*callbacks]).train()


def perplexities_without(model: MFNForCausalLM, number: int) -> dict[str, float]:
    """Perplexities with one MFN layer left out: its block reads the residual stream."""
    read_the_stream = model.mfn_layers[number].register_forward_hook(lambda layer, arguments, output: arguments[0])
    try:
        return perplexities(model)
    finally:
        read_the_stream.remove()


@torch.no_grad()
def feature_figures(model: MFNForCausalLM) -> dict[str, Any]:
    """Statistics of the features on held-out text. `dead_share` counts features that are silent on all of it."""
    data = small_models.data()
    sums = FeatureSums.zero(model.config, "cpu")
    for domain in corpora.DOMAINS:
        for rows in torch.tensor(data.evaluation(domain)["input_ids"]).split(16):
            items = model(input_ids=rows, output_reconstructions=True, logits_to_keep=1).reconstructions
            sums += FeatureSums.of(model.mfn_layers, items, torch.ones_like(rows))
    return {
        f"layer_{layer}": {name: round(value, 5) for name, value in found.items()}
        for layer, found in zip(model.config.layers, layer_figures(sums, kept_features(model.config)), strict=True)
    }


def runs() -> dict[str, Run]:
    """Name -> run. The short runs come first. The recipe was chosen by the short runs of the Llama."""
    table: dict[str, Run] = {}
    groups: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
        "llama": {"losses": LOSSES, "sweep": SWEEP, "recipe": RECIPES, "noise": NOISE, "coding": CODING},
        "gpt2": {"losses": LOSSES, "recipe": GPT2_RECIPES, "coding": CODING},
    }

    def add(family: str, group: str, changes: dict[str, dict[str, Any]], tokens: int, **more: Any) -> None:
        for name, settings in changes.items():
            folder = cache_folder() / "fidelity" / family / group / name
            table[f"{family}/{group}/{name}"] = partial(run_mfn, folder, family, tokens, **more, **settings)

    for family in small_models.FAMILIES:
        table[f"{family}/short/dense"] = partial(run_dense, family, SHORT_TOKENS)
        add(family, "short", {"recon-util": {}}, SHORT_TOKENS)
        table[f"{family}/coding/dense"] = partial(run_dense, family, SHORT_TOKENS)
        for group, changes in groups[family].items():
            add(family, group, changes, SHORT_TOKENS)
    for family in small_models.FAMILIES:
        long = {"main": MAIN, "coding-long": CODING_LONG}
        if family == "gpt2":
            apart = {name: CODING_LONG[name] for name in OTHER_MACHINE}
            rest = {name: of for name, of in CODING_LONG.items() if name not in apart}
            long |= {"coding-long": rest, "coding-long-k-16": apart}
        for group, changes in long.items():
            table[f"{family}/{group}/dense"] = partial(run_dense, family, MAIN_TOKENS)
            add(family, group, changes, MAIN_TOKENS, **({"by_layer": True} if group == "main" else {}))
    return table


def main(
    only: Annotated[str, typer.Option(help="Pattern that the names of runs must match.")] = "*",
    threads: Annotated[int, typer.Option(help="Number of threads.")] = 2,
    names: Annotated[bool, typer.Option("--list", help="List the runs without a result and exit.")] = False,
) -> None:
    """Trains and measures all runs that have no result yet."""
    torch.set_num_threads(threads)
    for name, run in runs().items():
        file = RESULTS / f"{name}.json"
        if not fnmatch.fnmatch(name, only) or file.exists():
            continue
        print(name, flush=True)
        if names:
            continue
        begun = time.time()
        record = {
            "command": f"python -m benchmarks.small.fidelity --only {shlex.quote(name)}",
            "commit": records.COMMIT,
        } | run()
        record["minutes"] = round((time.time() - begun) / 60, 1)
        records.write_record(file, record)


if __name__ == "__main__":
    typer.run(main)
