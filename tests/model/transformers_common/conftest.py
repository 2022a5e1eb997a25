"""Collects transformers' common tests only if this folder is named, because they are fetched and take minutes.

The run fails if an MFN model does not pass a test that its plain base model passes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from transformers_common.fetch import fetch_tests
from transformers_common.skips import SKIPS

HERE = Path(__file__).resolve().parent
MARKERS = [
    "slow",
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "torch_compile_test",
]

outcomes: dict[tuple[str, str], set[str]] = defaultdict(set)
"""(test class, test) -> outcomes of the test and of its subtests."""


def is_asked_for(config: pytest.Config) -> bool:
    paths = (config.invocation_params.dir / argument.partition("::")[0] for argument in config.args)
    return any(path.resolve().is_relative_to(HERE) for path in paths)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.is_relative_to(HERE) and not is_asked_for(config) else None


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: set by transformers' own tests")
    if is_asked_for(config):
        fetch_tests()  # before pytest-xdist starts workers that would each fetch them


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path, *names = report.nodeid.split("::")
    if path.endswith(f"{HERE.name}/test_common.py"):
        outcomes[tuple(names)].add(report.outcome)


def verdict(test_class: str, test: str) -> str:
    found = outcomes.get((test_class, test), {"not run"})
    return next(outcome for outcome in ("failed", "skipped", "passed", "not run") if outcome in found)


def faults(config: pytest.Config) -> Iterator[str]:
    """Yields a line for each skip that `SKIPS` must explain, and for each outdated entry of `SKIPS`.

    A skip of an MFN model needs an entry if the plain base model passes the test.
    """
    further = set()
    for test_class, test in outcomes:
        base = test_class.removeprefix("MFN").removesuffix("Update")
        if verdict(test_class, test) == "skipped" and verdict(base, test) == "passed":
            further.add((test_class, test))
    for test_class, test in sorted(further - SKIPS.keys()):
        yield f"{test_class}::{test} is skipped, but passes for the plain model"
    chosen = config.option.keyword or any("::" in argument for argument in config.args)
    whole = is_asked_for(config) and not chosen
    for test_class, test in sorted(SKIPS.keys() - further):
        if whole or (test_class, test) in outcomes:
            yield f"{test_class}::{test} is in skips.py, but is no further skip (any more)"


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    is_worker = hasattr(session.config, "workerinput")
    if not is_worker and any(faults(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for test_class, test in outcomes:
        counts[test_class][verdict(test_class, test)] += 1
    for test_class, count in counts.items():
        terminalreporter.write_line(
            f"{test_class}: " + ", ".join(f"{count[o]} {o}" for o in ("passed", "skipped", "failed"))
        )
    for fault in faults(config):
        terminalreporter.write_line(fault, red=True)
