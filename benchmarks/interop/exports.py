"""MFN models exported by torch.export and to ONNX: the largest difference of their logits from the eager model's.

Models of `benchmarks.interop.small_mfn` are exported with a free number of rows and tokens, as they code and with
`codes="stream"` in one round. ONNX is run by onnxruntime on CPUs. The base model without MFN layers is the comparison.

    python -m benchmarks.interop.exports

needs onnx, onnxscript and onnxruntime, and writes benchmarks/results/interop/exports.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from torch.export import Dim
from transformers import PreTrainedModel

from benchmarks.common import records
from benchmarks.interop import small_mfn
from modeling_mfn import MFNForCausalLM

RESULT = records.RESULTS / "interop" / "exports.json"
SIZES = ((1, 5), (3, 17), (8, 128))
"""Rows and tokens of the batches that are compared. The exported example is none of them."""


def batch(rows: int, tokens: int) -> dict[str, Tensor]:
    """Windows of held-out text, the first of them padded on the left."""
    ids = torch.tensor(small_mfn.held_out(3 * 128 * rows)["input_ids"])[:rows, :tokens].contiguous()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def differences(model: PreTrainedModel) -> dict[str, float]:
    """Largest difference of logits by way of export."""
    import onnxruntime

    sizes = {0: Dim("rows"), 1: Dim("tokens")}
    shapes = {"input_ids": sizes, "attention_mask": sizes, "use_cache": None}
    example = batch(2, 9) | {"use_cache": False}
    program = torch.export.export(model, (), example, dynamic_shapes=shapes).module()
    onnx = torch.onnx.export(model, (), kwargs=example, dynamic_shapes=shapes, dynamo=True, verbose=False)
    assert onnx is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(file)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    worst = {"torch_export": 0.0, "onnx": 0.0}
    for size in SIZES:
        inputs = batch(*size)
        counted = inputs["attention_mask"].bool()
        wanted = model(**inputs).logits[counted]
        found = {
            "torch_export": program(**inputs, use_cache=False).logits,
            "onnx": torch.from_numpy(session.run(None, {name: each.numpy() for name, each in inputs.items()})[0]),
        }
        for name, logits in found.items():
            worst[name] = max(worst[name], float((logits[counted] - wanted).abs().max()))
    return worst


def main() -> None:
    """Writes the result."""
    small_mfn.quietly()
    found: dict[str, Any] = {}
    for family in small_mfn.RUNS:
        folder = small_mfn.folder_of(family)
        update = MFNForCausalLM.from_pretrained(folder)
        stream = MFNForCausalLM.from_pretrained(folder, codes="stream", coding_rounds=1, refine_steps=0)
        rounds = f", {update.config.coding_rounds} rounds" if update.config.coding_rounds > 1 else ""
        models = {"base": update.to_base(), f"update{rounds}": update, "stream": stream}
        found[family] = {name: differences(model) for name, model in models.items()}
        print(family, found[family], flush=True)
    record = {
        "command": records.command_line("interop.exports"),
        "settings": {"models": small_mfn.RUNS, "sizes": SIZES},
        "versions": small_mfn.versions("torch", "transformers", "onnx", "onnxscript", "onnxruntime"),
        "families": found,
    }
    records.write_record(RESULT, record)


if __name__ == "__main__":
    typer.run(main)
