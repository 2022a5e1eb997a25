"""Model that the pictures of the explorer show: SmolLM2-135M, with MFN layers in three blocks.

    python -m benchmarks.explorer.model

leaves it in `explorer/smollm2-135m-mfn` of the cache folder (`MFN_CACHE`); half an hour of one core. It is no result:
its MFN layers see 92 k tokens from a cache, three times over, and 20 k tokens inside the model. The backbone is frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoTokenizer

from benchmarks.common import corpora, records
from benchmarks.smollm2.all_blocks import cache, train_from_cache
from benchmarks.smollm2.labels import inventory, label_atlas
from benchmarks.smollm2.stages import CheckpointStudy
from modeling_mfn import MFNForCausalLM, MFNTrainer
from modeling_mfn.demo.assets import cache_folder, smollm2
from modeling_mfn.training.record import write_record

NAME = "smollm2-135m-mfn"
"""Name of the model's folder, which the pages show."""
BLOCKS = (8, 16, 24)
NUM_FEATURES, TRAIN_TOKENS, JOINT_TOKENS, ATLAS_TOKENS, WINDOW = 4608, 92_160, 20_480, 150_000, 128
JOINT_BATCH = 4
JOINT = {"learning_rate": 6e-4, "lambda_recon": 0.5, "adam_beta2": 0.99, "lr_scheduler_type": "linear"}
"""Training arguments of the MFN layers inside the model, at alpha = 1."""


def study_of(seed: int) -> CheckpointStudy:
    """Settings of the model's training."""
    return CheckpointStudy(
        base=smollm2(), results=records.RESULTS / "explorer", folder=cache_folder() / "explorer", layers=BLOCKS,
        num_features=NUM_FEATURES, train_tokens=TRAIN_TOKENS, joint_tokens=JOINT_TOKENS, seed=seed,
    )  # fmt: skip


def train(study: CheckpointStudy, folder: Path) -> MFNForCausalLM:
    """Trains the MFN layers from a cache, then inside the model, and saves the model with its training record."""
    cache(study, "update")
    model, _ = train_from_cache(study, study.order())
    data = corpora.as_data_set(study.windows["joint"].numpy())
    rows = range(len(data) // JOINT_BATCH * JOINT_BATCH)
    arguments = study.arguments(rows, JOINT_BATCH, alpha_start=1.0, **JOINT)
    trainer = MFNTrainer(model, arguments, train_dataset=data.select(rows))
    trainer.train()
    model.set_blend(1.0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(study.base).save_pretrained(folder)
    write_record(folder, trainer.args, trainer.state, model.config)
    return model


def main(
    seed: Annotated[int, typer.Option(help="Seed of windows, initial weights and labels.")] = 0,
    threads: Annotated[int, typer.Option(help="Number of threads.")] = 2,
) -> None:
    """Makes the model, unless it is there, and labels its atlas."""
    torch.set_num_threads(threads)
    study, folder = study_of(seed), cache_folder() / "explorer" / NAME
    model = MFNForCausalLM.from_pretrained(folder) if folder.exists() else train(study, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = corpora.windows_by_source(tokenizer, 0, ATLAS_TOKENS, WINDOW)
    label_atlas(model.eval(), tokenizer, text, inventory(tokenizer), seed, folder)


if __name__ == "__main__":
    typer.run(main)
