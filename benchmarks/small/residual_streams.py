"""Share of the small models' residual streams that says nothing about the token.

Measured are the constant part, the part that the position explains, and the features that fire on most tokens.

    python -m benchmarks.small.residual_streams    # models that `fidelity.py` has trained

writes benchmarks/results/residual_streams.json.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.common import corpora, records, small_models
from modeling_mfn import MFNForCausalLM
from modeling_mfn.demo.assets import cache_folder
from modeling_mfn.training.feature_sums import standardised

RUNS = ("recipe/cache-first-distilled", "main/cache-first-distilled")
TOKENS = 16_384
"""Held-out tokens per domain."""


def figures(h: Tensor, active: Tensor) -> dict[str, float]:
    """Figures of one layer. Means per position are fitted on half of the rows and tested on the others.

    Args:
        h: residual streams, (rows, T, d); each vector is standardised.
        active: mask of active features, (rows, T, m).
    """
    x = standardised(h)
    fitted, judged = x[::2], x[1::2]
    by_position, overall = fitted.mean(0), fitted.mean((0, 1))
    left, whole = ((judged - mean).square().sum() for mean in (by_position, overall))
    return {
        "same_in_every_token": round(float(overall.square().mean()), 4),
        "of_the_rest_told_by_position": round(float(1 - left / whole), 4),
        "features_active_on_most_tokens": int((active.float().mean((0, 1)) > 0.5).sum()),
    }


@torch.no_grad()
def measure(model: MFNForCausalLM, tokens: Tensor) -> dict[str, Any]:
    """Layer -> figures, on windows of tokens (rows, T)."""
    items = model.eval()(input_ids=tokens, output_reconstructions=True, logits_to_keep=1).reconstructions
    return {f"layer_{layer}": figures(item.residual, item.code.to_dense() > 0) for layer, item in items.items()}


def main(threads: Annotated[int, typer.Option(help="Number of threads.")] = 2) -> None:
    """Measures the trained models of `fidelity.py` and writes the results."""
    torch.set_num_threads(threads)
    data = small_models.data()
    tokens = torch.cat([torch.tensor(data.evaluation(domain, TOKENS)["input_ids"]) for domain in corpora.DOMAINS])
    found: dict[str, Any] = {"command": "python -m benchmarks.small.residual_streams", "tokens": tokens.numel()}
    for name in (f"{family}/{run}" for family in small_models.FAMILIES for run in RUNS):
        folder = cache_folder() / "fidelity" / name
        if folder.exists():
            found[name] = measure(MFNForCausalLM.from_pretrained(folder), tokens)
    records.write_record(records.RESULTS / "residual_streams.json", found)


if __name__ == "__main__":
    typer.run(main)
