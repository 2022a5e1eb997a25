"""Lines and branches of the package that the tests run.

    python -m benchmarks.reliability.branches    # after `coverage run` and `coverage combine`, as in `make coverage`

Results: benchmarks/results/reliability/coverage.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import typer

from benchmarks.common import records

FILE = records.RESULTS / "reliability" / "coverage.json"
COUNTS = {
    "lines": "num_statements",
    "lines_run": "covered_lines",
    "branches": "num_branches",
    "branches_run": "covered_branches",
}
"""Count -> its name in the report of coverage."""


def folder_of(file: str) -> str:
    """Folder of a file of the package, such as `model`."""
    inside = Path(file).parts[1:]
    return inside[0] if len(inside) > 1 else "modeling_mfn"


def by_folder(report: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Counts of each folder, from the report of coverage."""
    folders: dict[str, Counter[str]] = defaultdict(Counter)
    for file, of in report["files"].items():
        folders[folder_of(file)].update({count: of["summary"][name] for count, name in COUNTS.items()})
    return {folder: dict(folders[folder]) for folder in sorted(folders)}


def main() -> None:
    """Writes the counts of each folder. Fails if the share in all is lower than `fail_under` in pyproject.toml."""
    from coverage import Coverage

    measured = Coverage()
    measured.load()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "report.json")
        percent = measured.json_report(outfile=str(file))
        folders = by_folder(json.loads(file.read_text(encoding="utf-8")))
    record = {"command": "make coverage", "commit": records.COMMIT, "percent": percent, "folders": folders}
    records.write_record(FILE, record)
    least = measured.get_option("report:fail_under")
    print(f"{percent:.1f} % of lines and branches are run; at least {least} % must be")
    if percent < least:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
