"""Memory and speed of the explorer's server with SmolLM2-135M, one of whose blocks has an MFN layer.

The layer is calibrated, not trained, because neither figure depends on training. A process of its own serves the
model. Its resident memory is read once it answers, and again after 20 requests of all kinds.

    python -m benchmarks.explorer.server [--tokens 1024 --rounds 4]

writes benchmarks/results/explorer/server.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.common import records
from modeling_mfn import FeatureAtlas, MFNForCausalLM, load_text, pack
from modeling_mfn.demo.assets import shakespeare, smollm2

LAYER, WINDOW, K, EXPANSION = 15, 128, 32, 8
TEXT = "The king and the queen walked through the old town by night, and nobody in the streets knew their names."
STEERED = {f"L{LAYER}/1": {"kind": "clamp", "value": 4.0}}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    *[("read", {"text": TEXT})] * 7,
    *[("predict", {"text": TEXT, "interventions": STEERED})] * 5,
    *[("explain", {"text": TEXT})] * 3,
    *[("perplexity", {"text": TEXT, "interventions": STEERED, "control": {"interventions": {}}})] * 2,
    *[("generate", {"prompt": TEXT, "interventions": STEERED, "max_new_tokens": 20})] * 3,
]
"""One round of requests."""


def make_model(folder: Path, tokens: int) -> dict[str, Any]:
    """Writes a model with its atlas and tokenizer, and describes it."""
    base = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = pack(load_text(shakespeare()[0]), tokenizer, WINDOW).select(range(tokens // WINDOW))
    calibration = {"input_ids": torch.tensor(rows[:8]["input_ids"])}
    settings = {"layers": [LAYER], "k": K, "expansion_factor": EXPANSION, "alpha": 1.0}
    model = MFNForCausalLM.from_base(base, calibration=calibration, **settings)
    atlas = FeatureAtlas.build(model, tokenizer, rows)
    for part in (model, tokenizer, atlas):
        part.save_pretrained(folder)
    return {
        "model": "SmolLM2-135M with one MFN layer",
        "layers": model.config.layers,
        "num_features": model.config.num_features,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters_mb": round(sum(each.numel() * each.element_size() for each in model.parameters()) / 2**20, 1),
        "atlas_mb": round(sum(file.stat().st_size for file in (folder / "features").iterdir()) / 2**20, 1),
    }


@contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int, dict[str, float]]]:
    """Serves a model in a process of its own; gives the process, its port, and its memory before the model."""
    command = [sys.executable, "-m", "benchmarks.explorer.server_worker", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(records.REPOSITORY)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        yield process, told.pop("port"), told
    finally:
        process.terminate()
        process.wait()


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> float:
    """Asks a server and returns the seconds until its whole answer is there."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/{path}", data, {"Content-Type": "application/json"})
    begun = time.perf_counter()
    with urllib.request.urlopen(request) as answer:
        answer.read()
    return time.perf_counter() - begun


def resident_mb(process: subprocess.Popen[str]) -> float:
    """Resident memory of a process in MiB."""
    return round(psutil.Process(process.pid).memory_info().rss / 2**20, 1)


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Asks a server of the model all requests, some rounds."""
    seconds: dict[str, list[float]] = {}
    with serving(folder) as (process, port, before):
        ask(port, "session")
        resident = {**before, "after load": resident_mb(process)}
        for number in range(rounds):
            for path, body in REQUESTS:
                seconds.setdefault(path, []).append(ask(port, path, body))
            resident[f"after {len(REQUESTS) * (number + 1)} requests"] = resident_mb(process)
    return {
        "resident_mb": resident,
        "median_seconds": {path: round(statistics.median(found), 3) for path, found in seconds.items()},
        "requests": {path: len(found) for path, found in seconds.items()},
    }


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of the atlas.")] = 1024,
    rounds: Annotated[int, typer.Option(help="Rounds of 20 requests.")] = 4,
) -> None:
    """Measures the server and writes the results."""
    with tempfile.TemporaryDirectory() as scratch:
        record = {
            "command": records.command_line("explorer.server"),
            "commit": records.COMMIT,
            "processor": platform.machine(),
            "processors": os.cpu_count(),
            "load_average": [round(load, 1) for load in os.getloadavg()],  # of other programs, before the measurement
            "torch": torch.__version__,
            "text_tokens": len(AutoTokenizer.from_pretrained(smollm2())(TEXT)["input_ids"]),
            **make_model(Path(scratch), tokens),
            **measure(Path(scratch), rounds),
        }
    Console().print_json(data=record)
    records.write_record(records.RESULTS / "explorer" / "server.json", record)


if __name__ == "__main__":
    typer.run(main)
