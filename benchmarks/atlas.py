"""What a harvest costs beside the bare forward pass of the same model on the same text, and how its memory grows.

SmolLM2-135M with MFN layers in four blocks, fresh and calibrated, reads Shakespeare. Bare forward (the model without
its LM head, and with it) and harvest take the same batches in turn, round after round; figures are medians over rounds,
by the clock and by the processor's time, which other work on the machine disturbs less. Then the harvest goes on alone,
and its resident memory is read after so many tokens.

    python benchmarks/atlas.py [--layers 6,12,18,24 --num-features 4608 --alpha 1 --rounds 20 --memory 100000,1000000]

writes benchmarks/results/atlas.json.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import chain, repeat
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from rich.console import Console
from rich.progress import track
from transformers import AutoTokenizer

from modeling_mfn import MFNForCausalLM
from modeling_mfn.atlas.directions import recording_scales
from modeling_mfn.atlas.harvest import count_in
from modeling_mfn.atlas.harvest_state import HarvestState
from modeling_mfn.atlas.statistics import ExampleLimits
from modeling_mfn.atlas.text_windows import TextWindows
from modeling_mfn.demo_assets import shakespeare, smollm2

RESULTS = Path(__file__).parent / "results"


def make_model(layers: list[int], num_features: int, k: int, alpha: float, windows: TextWindows) -> MFNForCausalLM:
    torch.manual_seed(0)
    rows = iter(windows)
    calibration = {"input_ids": torch.tensor([next(rows)["input_ids"] for _ in range(8)])}
    return MFNForCausalLM.from_base(
        smollm2(), layers=layers, num_features=num_features, k=k, alpha=alpha, calibration=calibration
    ).eval()


def batches(windows: TextWindows, batch_size: int) -> Any:
    """Batches of the text, which starts anew when it is over."""
    rows = chain.from_iterable(repeat(windows))
    while True:
        chunk = [next(rows) for _ in range(batch_size)]
        yield {name: [row[name] for row in chunk] for name in chunk[0]}


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """By the clock, and of the processor."""
    start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def resident_mb() -> float:
    return psutil.Process().memory_info().rss / 2**20


@torch.no_grad()
def main(
    layers: Annotated[str, typer.Option(help="Blocks with an MFN layer.")] = "6,12,18,24",
    num_features: Annotated[int, typer.Option(help="m.")] = 4608,
    k: Annotated[int, typer.Option(help="K.")] = 32,
    alpha: Annotated[float, typer.Option(help="Blend of the model.")] = 1.0,
    window: Annotated[int, typer.Option(help="T.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Windows a batch.")] = 8,
    warm_up: Annotated[int, typer.Option(help="Batches harvested before the first round.")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds of all variants in turn.")] = 20,
    memory: Annotated[
        str, typer.Option(help="Tokens after which memory is read; 0 to leave it out.")
    ] = "100000,1000000",
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    windows = TextWindows(shakespeare()[0], tokenizer, window)
    model = make_model([int(layer) for layer in layers.split(",")], num_features, k, alpha, windows)
    state = HarvestState(model.config.layers, num_features, ExampleLimits(), window)
    text = batches(windows, batch_size)
    number = 0

    def harvest_batch(rows: dict[str, list[Any]]) -> None:
        nonlocal number
        with recording_scales(model) as scales:
            count_in(state, model, rows, number * batch_size, 1, scales)
        number += 1

    variants: dict[str, Callable[[dict[str, list[Any]]], Any]] = {
        "forward without head": lambda rows: model.model(torch.tensor(rows["input_ids"]), use_cache=False),
        "forward with head": lambda rows: model(torch.tensor(rows["input_ids"]), use_cache=False),
        "harvest": harvest_batch,
    }
    for _ in range(warm_up):
        for work in variants.values():
            work(next(text))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in track(range(rounds), "rounds"):
        rows = next(text)
        for name, work in variants.items():
            times[name].append(seconds(lambda: work(rows)))  # noqa: B023
    tokens = window * batch_size
    bare = times["forward without head"]
    record: dict[str, Any] = {
        "command": f"python benchmarks/atlas.py --layers {layers} --num-features {num_features} --k {k} "
        f"--alpha {alpha:g} --window {window} --batch-size {batch_size} --warm-up {warm_up} --rounds {rounds} "
        f"--memory {memory}",
        "model": "SmolLM2-135M-Instruct (4-bit weights made float32), MFN layers fresh and calibrated",
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "tokens_per_second": {
            name: round(tokens / statistics.median(clock for clock, _ in found), 1) for name, found in times.items()
        },
        "harvest_speed_of_forward_without_head": {
            kind: round(statistics.median(a[at] / b[at] for a, b in zip(bare, times["harvest"], strict=True)), 3)
            for at, kind in enumerate(("clock", "processor"))
        },
        "resident_mb": {"before": round(resident_mb(), 1)},
    }
    for goal in [int(goal) for goal in memory.split(",") if int(goal)]:
        for _ in track(range(-(-goal // tokens) - number), f"to {goal} tokens"):
            harvest_batch(next(text))
        record["resident_mb"][f"after {goal} tokens"] = round(resident_mb(), 1)
    Console().print_json(data=record)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "atlas.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
