"""Results of benchmarks: JSON files with the command and the commit that they come from."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from modeling_mfn.utils.files import write_whole

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"


def read_record(file: Path) -> dict[str, Any]:
    """Reads the record of a result."""
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def result(name: str) -> dict[str, Any]:
    """Record of a result by its path under `RESULTS`, without `.json`."""
    return read_record(RESULTS / f"{name}.json")


def results(pattern: str) -> dict[str, dict[str, Any]]:
    """File name without `.json` -> record, for all results whose path under `RESULTS` matches a pattern."""
    return {file.stem: read_record(file) for file in sorted(RESULTS.glob(f"{pattern}.json"))}


def write_record(file: Path, record: dict[str, Any]) -> None:
    """Writes the record of a result; makes the folder if necessary."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(record, indent=2) + "\n")


def command_line(module: str) -> str:
    """Command that repeats this run, for the record of a module such as `small.fidelity`."""
    return shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]])


def commit_of(folder: Path) -> str | None:
    """Short id of a folder's commit, with `-dirty` after it if Python files differ; `None` outside a repository."""
    git = ["git", "-C", str(folder)]
    try:
        known = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return known.stdout.strip() + ("-dirty" if changed else "")


COMMIT = commit_of(REPOSITORY)
"""Commit of the code that this process imported. Later commits do not change this value."""
