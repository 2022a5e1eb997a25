"""Sizes of the explorer's folder, time and memory of its writing, and times until its pages can be used.

Models of 1,024, 18,432 and 100,000 features are invented, with about 30 examples per feature. A process of its own
writes each folder. Pages are opened in Debian's chromium from disk, several times, each in a new context.

    python -m benchmarks.explorer.sizes [--features 1024,18432,100000] [--rounds 5] [--scratch DIR]

writes benchmarks/results/explorer/sizes.json. `--rounds 0` leaves the browser out. Sizes that are not asked for stay in
the file.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import records
from benchmarks.explorer.invented_atlas import LAYERS, write_model
from benchmarks.explorer.load_times import load_times

RESULT = records.RESULTS / "explorer" / "sizes.json"


def main(
    features: Annotated[str, typer.Option(help="Numbers of features.")] = "1024,18432,100000",
    rounds: Annotated[int, typer.Option(help="Times that each page is opened.")] = 5,
    scratch: Annotated[Path | None, typer.Option(help="Folder for the models and their explorers.")] = None,
) -> None:
    """Measures explorers of several sizes."""
    record = records.read_record(RESULT) if RESULT.exists() else {"sizes": {}}
    record |= {"command": records.command_line("explorer.sizes"), "commit": records.COMMIT, "rounds": rounds}
    record["machine"] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    for number in features.split(","):
        with tempfile.TemporaryDirectory(dir=scratch) as place:
            record["sizes"][number] = of = written(int(number), Path(place))
            records.write_record(RESULT, record)
            if rounds:
                of["pages"] = load_times(Path(place) / "site", middle_feature(int(number)), rounds)
                # other work of the machine disturbs times; the load says how much there was
                of["load"] = round(os.getloadavg()[0], 1)
                records.write_record(RESULT, record)


def written(features: int, place: Path) -> dict[str, Any]:
    """Writes the explorer of an invented model, and measures the writing and the files."""
    write_model(place / "model", features)
    command = [sys.executable, "-m", "benchmarks.explorer.one_site", place / "model", place / "site"]
    printed = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True).stdout
    return {"writing": json.loads(printed), "bytes": sizes(place / "site", place / "model")}


def middle_feature(features: int) -> str:
    """Name of a feature in the middle of the second layer."""
    return f"L{LAYERS[1]}/{features // len(LAYERS) // 2}"


def sizes(site: Path, model: Path) -> dict[str, int]:
    """Sizes of the files of a site."""
    files = {path.relative_to(site / "data").as_posix(): path.stat().st_size for path in (site / "data").rglob("*.js")}
    chunks = sorted(size for name, size in files.items() if name.startswith("features/"))
    return {
        "all_data": sum(files.values()),
        "site": files["site.js"],
        "list": sum(size for name, size in files.items() if name.startswith("index/")),
        "median_chunk": chunks[len(chunks) // 2],
        "largest_chunk": chunks[-1],
        "model_page": files["model.js"],
        "pages_and_libraries": sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
        - sum(files.values()),
        "atlas": sum(path.stat().st_size for path in (model / "features").iterdir()),
        "files": sum(path.is_file() for path in site.rglob("*")),
    }


if __name__ == "__main__":
    typer.run(main)
