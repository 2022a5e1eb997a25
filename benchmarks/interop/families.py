"""The matrix of families and claims: runs the tests of all families and keeps the outcome of each cell.

python -m benchmarks.interop.families    # a quarter of an hour on one core
"""

from __future__ import annotations

import sys
from collections import defaultdict
from importlib.metadata import version
from typing import Any

import pytest

from benchmarks.common.records import COMMIT, REPOSITORY, RESULTS, command_line, write_record

MATRIX = REPOSITORY / "tests" / "model" / "test_families.py"


class Outcomes:
    """Plugin of pytest that keeps the outcomes of tests with a family."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        """Claim -> family -> outcomes of its tests."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        """Keeps the outcome of a test, and of a setup that failed or skipped it."""
        report = yield
        of = getattr(item, "callspec", None)
        family = None if of is None else of.params.get("base", of.params.get("name"))
        if family is not None and (call.when == "call" or report.outcome != "passed"):
            claim = item.originalname.removeprefix("test_")  # type: ignore[attr-defined]
            self.cells[claim][family].add(report.outcome)
        return report


def outcome(found: set[str]) -> str:
    """Outcome of a cell: the worst of its tests."""
    return next(each for each in ("failed", "skipped", "passed") if each in found)


def main() -> None:
    """Runs the matrix and writes its record."""
    outcomes = Outcomes()
    # an empty expression takes the place of the one that leaves slow tests out
    status = pytest.main([str(MATRIX), "-q", "-m", "", "-p", "no:cacheprovider"], plugins=[outcomes])
    cells = {
        claim: {family: outcome(found) for family, found in sorted(of.items())} for claim, of in outcomes.cells.items()
    }
    record = {
        "command": command_line("interop.families"),
        "commit": COMMIT,
        "versions": {name: version(name) for name in ("transformers", "torch", "peft")},
        "cells": cells,
    }
    write_record(RESULTS / "interop" / "families.json", record)
    sys.exit(status)


if __name__ == "__main__":
    main()
