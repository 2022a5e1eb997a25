"""Time of a training step in two source trees of this project, such as the trees before and after a change.

The small Llama (d = 192, 4 blocks, m = 1,536, k = 32) is trained at alpha = 1 on batches of 8 x 256 random tokens. A
step is the forward pass, the losses and the backward pass. Each tree trains in a process of its own, once with the
losses of the recipe and once with all five. The processes take turns in each round. Figures are medians, by the clock
and by processor time. Other load on the machine disturbs processor time less.

    python -m benchmarks.speed.training_step BEFORE AFTER    # folders that contain modeling_mfn

writes benchmarks/results/training_step.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import records, small_models
from benchmarks.small.fidelity import RECIPE, WEIGHTS, K

WORKER = Path(__file__).with_name("training_step_worker.py")
ROWS, WINDOW = 8, 256
WARM_UP = 3
LOSSES: dict[str, dict[str, Any]] = {"recipe": RECIPE, "all five": RECIPE | WEIGHTS}
"""Name -> training arguments."""


class Worker:
    """A process that trains with the code of one tree, a step at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._read()  # ready for the first step

    def step(self) -> dict[str, float]:
        """Seconds (`clock` and `processor`) and `loss` of the next step."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended early with exit code {self.process.wait()}; its error is above")
        found: dict[str, float] = json.loads(line)
        return found


@contextmanager
def worker(tree: Path, settings: dict[str, Any]) -> Iterator[Worker]:
    """Worker that imports modeling_mfn from a tree.

    Raises:
        ValueError: if the tree does not contain modeling_mfn.
    """
    if not (tree / "modeling_mfn" / "__init__.py").is_file():
        raise ValueError(f"{tree} does not contain modeling_mfn")
    environment = os.environ | {"PYTHONPATH": str(tree.resolve())}
    command = [sys.executable, str(WORKER), json.dumps(settings)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
    try:
        yield Worker(process)
    finally:
        process.kill()
        process.wait()


def compare(trees: dict[str, Path], rounds: int, threads: int) -> dict[str, Any]:
    """Losses -> median milliseconds by tree, their ratio after / before, and the loss of the first step."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        base = Path(folder) / "base"
        small_models.untrained("llama", 0).save_pretrained(base)
        common = {
            "base": str(base), "output": folder, "rows": ROWS, "window": WINDOW, "steps": WARM_UP + rounds + 1,
            "num_features": 8 * small_models.HIDDEN, "k": K, "threads": threads,
        }  # fmt: skip
        workers = {
            (losses, name): running.enter_context(worker(tree, common | {"arguments": arguments}))
            for losses, arguments in LOSSES.items()
            for name, tree in trees.items()
        }
        steps: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in workers}
        for _ in track(range(WARM_UP + rounds), "rounds"):
            for key, process in workers.items():
                steps[key].append(process.step())
    found: dict[str, Any] = {}
    for losses in LOSSES:
        found[losses] = {"loss_of_first_step": {name: round(steps[losses, name][0]["loss"], 5) for name in trees}}
        for kind in ("clock", "processor"):
            times = {
                name: 1000 * statistics.median(step[kind] for step in steps[losses, name][WARM_UP:]) for name in trees
            }
            found[losses][kind] = {name: round(time, 1) for name, time in times.items()}
            found[losses][kind]["ratio"] = round(times["after"] / times["before"], 3)
    return found


def main(
    before: Annotated[Path, typer.Argument(help="Tree to compare with.")],
    after: Annotated[Path, typer.Argument(help="Tree to compare.")],
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 25,
    threads: Annotated[int, typer.Option(help="Number of threads per process.")] = 1,
) -> None:
    """Measures both trees, prints a table and writes the results."""
    trees = {"before": before, "after": after}
    found = compare(trees, rounds, threads)
    table = Table("losses", "time", "before, ms", "after, ms", "after / before", title="training step")
    for losses, of in found.items():
        for kind in ("clock", "processor"):
            before_ms, after_ms, ratio = of[kind].values()
            table.add_row(losses, kind, f"{before_ms:.1f}", f"{after_ms:.1f}", f"{ratio:.3f}")
    Console().print(table)
    record = {
        "command": f"python -m benchmarks.speed.training_step BEFORE AFTER --rounds {rounds} --threads {threads}",
        "commits": {name: records.commit_of(tree) for name, tree in trees.items()},
        "input": [ROWS, WINDOW],
        "threads": threads,
        "processor": platform.machine(),
        "torch": torch.__version__,
        "losses": found,
    }
    records.write_record(records.RESULTS / "training_step.json", record)


if __name__ == "__main__":
    typer.run(main)
