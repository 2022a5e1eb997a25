"""Plain checkpoints of MFN models in TransformerLens: the largest difference of logits from transformers.

The backbones of the models of `benchmarks.interop.small_mfn` are saved without MFN layers and opened from there.

    python -m benchmarks.interop.plain_checkpoint

needs transformer-lens, and writes benchmarks/results/interop/plain_checkpoint.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import typer

from benchmarks.common import corpora, records, small_models
from benchmarks.interop import small_mfn
from modeling_mfn import MFNForCausalLM

RESULT = records.RESULTS / "interop" / "plain_checkpoint.json"
ROWS = 8


@torch.no_grad()
def main() -> None:
    """Writes the result."""
    from transformer_lens.model_bridge import TransformerBridge

    small_mfn.quietly()
    ids = torch.tensor(small_mfn.held_out(12_288)["input_ids"])[:ROWS]
    found = {}
    for family in small_mfn.RUNS:
        base = MFNForCausalLM.from_pretrained(small_mfn.folder_of(family)).to_base()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / f"{family}-plain"
            base.save_pretrained(folder)
            corpora.tokenizer(small_models.VOCABULARY).save_pretrained(folder)
            logits, cache = TransformerBridge.boot_transformers(str(folder)).run_with_cache(ids)
        last = base.config.num_hidden_layers - 1
        assert cache[f"blocks.{last}.hook_resid_mid"].shape == (*ids.shape, base.config.hidden_size)
        wanted = base(ids).logits
        found[family] = {
            "largest_logit": round(float(wanted.abs().max()), 2),
            "largest_difference": float((logits - wanted).abs().max()),
        }
        print(family, found[family], flush=True)
    record = {
        "command": records.command_line("interop.plain_checkpoint"),
        "settings": {"models": small_mfn.RUNS, "rows": ROWS},
        "versions": small_mfn.versions("torch", "transformers", "transformer-lens"),
        "families": found,
    }
    records.write_record(RESULT, record)


if __name__ == "__main__":
    typer.run(main)
