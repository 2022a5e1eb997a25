"""Next-token loss of a real checkpoint read through features, compared with post-hoc TopK autoencoders.

SmolLM2-135M (4-bit weights, made float32) gets MFN layers in four blocks. They learn from cached residual streams.
Autoencoders of EleutherAI's sparsify, of the same size, learn from the same tokens in the same order. The MFN layers
then continue with the model's own loss (`joint`).

Each method replaces the residual stream of one block, or of all four, in the frozen model. Losses are measured on
held-out text of three domains. Zeros and the mean in place of the residual stream give the scale.

    python -m benchmarks.smollm2.real_checkpoint                       # all stages without a result: many hours
    python -m benchmarks.smollm2.real_checkpoint --only 'evaluate/*'   # stages whose names match
    python -m benchmarks.smollm2.real_checkpoint --name trial --train-tokens 6000 --joint-tokens 3072

A stage writes benchmarks/results/<name>/<stage>.json. Caches and models go to the cache folder (`MFN_CACHE`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils.data import Subset

from benchmarks.common import corpora, records
from benchmarks.smollm2 import sparsify_baseline
from benchmarks.smollm2.splicing import (
    Replacement,
    constant,
    next_token_losses,
    reconstruction_figures,
    recovered,
    spliced,
    through,
)
from benchmarks.smollm2.stages import CheckpointStudy, Rows, Trained
from modeling_mfn import MFNForCausalLM, MFNTrainer
from modeling_mfn.demo.assets import cache_folder, smollm2
from modeling_mfn.training.activation_cache import ActivationCache, CachedResiduals

LIKE_SMALL_MODELS = {"adam_beta2": 0.99, "lr_scheduler_type": "linear"}
MFN_SETTINGS = [
    *({"learning_rate": rate} for rate in (4e-3, 6e-3)),
    *({"learning_rate": rate} | LIKE_SMALL_MODELS for rate in (4e-3, 8e-3)),
]
KEEP_ALIVE = {"rate_window": 20_000, "reinit_dead_every": 10}
"""Settings against dead features."""
JOINT_RATES = [{"learning_rate": rate} for rate in (6e-4, 1.2e-3)]
ADAM_RATES = (2e-3, 4e-3, 6e-3, 1e-2)
SIGNUM_SHARES = (1 / 4, 1)
"""Shares of sparsify's default learning rate, for signum, its default optimizer."""
JOINT_BATCH = 4
ABLATIONS = ("zero", "mean")
TRAINED = ("features", "joint", "sae-raw", "sae-standardised")
POSITIONS = ("all_positions", "without_first")
"""Positions that are replaced. The first token of a window has an unusual residual stream and may be left alone."""


def cache(study: CheckpointStudy) -> dict[str, Any]:
    """Stage: caches residual streams of training and held-out text."""
    # MFN layers only mark blocks here, so the smallest layers suffice
    model = study.convert(num_features=1, k=1)
    figures: dict[str, Any] = {}
    for part in ("train", "held_out"):
        rows, begun = corpora.as_data_set(study.windows[part].numpy()), time.time()
        written = ActivationCache.write(model, rows, study.folder / "cache" / part)
        figures["dtype"] = str(written[0]["residuals"].dtype).removeprefix("torch.")
        tokens = study.windows[part].numel()
        figures[part] = {"tokens": tokens, "tokens_a_second": round(tokens / (time.time() - begun))}
    norms = torch.stack([written[row]["residuals"].float().norm(dim=-1) for row in range(len(written))])
    figures["norms"] = {
        f"layer_{layer}": {"first_token": round(float(of[:, 0].mean()), 1), "others": round(float(of[:, 1:].mean()), 1)}
        for layer, of in zip(study.layers, norms.unbind(1), strict=True)
    }
    return figures


def features(study: CheckpointStudy) -> dict[str, Any]:
    """Stage: trains MFN layers from the cache."""
    start = study.convert(calibration={"input_ids": study.windows["train"][:16]})
    rows_of = study.cache("train")

    def train(rows: Rows, **settings: Any) -> Trained:
        model = copy.deepcopy(start)
        arguments = study.arguments(rows, study.batch, lambda_util=0.0, alpha_end=0.0, **KEEP_ALIVE, **settings)
        trainer = MFNTrainer(CachedResiduals(model), arguments, train_dataset=Subset(rows_of, rows))
        trainer.train()
        return Trained(model, trainer)

    return study.fit("features", train, MFN_SETTINGS, study.order(), study.batch) | {"living": KEEP_ALIVE}


def sae(
    study: CheckpointStudy, stage: str, input_norm: str, adam: Sequence[float], signum: Sequence[float], **settings: Any
) -> dict[str, Any]:
    """Stage: trains sparsify's autoencoders from the cache.

    Args:
        study: settings and texts.
        stage: name of the stage.
        input_norm: `"none"` for raw residual streams, `"layer"` for standardised ones.
        adam: learning rates to try with Adam.
        signum: shares of the default learning rate to try with signum.
        settings: fields of sparsify's `TrainConfig`.
    """
    start, rows_of = study.convert(input_norm=input_norm), study.cache("train")
    default = 5e-3 / (study.num_features / 2**14) ** 0.5  # as in sparsify's trainer
    rates: list[dict[str, Any]] = [{"optimizer": "adam", "lr": rate} for rate in adam]
    rates += [{"optimizer": "signum", "lr": round(share * default, 6)} for share in signum]

    def train(rows: Rows, **rate: Any) -> Trained:
        model = copy.deepcopy(start)
        warmup = len(rows) // study.batch // 20
        more = rate | settings | {"batch_size": study.batch, "lr_warmup_steps": warmup, "init_seeds": [study.seed]}
        sparsify_baseline.train(model, rows_of, rows, study.folder / "sparsify", **more)
        return Trained(model)

    return study.fit(stage, train, rates, study.order(), study.batch) | {"sparsify": settings}


def joint(study: CheckpointStudy) -> dict[str, Any]:
    """Stage: continues the training of the MFN layers with the model's own loss, at alpha = 1."""
    start = MFNForCausalLM.from_pretrained(study.folder / "features")
    data = corpora.as_data_set(study.windows["joint"].numpy())

    def train(rows: Rows, **settings: Any) -> Trained:
        model = copy.deepcopy(start)
        arguments = study.arguments(rows, JOINT_BATCH, alpha_start=1.0, **settings)
        trainer = MFNTrainer(model, arguments, train_dataset=data.select(rows))
        trainer.train()
        return Trained(model, trainer)

    rows = range(len(data) // JOINT_BATCH * JOINT_BATCH)
    return study.fit("joint", train, JOINT_RATES, rows, JOINT_BATCH)


def evaluate(study: CheckpointStudy, method: str) -> dict[str, Any]:
    """Stage: losses on held-out text with a method in one block, and in all blocks."""
    model, tokens = study.convert(num_features=1, k=1), study.windows["held_out"]
    base = study.base_losses(model)
    figures: dict[str, Any] = {"base_loss": by_domain(base)}
    layers = {} if method in ABLATIONS else MFNForCausalLM.from_pretrained(study.folder / method).mfn_layers
    if layers:
        held_out = study.cache("held_out")
        for place, (number, layer) in enumerate(layers.items()):
            h = torch.stack([held_out[row]["residuals"][place] for row in range(len(held_out))]).float()
            found = reconstruction_figures(layer, h)
            figures[f"layer_{number}"] = {name: round(value, 4) for name, value in found.items()}
    sets = {"all_layers": study.layers} | {f"layer_{number}": (number,) for number in study.layers}
    for positions in POSITIONS:
        keep_first = positions == "without_first"
        replacements = {n: through(layer) for n, layer in layers.items()} or ablation(study, method, keep_first)
        for name, chosen in list(sets.items())[: 1 if keep_first else None]:
            with spliced(model, {number: replacements[number] for number in chosen}, keep_first):
                losses = next_token_losses(model, tokens, description=f"{method}, {name}, {positions}")
            of_windows = (losses - base).mean(1)
            figures.setdefault(positions, {})[name] = {
                "loss": by_domain(losses),
                "delta": by_domain(losses - base),
                "delta_standard_error": round(float(of_windows.std() / len(of_windows) ** 0.5), 4),
            }
    return figures


def ablation(study: CheckpointStudy, method: str, keep_first: bool) -> dict[int, Replacement]:
    """Block -> zeros, or the mean of the replaced positions over training tokens."""
    cached = study.cache("train")
    of_positions = sum(cached[row]["residuals"].double() for row in range(len(cached))) / len(cached)
    means = of_positions[:, int(keep_first) :].mean(1).float()
    if method == "zero":
        means = torch.zeros_like(means)
    return {number: constant(mean) for number, mean in zip(study.layers, means, strict=True)}


def by_domain(losses: Tensor) -> dict[str, float]:
    """Mean loss of each domain and of all, from (rows, T - 1) with the same number of rows per domain."""
    means = dict(
        zip(corpora.DOMAINS, losses.unflatten(0, (len(corpora.DOMAINS), -1)).mean((1, 2)).tolist(), strict=True)
    )
    return {name: round(mean, 4) for name, mean in (means | {"mean": float(losses.mean())}).items()}


def summary(study: CheckpointStudy) -> dict[str, Any]:
    """Stage: positions -> blocks -> method -> loss above the base model, and the share of ablation loss recovered."""
    found = {name: study.result(f"evaluate/{name}") for name in (*ABLATIONS, *TRAINED)}
    base = found["zero"]["base_loss"]
    figures: dict[str, Any] = {"base_loss": base}
    for positions in POSITIONS:
        figures[positions] = {}
        for place in found["zero"][positions]:
            measured = {name: of[positions][place] for name, of in found.items()}
            figures[positions][place] = {
                name: {key: of[key] for key in ("delta", "delta_standard_error")}
                | {
                    f"recovered_of_{ablated}": {
                        domain: round(recovered(of["loss"][domain], base[domain], measured[ablated]["loss"][domain]), 4)
                        for domain in base
                    }
                    for ablated in ABLATIONS
                }
                for name, of in measured.items()
            }
    return figures


STAGES: dict[str, Callable[[CheckpointStudy], dict[str, Any]]] = {
    "cache": cache,
    "features": features,
    "joint": joint,
    "sae-raw": partial(sae, stage="sae-raw", input_norm="none", adam=ADAM_RATES[2:3], signum=SIGNUM_SHARES[1:]),
    "sae-standardised": partial(
        sae,
        stage="sae-standardised",
        input_norm="layer",
        adam=ADAM_RATES,
        signum=SIGNUM_SHARES,
        # sparsify's own settings against dead features
        auxk_alpha=1 / 32,
        dead_feature_threshold=50_000,
    ),
    **{f"evaluate/{method}": partial(evaluate, method=method) for method in (*ABLATIONS, *TRAINED)},
    "summary": summary,
}


def run_stages(study: CheckpointStudy, only: str = "*", threads: int = 1) -> None:
    """Runs the stages, in order, whose names match and that have no result yet."""
    study.run(STAGES, "smollm2.real_checkpoint", only, threads)


def main(
    only: Annotated[str, typer.Option(help="Pattern that the names of stages must match.")] = "*",
    name: Annotated[str, typer.Option(help="Folder of results, and of models and caches.")] = "real_checkpoint",
    layers: Annotated[
        list[int] | None, typer.Option(help="Block with an MFN layer. Repeat it; default: 6, 12, 18 and 24.")
    ] = None,
    train_tokens: Annotated[int, typer.Option(help="Tokens to cache and train on.")] = CheckpointStudy.train_tokens,
    joint_tokens: Annotated[int, typer.Option(help="Tokens of the joint stage.")] = CheckpointStudy.joint_tokens,
    held_out_tokens: Annotated[
        int, typer.Option(help="Tokens per domain to evaluate on.")
    ] = CheckpointStudy.held_out_tokens,
    epochs: Annotated[int, typer.Option(help="Epochs of training from the cache.")] = CheckpointStudy.epochs,
    seed: Annotated[int, typer.Option(help="Seed of windows, initial weights and order.")] = CheckpointStudy.seed,
    threads: Annotated[int, typer.Option(help="Number of threads.")] = 2,
) -> None:
    """Runs all stages that have no result yet."""
    torch.set_num_threads(threads)
    study = CheckpointStudy(
        base=smollm2(),
        results=records.RESULTS / name,
        folder=cache_folder() / name,
        layers=tuple(layers or CheckpointStudy.layers),
        train_tokens=train_tokens,
        joint_tokens=joint_tokens,
        held_out_tokens=held_out_tokens,
        epochs=epochs,
        seed=seed,
    )
    run_stages(study, only, threads)


if __name__ == "__main__":
    typer.run(main)
