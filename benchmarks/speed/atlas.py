"""Speed of a harvest compared with the forward pass of the same model, and memory of a harvest.

A harvest reads text of three domains with an MFN model at alpha 1. In timed rounds the forward pass reads the same
batch, with and without the LM head. Rounds are spread evenly over the text, because the first batches have the most
new examples to keep. Figures are medians over rounds, by the clock and by processor time. Other load on the machine
disturbs processor time less.

Then a whole atlas is built, and its state is saved on the way. Resident memory is read after given numbers of tokens.

    python -m benchmarks.speed.atlas [MODEL] [--rounds 20 --speed-tokens 200000]
                                     [--tokens 1000000 --memory 100000,250000,500000]

writes benchmarks/results/atlas.json, and the atlas into the folder of the model. `--tokens 0` skips the atlas,
`--rounds 0` the speed. Skipped figures stay in the file.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from rich.console import Console
from rich.progress import track
from transformers import AutoTokenizer

from benchmarks.common import corpora, records
from benchmarks.smollm2.stages import trained_model
from modeling_mfn import FeatureAtlas, MFNForCausalLM
from modeling_mfn.features.atlas import ExampleLimits
from modeling_mfn.features.harvest.directions import recording_scales
from modeling_mfn.features.harvest.harvest import Skipped, count_batch
from modeling_mfn.features.harvest.state import HarvestState

STATE = ".harvest-benchmark"


def resident_mb() -> float:
    """Resident memory of this process in MiB."""
    return round(psutil.Process().memory_info().rss / 2**20, 1)


class WatchedWindows:
    """Windows that record the resident memory when each goal, a number of tokens, is reached, and at the end."""

    def __init__(self, rows: Sequence[dict[str, Any]], goals: Sequence[int]) -> None:
        self.rows, self.goals = rows, goals
        self.resident_mb: dict[str, float] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        goals, tokens = list(self.goals), 0
        for row in self.rows:
            yield row
            tokens += len(row["input_ids"])
            while goals and tokens >= goals[0]:
                self.resident_mb[f"after {goals.pop(0)} tokens"] = resident_mb()
        self.resident_mb[f"after all {tokens} tokens"] = resident_mb()


@torch.no_grad()
def speed(model: MFNForCausalLM, rows: Any, batch_size: int, rounds: int) -> dict[str, Any]:
    """Median speeds over rounds. In a round all variants read the same batch; the first round is for warm-up."""
    window, batches = len(rows[0]["input_ids"]), len(rows) // batch_size
    state = HarvestState(model.config.layers, model.config.num_features, ExampleLimits(), window)

    def harvest(number: int, batch: dict[str, list[Any]]) -> None:
        with recording_scales(model) as scales:
            count_batch(state, model, batch, number * batch_size, Skipped(1), scales)

    def forward(number: int, batch: dict[str, list[Any]]) -> None:
        model.model(torch.tensor(batch["input_ids"]), use_cache=False)

    def forward_with_head(number: int, batch: dict[str, list[Any]]) -> None:
        model(torch.tensor(batch["input_ids"]), use_cache=False)

    variants = {"forward without head": forward, "forward with head": forward_with_head, "harvest": harvest}
    in_rounds = {round(place) for place in np.linspace(0, batches - 1, rounds + 1)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for number in track(range(batches), "speed"):
        batch = rows[number * batch_size : (number + 1) * batch_size]
        if number not in in_rounds:
            harvest(number, batch)
            continue
        for name, work in variants.items():
            begun = time.perf_counter(), time.process_time()
            work(number, batch)
            if number:
                times[name].append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    tokens = window * batch_size
    return {
        "tokens": batches * tokens,
        "rounds": len(times["harvest"]),
        "tokens_per_second": {
            name: round(tokens / statistics.median(clock for clock, _ in found), 1) for name, found in times.items()
        },
    } | {
        f"harvest_speed_of_{bare.replace(' ', '_')}": {
            kind: round(statistics.median(a[at] / b[at] for a, b in zip(times[bare], times["harvest"], strict=True)), 3)
            for at, kind in enumerate(("clock", "processor"))
        }
        for bare in list(variants)[:2]
    }


def whole_atlas(
    model: MFNForCausalLM, tokenizer: Any, rows: Any, batch_size: int, goals: Sequence[int], folder: Path
) -> dict[str, Any]:
    """Builds the atlas in the model's folder and records time, size and resident memory."""
    watched, before, begun = WatchedWindows(rows, goals), resident_mb(), time.time()
    atlas = FeatureAtlas.build(model, tokenizer, watched, batch_size=batch_size, state_folder=folder / STATE)
    minutes = round((time.time() - begun) / 60, 1)
    atlas.save_pretrained(folder)
    size = sum(file.stat().st_size for file in (folder / "features").iterdir())
    return {
        "tokens": atlas.metadata["data"]["tokens"],
        "minutes": minutes,
        "files_mb": round(size / 2**20, 1),
        "resident_mb": {"before": before} | watched.resident_mb | {"when it is made": resident_mb()},
    }


def main(
    model: Annotated[
        Path | None, typer.Argument(help="Folder of an MFN model; default: the model of real_checkpoint.py.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Windows per batch.")] = 8,
    rounds: Annotated[int, typer.Option(help="Rounds of all variants; 0 skips the speed.")] = 20,
    speed_tokens: Annotated[int, typer.Option(help="Tokens that the rounds are spread over.")] = 200_000,
    tokens: Annotated[int, typer.Option(help="Tokens of the atlas; 0 skips the atlas.")] = 1_000_000,
    memory: Annotated[str, typer.Option(help="Numbers of tokens after which memory is read.")] = "100000,250000,500000",
    threads: Annotated[int, typer.Option(help="Number of threads.")] = 2,
) -> None:
    """Measures speed and memory and writes the results."""
    torch.set_num_threads(threads)
    folder = model or trained_model()
    tokenizer, mfn = AutoTokenizer.from_pretrained(folder), MFNForCausalLM.from_pretrained(folder).eval()
    mfn.set_blend(1.0)
    config = mfn.config
    about = {
        "command": records.command_line("speed.atlas"),
        "model": folder.name,
        "layers": config.layers,
        "num_features": config.num_features,
        "k": config.k,
        "alpha": config.alpha,
        "processor": platform.machine(),
        "processors": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
    }
    file = records.RESULTS / "atlas.json"
    record = records.read_record(file) if file.exists() else {}
    if rounds:
        rows = corpora.windows_by_source(tokenizer, 0, speed_tokens, window)
        record["speed"] = about | speed(mfn, rows, batch_size, rounds)
    if tokens:
        rows = corpora.windows_by_source(tokenizer, 0, tokens, window)
        goals = [int(goal) for goal in memory.split(",")]
        record["atlas"] = about | whole_atlas(mfn, tokenizer, rows, batch_size, goals, folder)
    Console().print_json(data=record)
    records.write_record(file, record)


if __name__ == "__main__":
    typer.run(main)
