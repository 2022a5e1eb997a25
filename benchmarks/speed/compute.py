"""Time and memory of an MFN model next to its base model (section 8 of the paper).

The MFN layers are untrained: their cost does not depend on the weights, nor on alpha. The text is random tokens.

    python -m benchmarks.speed.compute                      # SmolLM2-135M, MFN layers in all blocks
    python -m benchmarks.speed.compute --base FOLDER --layers 6 --layers 12 --k 64

writes benchmarks/results/compute.json.
"""

from __future__ import annotations

import ctypes
import gc
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from benchmarks.common import records
from modeling_mfn import MFNForCausalLM
from modeling_mfn.demo.assets import smollm2
from modeling_mfn.model.feature_weights import FeatureEncoder
from modeling_mfn.model.modes import evaluating

MIB = 2**20
Costs = dict[str, dict[str, float]]
"""Figure -> `{"base", "MFN", "ratio"}`, where the ratio is MFN / base."""


def compute_cost(
    model: MFNForCausalLM, base: PreTrainedModel, input_ids: Tensor, *, rounds: int = 7, new_tokens: int = 32
) -> Costs:
    """Compares the cost of a forward pass, a training step and generation.

    - `parameters`;
    - `flops_per_token`: see [`flops_per_token`], with T tokens to attend to;
    - `forward_tokens_per_second`;
    - `training_tokens_per_second`: forward and backward of the next-token loss, without an optimizer;
    - `generation_ms_per_token`: greedy, cached, one row; the prompt is half of the first row;
    - `forward_memory_mib`, `training_memory_mib`: peak memory above the level before, see [`peak_memory`].

    Times are medians over rounds, after one round to warm up. The two models take turns in each round. Gradients that
    the models hold are lost.

    Args:
        model: an MFN model.
        base: its base model, on the same device and of the same precision.
        input_ids: (B, T) tokens, B T in each forward pass.
        rounds: number of timed rounds.
        new_tokens: tokens to generate.
    """
    models: dict[str, PreTrainedModel] = {"base": base, "MFN": model}
    prompt = input_ids[:1, : max(1, input_ids.shape[1] // 2)]

    def forward(each: Any) -> None:
        with torch.no_grad():
            each(input_ids=input_ids, use_cache=False)

    def train(each: Any) -> None:
        each(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        each.zero_grad(set_to_none=True)

    def generate(each: Any) -> None:
        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        mask = torch.ones_like(prompt)
        each.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, use_cache=True, **length)

    costs: Costs = {
        "parameters": {name: float(each.num_parameters()) for name, each in models.items()},
        "flops_per_token": {name: float(flops_per_token(each, input_ids.shape[1])) for name, each in models.items()},
    }
    with ExitStack() as modes:
        for each in models.values():
            modes.enter_context(evaluating(each))
        for name, work in (("forward", forward), ("training", train)):
            seconds = interleaved(models, work, rounds)
            costs[f"{name}_tokens_per_second"] = {who: input_ids.numel() / time for who, time in seconds.items()}
            costs[f"{name}_memory_mib"] = {
                who: peak_memory(lambda: work(each), each.device) / MIB  # noqa: B023
                for who, each in models.items()
            }
        seconds = interleaved(models, generate, rounds)
        costs["generation_ms_per_token"] = {who: 1000 * time / new_tokens for who, time in seconds.items()}
    return {name: of | {"ratio": of["MFN"] / of["base"] if of["base"] else math.nan} for name, of in costs.items()}


def flops_per_token(model: PreTrainedModel, context: int) -> int:
    """Floating-point operations of the matrix products in one token's forward, 2 for each multiply and add.

    Each weight of a projection and of the LM head counts once. Attention counts `context` positions twice: for scores
    and for values. In an MFN layer the encoder counts m d. The decoder gathers K rows and counts K d. Everything else
    is small in comparison and left out.
    """
    config = model.config
    width = config.num_attention_heads * (
        getattr(config.get_text_config(), "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    products = 2 * config.num_hidden_layers * context * width
    products += sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D | FeatureEncoder))
    if isinstance(model, MFNForCausalLM):
        products += len(model.mfn_layers) * config.k * config.hidden_size
    return 2 * products


def interleaved(models: dict[str, Any], work: Callable[[Any], None], rounds: int) -> dict[str, float]:
    """Median seconds of some work for each of several models.

    The models take turns, so that other load on the machine affects all of them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            _wait(model.device)
            begun = time.perf_counter()
            work(model)
            _wait(model.device)
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def peak_memory(work: Callable[[], None], device: torch.device) -> float:
    """Peak memory of some work in bytes, above the level before it.

    Allocated memory on a CUDA device, resident memory on a CPU under Linux, NaN on other systems.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return float(torch.cuda.max_memory_allocated(device) - before)
    _return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the resident memory
    except OSError:
        return math.nan
    before = _resident("VmHWM")
    work()
    return float(_resident("VmHWM") - before)


def _return_freed_memory() -> None:
    """Returns freed memory that the C library holds to the system. Reuse of such memory would not raise the peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(value)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(
    base: Annotated[str | None, typer.Option(help="Base model: a folder or a Hub id; SmolLM2-135M by default.")] = None,
    layers: Annotated[list[int] | None, typer.Option(help="Block with an MFN layer; all by default.")] = None,
    expansion_factor: Annotated[int, typer.Option(help="Features as a multiple of the hidden size.")] = 8,
    k: Annotated[int, typer.Option(help="Active features per token.")] = 32,
    rows: Annotated[int, typer.Option(help="Windows in a batch.")] = 4,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 128,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 7,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
) -> None:
    """Measures, prints a table and writes the results."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    source = base or smollm2()
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    places = {"layers": list(layers) if layers else "all", "expansion_factor": expansion_factor, "k": k}
    model = MFNForCausalLM.from_base(plain, alpha=1.0, **places)
    input_ids = torch.randint(plain.config.vocab_size, (rows, window))
    costs = compute_cost(model, plain, input_ids, rounds=rounds)
    table = Table("", "base", "MFN", "MFN / base")
    for name, of in costs.items():
        table.add_row(name.replace("_", " "), f"{of['base']:,.4g}", f"{of['MFN']:,.4g}", f"{of['ratio']:.3f}")
    Console().print(table)
    record = {
        "command": records.command_line("speed.compute"),
        "base": Path(source).name,
        "input": [rows, window],
        **places,
        "processor": platform.machine(),
        "threads": threads,
        "torch": torch.__version__,
        "costs": {
            name: {column: None if math.isnan(value) else value for column, value in of.items()}
            for name, of in costs.items()
        },
    }
    records.write_record(records.RESULTS / "compute.json", record)


if __name__ == "__main__":
    typer.run(main)
