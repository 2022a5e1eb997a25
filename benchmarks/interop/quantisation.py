"""MFN models with quantised weights: which weights are packed, and whether codes and logits hold.

Models of `benchmarks.interop.small_mfn` are quantised by torchao and bitsandbytes and compared with themselves in
float32, on held-out text.

    python -m benchmarks.interop.quantisation

needs torchao and bitsandbytes, and writes benchmarks/results/interop/quantisation.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks.common import records
from benchmarks.interop import small_mfn
from modeling_mfn import MFNForCausalLM, perplexity
from modeling_mfn.data.windows import input_batches
from modeling_mfn.model.feature_weights import FeatureEncoder
from modeling_mfn.model.finite import is_packed

RESULT = records.RESULTS / "interop" / "quantisation.json"
TOKENS, BATCH = 12_288, 16


def methods(folder: Path) -> Iterator[tuple[str, Callable[[], MFNForCausalLM]]]:
    """Yields names of ways to quantise, and functions that load the model in this way."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
    from transformers import BitsAndBytesConfig, TorchAoConfig

    def load(**options: Any) -> MFNForCausalLM:
        model: MFNForCausalLM = MFNForCausalLM.from_pretrained(folder, **options)
        return model

    def with_encoders(config: Any) -> MFNForCausalLM:
        model = load(quantization_config=TorchAoConfig(config))
        quantize_(model, config, filter_fn=lambda module, _: isinstance(module, FeatureEncoder))
        return model

    int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    for name, config in (("torchao int8", Int8WeightOnlyConfig()), ("torchao int4, groups of 32", int4)):
        yield name, lambda config=config: load(quantization_config=TorchAoConfig(config))
        yield f"{name}, encoders too", lambda config=config: with_encoders(config)
    yield "bitsandbytes 8 bit", lambda: load(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    yield "bitsandbytes 4 bit (nf4)", lambda: load(quantization_config=nf4)
    yield "bfloat16, for comparison", lambda: load(dtype=torch.bfloat16)


def packed(model: MFNForCausalLM) -> dict[str, list[int]]:
    """Packed and all modules of the backbone's projections and of the MFN layers' encoders."""
    projections = [module for module in model.model.modules() if isinstance(module, nn.Linear | Conv1D)]
    encoders = [layer.encoder for layer in model.mfn_layers.values()]
    parts = {"projections": projections, "encoders": encoders}
    return {name: [sum(is_packed(each.weight) for each in of), len(of)] for name, of in parts.items()}


@torch.no_grad()
def compare(model: MFNForCausalLM, reference: MFNForCausalLM, windows: Any) -> dict[str, float]:
    """Share of active features that stay active, and mean difference of logits in their standard deviations."""
    kept = active = off = spread = 0.0
    for batch in input_batches(windows, BATCH):
        ours, theirs = (each(**batch, output_codes=True) for each in (model, reference))
        for layer, code in theirs.codes.items():
            found = ours.codes[layer].to_dense() > 0
            wanted = code.to_dense() > 0
            kept, active = kept + float((found & wanted).sum()), active + float(wanted.sum())
        logits = theirs.logits.float()
        off += float((ours.logits.float() - logits).abs().mean(-1).sum())
        spread += float(logits.std(-1).sum())
    return {"active_features_kept": round(kept / active, 4), "logit_difference": round(off / spread, 4)}


def main() -> None:
    """Writes the result."""
    small_mfn.quietly()
    windows = small_mfn.held_out(TOKENS)
    found: dict[str, Any] = {}
    for family in small_mfn.RUNS:
        folder = small_mfn.folder_of(family)
        reference = MFNForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found[family] = {"float32": {"perplexity": round(perplexity(reference, windows, BATCH), 2)}}
        for name, load in methods(folder):
            model = load()
            figures = compare(model, reference, windows) | {"perplexity": round(perplexity(model, windows, BATCH), 2)}
            found[family][name] = figures | {"packed": packed(model)}
            print(family, name, found[family][name], flush=True)
    record = {
        "command": records.command_line("interop.quantisation"),
        "settings": {"models": small_mfn.RUNS, "tokens": TOKENS},
        "versions": small_mfn.versions("torch", "transformers", "torchao", "bitsandbytes"),
        "families": found,
    }
    records.write_record(RESULT, record)


if __name__ == "__main__":
    typer.run(main)
