"""All blocks of SmolLM2-135M read through features: what is lost, against a dense model of the same tokens.

SmolLM2-135M (4-bit weights, made float32) gets an MFN layer in each of its 30 blocks. They code the update and learn
from cached updates, in one round. Then they go on together with the backbone, in several rounds, with a teacher.

Controls: a dense model, which is also the teacher and reads half as many tokens more at the same rate; TopK
autoencoders of EleutherAI's sparsify in the same 30 places, of the stream and of the update; and means in their place.

    python -m benchmarks.smollm2.all_blocks                       # all stages without a result: many hours
    python -m benchmarks.smollm2.all_blocks --only 'evaluate/*'   # stages whose names match
    python -m benchmarks.smollm2.all_blocks --joint-tokens 20000 --name trial

A stage writes benchmarks/results/<name>/<stage>.json. Caches, models and checkpoints go to the cache folder
(`MFN_CACHE`). A stage that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Subset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from benchmarks.common import corpora, records
from benchmarks.smollm2 import sparsify_baseline
from benchmarks.smollm2.real_checkpoint import by_domain
from benchmarks.smollm2.splicing import next_token_losses, reconstruction_figures
from benchmarks.smollm2.stages import CheckpointStudy, Rows, Trained
from modeling_mfn import FeatureAtlas, MFNForCausalLM, MFNTrainer
from modeling_mfn.demo.assets import cache_folder, smollm2
from modeling_mfn.model.modes import at_alpha
from modeling_mfn.training.activation_cache import ActivationCache, CachedResiduals

ROUNDS: dict[str, Any] = {"coding_rounds": 2, "refine_steps": 1}
"""How the MFN layers code inside the model. Learning from the cache would take twice as long with it."""
RATE = 1e-4
"""Learning rate of the backbone, of the dense model and of joint training."""
CACHED: dict[str, Any] = {"learning_rate": 4e-3, "adam_beta2": 0.99, "lr_scheduler_type": "linear"}
TRIED: tuple[dict[str, Any], ...] = ({"learning_rate": 8e-3},)
"""Changes of `CACHED` and `KEEP_ALIVE` that the stage `cached-tuned` tries."""
JOINT: dict[str, Any] = {
    "learning_rate": RATE,
    "mfn_learning_rate": 6e-4,
    "lambda_recon": 0.5,
    "adam_beta2": 0.99,
    "lr_scheduler_type": "linear",
}
JOINT_SHARE = 2 / 3
"""Share of the dense model's windows that the joint training reads."""
KEEP_ALIVE: dict[str, Any] = {"rate_window": 20_000, "reinit_dead_every": 10}
SAE: dict[str, Any] = {"optimizer": "adam", "lr": 6e-3, "auxk_alpha": 1 / 32, "dead_feature_threshold": 50_000}
"""Settings of sparsify's `TrainConfig`; the learning rate won in `real_checkpoint.py`."""
BATCH = 4
"""Windows per step of dense and joint training."""
MIXED = {"bf16": True}
"""Both trainings, and their curves, have matrix products of bfloat16. What they end with is evaluated in float32."""
POINTS = 12
"""Points of the curve of a training."""
SPLICED = {"sae-stream": "stream", "sae-update": "update"}
"""Stage of a baseline -> what its autoencoders code."""
MORE_ROUNDS = {f"{stage}-in-4-rounds": stage for stage in ("cached", "joint")}
"""Model that codes in more rounds than it learnt in -> stage that trained it."""
IN_BFLOAT16 = {f"{method}-in-bfloat16": method for method in ("base", "joint")}
"""Model whose weights and activations are rounded to bfloat16 -> method in float32."""
METHODS = (
    "base", "dense", "mean-stream", "mean-update", *SPLICED, "cached", "cached-tuned", "joint", *MORE_ROUNDS,
    *IN_BFLOAT16,
)  # fmt: skip


def all_windows(study: CheckpointStudy) -> Dataset:
    """Windows that the dense model and the joint training read once, those of the cache included."""
    rows = torch.cat([study.windows["train"], study.windows["joint"]]).numpy()
    return corpora.as_data_set(np.random.default_rng(study.seed).permutation(rows))


def curve_settings(steps: int) -> dict[str, Any]:
    """Training arguments that evaluate `POINTS` times, and keep a checkpoint of each."""
    every = max(1, steps // POINTS)
    return {
        "eval_strategy": "steps", "eval_steps": every, "eval_on_start": True, "logging_steps": every,
        "save_strategy": "steps", "save_steps": every, "save_total_limit": 1, "per_device_eval_batch_size": BATCH,
    }  # fmt: skip


def go_on(trainer: Trainer) -> None:
    """Trains, from the last checkpoint if there is one."""
    trainer.train(resume_from_checkpoint=any(Path(trainer.args.output_dir).glob("checkpoint-*")))


def curve(trainer: Trainer, loss: str, tokens_a_step: int) -> list[dict[str, float]]:
    """Loss on validation windows, in nats per token, by tokens of this training."""
    # a training that goes on evaluates its first step once more
    points = {of["step"]: round(of[f"eval_{loss}"], 4) for of in trainer.state.log_history if f"eval_{loss}" in of}
    return [{"tokens": step * tokens_a_step, "loss": found} for step, found in points.items()]


def dense(study: CheckpointStudy) -> dict[str, Any]:
    """Stage: goes on with the training of the base model."""
    rows, folder = all_windows(study), study.folder / "dense"
    model = AutoModelForCausalLM.from_pretrained(study.base, dtype=torch.float32)
    steps = len(rows) // BATCH
    arguments = TrainingArguments(
        str(study.folder / "dense.training"), max_steps=steps, per_device_train_batch_size=BATCH, weight_decay=0.0,
        learning_rate=RATE, lr_scheduler_type="linear", warmup_steps=steps // 20, report_to=[], use_cpu=True,
        disable_tqdm=True, seed=study.seed, **MIXED, **curve_settings(steps),
    )  # fmt: skip
    validation = corpora.as_data_set(study.windows["validation"].numpy())
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=validation)
    go_on(trainer)
    model.save_pretrained(folder)
    return {"learning_rate": RATE, **MIXED, "curve": curve(trainer, "loss", BATCH * study.window)}


def cache(study: CheckpointStudy, codes: str) -> dict[str, Any]:
    """Stage: caches the streams or the updates of the training windows."""
    rows = corpora.as_data_set(study.windows["train"].numpy())
    model = study.convert(num_features=1, k=1, codes=codes)  # MFN layers only mark blocks here
    ActivationCache.write(model, rows, study.folder / "cache" / codes)
    return {"tokens": study.windows["train"].numel()}


def train_from_cache(study: CheckpointStudy, order: Rows, **changes: Any) -> Trained:
    """Model with MFN layers that learnt from the cache, with changes of `CACHED` and `KEEP_ALIVE`, and its trainer."""
    model = study.convert(calibration={"input_ids": study.windows["train"][:16]}, codes="update")
    settings = KEEP_ALIVE | CACHED | changes
    arguments = study.arguments(order, study.batch, lambda_util=0.0, alpha_end=0.0, **settings)
    rows = ActivationCache(study.folder / "cache" / "update")
    trainer = MFNTrainer(CachedResiduals(model), arguments, train_dataset=Subset(rows, order))
    trainer.train()
    return Trained(model, trainer)


def cached(study: CheckpointStudy) -> dict[str, Any]:
    """Stage: trains the MFN layers from the cache."""
    model, trainer = train_from_cache(study, study.order())
    model.save_pretrained(study.folder / "cached")
    return {"arguments": KEEP_ALIVE | CACHED, "validation_loss": study.validation_loss(model)} | {
        "explained_variance": trainer.state.log_history[-2]["explained_variance"]
    }


def cached_tuned(study: CheckpointStudy) -> dict[str, Any]:
    """Stage: trains the MFN layers from the cache with each of `TRIED`, and keeps the best on validation text."""
    return study.fit("cached-tuned", partial(train_from_cache, study), list(TRIED), study.order(), study.batch)


def joint(study: CheckpointStudy) -> dict[str, Any]:
    """Stage: trains the whole model at alpha 1, with the dense model as teacher."""
    data, folder = all_windows(study), study.folder / "joint"
    model = MFNForCausalLM.from_pretrained(study.folder / "cached", **ROUNDS)
    teacher = AutoModelForCausalLM.from_pretrained(study.folder / "dense")
    rows = range(int(JOINT_SHARE * len(data)) // BATCH * BATCH)
    settings = JOINT | MIXED | curve_settings(len(rows) // BATCH)
    arguments = study.arguments(rows, BATCH, alpha_start=1.0, util_target="kl", trainable="all", **settings)
    arguments.output_dir = str(study.folder / "joint.training")
    validation = corpora.as_data_set(study.windows["validation"].numpy())
    trainer = MFNTrainer(model, arguments, base_model=teacher, train_dataset=data.select(rows), eval_dataset=validation)
    go_on(trainer)
    model.save_pretrained(folder)
    return {
        "coding": ROUNDS,
        "arguments": JOINT | MIXED,
        "curve": curve(trainer, "next_token_loss", BATCH * study.window),
    }


def atlas(study: CheckpointStudy) -> dict[str, Any]:
    """Stage: describes the features of the trained model from the windows of the cache, next to its weights."""
    folder, rows = study.folder / "joint", corpora.as_data_set(study.windows["train"].numpy())
    tokenizer = AutoTokenizer.from_pretrained(study.base)
    tokenizer.save_pretrained(folder)
    model = MFNForCausalLM.from_pretrained(folder)
    made = FeatureAtlas.build(model, tokenizer, rows, state_folder=study.folder / "atlas.state", resume=True)
    made.save_pretrained(folder)
    table = made.to_pandas()
    written = sum(file.stat().st_size for file in (folder / "features").rglob("*") if file.is_file())
    return {
        "tokens": study.windows["train"].numel(),
        "features": len(table),
        "silent_features": int((table["firing_rate"] == 0).sum()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "megabytes": round(written / 1e6, 1),
    }


def sae(study: CheckpointStudy, stage: str) -> dict[str, Any]:
    """Stage: trains sparsify's autoencoders from the cache, on standardised streams or updates."""
    codes, order = SPLICED[stage], study.order()
    model, rows = study.convert(codes=codes), ActivationCache(study.folder / "cache" / codes)
    warmup = len(order) // study.batch // 20
    settings = SAE | {"batch_size": study.batch, "lr_warmup_steps": warmup, "init_seeds": [study.seed]}
    sparsify_baseline.train(model, rows, order, study.folder / f"sparsify-{codes}", **settings)
    model.save_pretrained(study.folder / stage)
    return {"sparsify": SAE, "validation_loss": study.validation_loss(model)}


@contextmanager
def means_in_place(model: MFNForCausalLM, means: Tensor) -> Any:
    """Context in which each MFN layer writes a mean (L, d) in place of what it codes."""

    def hook(mean: Tensor) -> Callable[..., Tensor]:
        def swap(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            before = inputs[1].stream_before(layer.layer_index)
            return mean.expand_as(output) if before is None else before + mean

        return swap

    with ExitStack() as stack:
        for layer, mean in zip(model.mfn_layers.values(), means, strict=True):
            stack.callback(layer.register_forward_hook(hook(mean)).remove)
        yield


def evaluate(study: CheckpointStudy, method: str) -> dict[str, Any]:
    """Stage: losses on held-out text with one method in all blocks."""
    model: PreTrainedModel
    context: AbstractContextManager = nullcontext()
    name, dtype = (IN_BFLOAT16[method], torch.bfloat16) if method in IN_BFLOAT16 else (method, torch.float32)
    if name in ("base", "dense"):
        folder = study.base if name == "base" else study.folder / "dense"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    elif method.startswith("mean-"):
        codes = method.removeprefix("mean-")
        model, rows = study.convert(num_features=1, k=1, codes=codes), ActivationCache(study.folder / "cache" / codes)
        means = sum(rows[row]["residuals"].double().mean(1) for row in range(len(rows))) / len(rows)
        context = means_in_place(model, means.float())
    else:
        rounds = ROUNDS | {"coding_rounds": 4} if name in MORE_ROUNDS else {}
        model = MFNForCausalLM.from_pretrained(study.folder / MORE_ROUNDS.get(name, name), dtype=dtype, **rounds)
        context = at_alpha(model, 1.0)
    with context:
        losses = next_token_losses(model, study.windows["held_out"], description=method)
    np.save(study.folder / f"losses-{method}.npy", losses.numpy())
    figures: dict[str, Any] = {"loss": by_domain(losses)}
    for control in ("base", "dense"):
        file = study.folder / f"losses-{control}.npy"
        if file.exists():
            lost = losses - torch.from_numpy(np.load(file))
            of_windows = lost.mean(1)
            figures[f"lost_to_{control}"] = by_domain(lost)
            figures[f"lost_to_{control}_standard_error"] = round(float(of_windows.std() / len(of_windows) ** 0.5), 4)
    if isinstance(model, MFNForCausalLM) and not method.startswith("mean-"):
        figures["layers"] = of_layers(study, model)
    return figures


@torch.no_grad()
def of_layers(study: CheckpointStudy, model: MFNForCausalLM) -> dict[str, dict[str, float]]:
    """Figures of each layer's reconstruction on validation windows, of what it codes at alpha 1."""
    with at_alpha(model, 1.0):
        found = [
            model(rows, output_reconstructions=True, logits_to_keep=1).reconstructions
            for rows in study.windows["validation"].split(BATCH)
        ]
    return {
        f"layer_{number}": {
            name: round(value, 4)
            for name, value in reconstruction_figures(
                layer, torch.cat([items[number].residual for items in found])
            ).items()
        }
        for number, layer in model.mfn_layers.items()
    }


STAGES: dict[str, Callable[[CheckpointStudy], dict[str, Any]]] = {
    "dense": dense,
    "cache/update": partial(cache, codes="update"),
    "cached": cached,
    "cached-tuned": cached_tuned,
    "joint": joint,
    "atlas": atlas,
    "cache/stream": partial(cache, codes="stream"),
    **{stage: partial(sae, stage=stage) for stage in SPLICED},
    **{f"evaluate/{method}": partial(evaluate, method=method) for method in METHODS},
}


def run_stages(study: CheckpointStudy, only: str = "*", threads: int = 1) -> None:
    """Runs the stages, in order, whose names match and that have no result yet."""
    study.run(STAGES, "smollm2.all_blocks", only, threads)


def main(
    only: Annotated[str, typer.Option(help="Pattern that the names of stages must match.")] = "*",
    name: Annotated[str, typer.Option(help="Folder of results, and of models and caches.")] = "all_blocks",
    num_features: Annotated[int, typer.Option(help="Features per MFN layer.")] = 2304,
    train_tokens: Annotated[int, typer.Option(help="Tokens to cache.")] = 184_320,
    joint_tokens: Annotated[int, typer.Option(help="Further tokens of the dense and the joint training.")] = 184_320,
    epochs: Annotated[int, typer.Option(help="Epochs of training from the cache.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of windows, initial weights and order.")] = 0,
    threads: Annotated[int, typer.Option(help="Number of threads.")] = 2,
) -> None:
    """Runs all stages that have no result yet."""
    torch.set_num_threads(threads)
    base = smollm2()
    blocks = AutoConfig.from_pretrained(base).num_hidden_layers
    study = CheckpointStudy(
        base=base, results=records.RESULTS / name, folder=cache_folder() / name, layers=tuple(range(blocks)),
        num_features=num_features, train_tokens=train_tokens, joint_tokens=joint_tokens, epochs=epochs, seed=seed,
    )  # fmt: skip
    run_stages(study, only, threads)


if __name__ == "__main__":
    typer.run(main)
