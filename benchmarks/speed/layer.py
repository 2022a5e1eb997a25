"""Time of one MFN layer's eqs. 1 and 2, compared with the dense equations and EleutherAI's sparsify.

All variants have the same weights, input and incoming gradient, and take turns in each round. Figures are median times
as a ratio to the encoder product h @ W_e.T. Every variant must compute this product. Codes of several rounds
(`pursuit.py`) are timed, too: they are other equations, at a price.

    python -m benchmarks.speed.layer [--tokens 2048 --hidden-size 576 --num-features 4608 --k 32 --rounds 15]

writes benchmarks/results/layer.json.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.common import records
from modeling_mfn.model.pursuit import pursue
from modeling_mfn.model.sparse_code import decode, encode

Variant = Callable[[], Tensor]
OURS = "modeling_mfn"
ROUNDS = {f"{OURS}, {count} rounds": count for count in (2, 4, 8)}
"""Variant -> rounds in which features are chosen, with a step of refinement after each."""


def dense(h: Tensor, weight: Tensor, bias: Tensor, directions: Tensor, k: int) -> Tensor:
    """Eqs. 1 and 2 with a dense code (N, m)."""
    z = torch.relu(h @ weight.T + bias)
    values, indices = z.topk(k, dim=-1)
    return torch.zeros_like(z).scatter(-1, indices, values) @ directions


def bag_and_autograd(h: Tensor, weight: Tensor, bias: Tensor, directions: Tensor, k: int) -> Tensor:
    """Eqs. 1 and 2 with a sparse code and torch's own backward."""
    values, indices = torch.relu(h @ weight.T + bias).topk(k, dim=-1, sorted=False)
    return torch.nn.functional.embedding_bag(indices, directions, per_sample_weights=values, mode="sum")


def ours(h: Tensor, weight: Tensor, bias: Tensor, directions: Tensor, k: int) -> Tensor:
    """Eqs. 1 and 2 as MFN layers compute them."""
    return decode(encode(h, weight, bias, k), directions)


def in_rounds(h: Tensor, weight: Tensor, bias: Tensor, directions: Tensor, k: int, rounds: int) -> Tensor:
    """Code of several rounds, and eq. 2."""
    per_round = k // rounds
    first = encode(h, weight, bias, k - (rounds - 1) * per_round)
    return decode(pursue(first, h, directions, rounds, per_round, steps=1), directions)


def sparsify_coder(hidden_size: int, num_features: int, k: int, weights: list[Tensor]) -> Any:
    """sparsify's autoencoder with the given encoder, encoder bias and decoder."""
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(hidden_size, SparseCoderConfig(num_latents=num_features, k=k, expansion_factor=0))
    for parameter, value in zip((coder.encoder.weight, coder.encoder.bias, coder.W_dec), weights, strict=True):
        parameter.data = value.detach().clone()
    return coder


def seconds(work: Callable[[], Any]) -> float:
    """Seconds that some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(
    tokens: Annotated[int, typer.Option(help="Tokens per batch.")] = 2048,
    hidden_size: Annotated[int, typer.Option(help="Hidden size d.")] = 576,
    num_features: Annotated[int, typer.Option(help="Number of features m.")] = 4608,
    k: Annotated[int, typer.Option(help="Active features per token.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds of all variants.")] = 15,
    seed: Annotated[int, typer.Option(help="Seed of weights and input.")] = 0,
) -> None:
    """Measures all variants, prints a table and writes the results."""
    torch.manual_seed(seed)
    h = torch.randn(tokens, hidden_size, requires_grad=True)
    directions = torch.nn.functional.normalize(torch.randn(num_features, hidden_size), dim=-1).requires_grad_()
    weight, bias = directions.detach().clone().requires_grad_(), torch.zeros(num_features, requires_grad=True)
    incoming = torch.randn(tokens, hidden_size)
    coder = sparsify_coder(hidden_size, num_features, k, [weight, bias, directions])
    mine = [h, weight, bias, directions]
    theirs = [h, coder.encoder.weight, coder.encoder.bias, coder.W_dec]

    def sparsify() -> Tensor:
        found = coder.encode(h)
        return coder.decode(found.top_acts, found.top_indices)

    variants: dict[str, tuple[Variant, list[Tensor]]] = {
        "dense": (lambda: dense(*mine, k), mine),
        "embedding_bag and autograd": (lambda: bag_and_autograd(*mine, k), mine),
        "sparsify": (sparsify, theirs),
        OURS: (lambda: ours(*mine, k), mine),
        **{name: (partial(in_rounds, *mine, k, count), mine) for name, count in ROUNDS.items()},
    }
    reference = torch.autograd.grad(dense(*mine, k), mine, incoming)
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "both": []} for name in variants}
    product: list[float] = []
    for _ in track(range(rounds + 1), "rounds"):
        with torch.no_grad():
            product.append(seconds(lambda: h @ weight.T))
        for name, (forward, inputs) in variants.items():
            with torch.no_grad():
                times[name]["forward"].append(seconds(forward))
            gradients: list[tuple[Tensor, ...]] = []
            times[name]["both"].append(
                seconds(lambda: gradients.append(torch.autograd.grad(forward(), inputs, incoming)))  # noqa: B023
            )
            if name not in ROUNDS:
                for ours_, dense_ in zip(gradients[0], reference, strict=True):
                    torch.testing.assert_close(ours_, dense_, atol=1e-3, rtol=1e-3)
    base = statistics.median(product[1:])  # the first round warms up
    ratios = {
        name: {part: statistics.median(found[1:]) / base for part, found in parts.items()}
        for name, parts in times.items()
    }
    table = Table("variant", "forward", "forward + backward", title="time / encoder product")
    for name, parts in ratios.items():
        table.add_row(name, f"{parts['forward']:.2f}", f"{parts['both']:.2f}")
    Console().print(table)
    record = {
        "command": f"python -m benchmarks.speed.layer --tokens {tokens} --hidden-size {hidden_size} "
        f"--num-features {num_features} --k {k} --rounds {rounds} --seed {seed}",
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "eai-sparsify")},
        "encoder_product_ms": round(base * 1000, 1),
        "ratios": {name: {part: round(ratio, 2) for part, ratio in parts.items()} for name, parts in ratios.items()},
    }
    records.write_record(records.RESULTS / "layer.json", record)


if __name__ == "__main__":
    typer.run(main)
