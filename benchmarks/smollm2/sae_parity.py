"""Post-hoc SAEs of this project and of EleutherAI's sparsify, compared on the same activations.

TopK autoencoders for all blocks of the small Llama (m = 8 d, k = 32) learn from cached residual streams, standardised
per token. All of them see the same streams in the same order. SAEs of `modeling_mfn.evaluation.baselines` are compared
with SAEs of sparsify's own trainer, with Adam and with signum, its default.

Each method tries some learning rates on the first quarter of the training. The rate that explains most variance of
validation text is used for the whole training. Results are on held-out text.

    python -m benchmarks.smollm2.sae_parity

writes benchmarks/results/sae_parity.json.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset, concatenate_datasets

from benchmarks.common import corpora, records, small_models
from benchmarks.smollm2 import sparsify_baseline
from benchmarks.smollm2.splicing import reconstruction_figures
from modeling_mfn import MFNForCausalLM
from modeling_mfn.evaluation.baselines.saes import random_sae, train_sae, training_order
from modeling_mfn.training.activation_cache import ActivationCache

RESULTS = records.RESULTS
BASE_TOKENS, VALIDATION_TOKENS, HELD_OUT_TOKENS = 4_014_080, 24_576, 16_384
SWEEP = 4
"""Learning rates are tried on 1 / `SWEEP` of the training."""
BATCH, K, EXPANSION = 16, 32, 8
RATES = (5e-3, 1e-2, 2e-2)
SIGNUM_SHARES = (1 / 4, 1 / 2, 1)
"""Shares of sparsify's default learning rate, for signum, its default optimizer."""
KEEP_ALIVE = {"auxk_alpha": 1 / 32, "dead_feature_threshold": 20_000}
"""sparsify's settings against dead features."""
Train = Callable[[MFNForCausalLM, ActivationCache, Sequence[int], float], None]


def train_ours(sae: MFNForCausalLM, cache: ActivationCache, rows: Sequence[int], rate: float, seed: int) -> None:
    """Trains with this project's trainer."""
    train_sae(sae, cache, rows, learning_rate=rate, batch_size=BATCH, seed=seed)


def train_sparsify(
    sae: MFNForCausalLM, cache: ActivationCache, rows: Sequence[int], rate: float, seed: int, optimizer: str
) -> None:
    """Trains with sparsify's trainer."""
    settings: dict[str, Any] = {"optimizer": optimizer, "lr": rate, "init_seeds": [seed], **KEEP_ALIVE}
    settings |= {"batch_size": BATCH, "lr_warmup_steps": len(rows) // BATCH // 20}
    with tempfile.TemporaryDirectory() as folder:
        sparsify_baseline.train(sae, cache, rows, Path(folder), **settings)


def texts(tokens: int, seed: int) -> dict[str, Dataset]:
    """Windows to train, validate and test on, with an equal share of each domain.

    The base model was not trained on any of these windows.
    """
    data = small_models.data()
    held_out = [data.evaluation(domain, HELD_OUT_TOKENS) for domain in corpora.DOMAINS]
    return {
        "train": data.sample(tokens, after=BASE_TOKENS, seed=seed),
        "validation": data.sample(VALIDATION_TOKENS, after=BASE_TOKENS + tokens, seed=seed),
        "held_out": concatenate_datasets(held_out),
    }


def explained_variance(sae: MFNForCausalLM, cache: ActivationCache) -> dict[str, Any]:
    """Explained variance of the standardised residual streams over all tokens, and dead features, by layer."""
    found = {}
    for place, (number, layer) in enumerate(sae.mfn_layers.items()):
        h = torch.stack([cache[row]["residuals"][place] for row in range(len(cache))]).float()
        found[f"layer_{number}"] = reconstruction_figures(layer, h)
    names = {"explained_variance": "explained_variance_standardised", "dead_share": "dead_share"}
    return {
        name: {layer: round(figures[of], 4) for layer, figures in found.items()}
        | {"mean": round(sum(figures[of] for figures in found.values()) / len(found), 4)}
        for name, of in names.items()
    }


def fit(
    start: Callable[[], MFNForCausalLM],
    train: Train,
    rates: Sequence[float],
    caches: dict[str, ActivationCache],
    order: list[int],
) -> dict[str, Any]:
    """Tries each learning rate on a part of the training, then trains on all of it with the best one."""
    short = order[: max(BATCH, len(order) // SWEEP // BATCH * BATCH)]
    tried = {}
    for rate in rates:
        sae = start()
        train(sae, caches["train"], short, rate)
        tried[rate] = explained_variance(sae, caches["validation"])["explained_variance"]["mean"]
        print(rate, tried[rate], flush=True)
    best = max(tried, key=tried.__getitem__)
    sae, begun = start(), time.process_time()
    train(sae, caches["train"], order, best)
    seconds = round(time.process_time() - begun)
    tokens = len(short) * small_models.WINDOW
    record = {"sweep": {"tokens": tokens, "tried": tried}, "learning_rate": best, "processor_seconds": seconds}
    return record | explained_variance(sae, caches["held_out"])


def main(
    family: Annotated[str, typer.Option(help="Family of the base model: llama or gpt2.")] = "llama",
    tokens: Annotated[int, typer.Option(help="Tokens to cache and train on.")] = 307_200,
    epochs: Annotated[int, typer.Option(help="Epochs of training from the cache.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of text, initial weights and order.")] = 0,
    threads: Annotated[int, typer.Option(help="Number of threads.")] = 1,
) -> None:
    """Trains all methods and writes the results."""
    torch.set_num_threads(threads)
    base, windows = small_models.base_folder(family, 0, BASE_TOKENS), texts(tokens, seed)
    start = partial(random_sae, base, windows["train"], num_features=EXPANSION * small_models.HIDDEN, k=K, seed=seed)
    order = training_order(len(windows["train"]), epochs, BATCH, seed)
    default = 5e-3 / (EXPANSION * small_models.HIDDEN / 2**14) ** 0.5  # as in sparsify's trainer
    methods: dict[str, tuple[Train, Sequence[float]]] = {
        "modeling_mfn": (partial(train_ours, seed=seed), RATES),
        "sparsify, adam": (partial(train_sparsify, seed=seed, optimizer="adam"), RATES),
        "sparsify, signum": (
            partial(train_sparsify, seed=seed, optimizer="signum"),
            [round(share * default, 6) for share in SIGNUM_SHARES],
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        caches = {part: ActivationCache.write(start(), rows, Path(folder) / part) for part, rows in windows.items()}
        found = {name: fit(start, train, rates, caches, order) for name, (train, rates) in methods.items()}
    best = max(record["explained_variance"]["mean"] for name, record in found.items() if name != "modeling_mfn")
    record = {
        "command": records.command_line("smollm2.sae_parity"),
        "settings": {"family": family, "tokens": tokens, "epochs": epochs, "seed": seed, "k": K, "batch": BATCH}
        | {"num_features": EXPANSION * small_models.HIDDEN, "input_norm": "layer", "sparsify": KEEP_ALIVE},
        "versions": {name: version(name) for name in ("torch", "eai-sparsify")},
        "methods": found,
        "ours_less_best_of_sparsify": round(found["modeling_mfn"]["explained_variance"]["mean"] - best, 4),
    }
    records.write_record(RESULTS / "sae_parity.json", record)


if __name__ == "__main__":
    typer.run(main)
