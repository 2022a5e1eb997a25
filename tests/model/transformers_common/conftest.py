"""Collects transformers' model tests only if this folder is named, because they are fetched and take minutes.

The run fails if an MFN model does not pass a test that its plain base model passes. It says so if the suites of
generation and of causal LMs are not at hand. With `REQUIRE_ALL_SUITES=1` in the environment it then fails.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from transformers_common.fetch import FOLDER_VARIABLE, fetch_tests, lacks_suites
from transformers_common.skips import SKIPS

HERE = Path(__file__).resolve().parent
MARKERS = [
    "slow",
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "torch_compile_test",
    "generate",
    "is_training_test",
    "is_tensor_parallel_test",
    "is_fsdp_test",
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
        # before pytest-xdist starts workers that would each fetch them
        os.environ[FOLDER_VARIABLE] = str(fetch_tests())


def missing_suites() -> str | None:
    """Sentence about the suites that are not at hand."""
    folder = Path(os.environ.get(FOLDER_VARIABLE, ""))
    if not lacks_suites(folder):
        return None
    return f"not run: transformers' suites of generation and of causal LMs; {folder} has only the common tests"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path, *names = report.nodeid.split("::")
    if path.endswith(f"{HERE.name}/test_common.py"):
        outcomes[tuple(names)].add(report.outcome)


def base_of(test_class: str) -> str:
    return test_class.removeprefix("MFN").removesuffix("Update")


def verdict(test_class: str, test: str) -> str:
    found = outcomes.get((test_class, test), {"not run"})
    return next(outcome for outcome in ("failed", "skipped", "passed", "not run") if outcome in found)


def faults(config: pytest.Config) -> Iterator[str]:
    """Yields a line for each skip that `SKIPS` must explain, and for each outdated entry of `SKIPS`.

    A skip of an MFN model needs an entry if the plain base model passes the test.
    """
    further = set()
    for test_class, test in outcomes:
        if verdict(test_class, test) == "skipped" and verdict(base_of(test_class), test) == "passed":
            further.add((test_class, test))
    for test_class, test in sorted(further - SKIPS.keys()):
        yield f"{test_class}::{test} is skipped, but passes for the plain model"
    chosen = config.option.keyword or any("::" in argument for argument in config.args)
    whole = is_asked_for(config) and not chosen
    for test_class, test in sorted(SKIPS.keys() - further):
        if whole or {(test_class, test), (base_of(test_class), test)} <= outcomes.keys():
            yield f"{test_class}::{test} is in skips.py, but is no further skip (any more)"


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    is_worker = hasattr(session.config, "workerinput")
    incomplete = is_asked_for(session.config) and os.environ.get("REQUIRE_ALL_SUITES") and missing_suites()
    if not is_worker and (incomplete or any(faults(session.config))):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for test_class, test in outcomes:
        counts[test_class][verdict(test_class, test)] += 1
    for test_class, count in counts.items():
        terminalreporter.write_line(
            f"{test_class}: " + ", ".join(f"{count[o]} {o}" for o in ("passed", "skipped", "failed"))
        )
    if is_asked_for(config) and (missing := missing_suites()):
        terminalreporter.write_line(missing, yellow=True)
    for fault in faults(config):
        terminalreporter.write_line(fault, red=True)
