"""Runs of tests in forked processes: which tests run a line of a module, and what they say when it is changed.

A forked process has torch and transformers already, and imports the package anew. So a run takes seconds.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.util
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

KILLED, TIMED_OUT, SURVIVED = "killed", "timed out", "survived"
PRELOADED = ("torch", "transformers", "accelerate", "datasets", "peft", "pyarrow", "hypothesis", "pytest")
"""Packages that a run needs and does not change."""
SPARE_SECONDS = 30
"""Time of a run beside that of its tests, for imports."""
SLOWER = 5
"""Factor of the measured time after which a run hangs."""
BYTES = 16 << 30
"""Address space of a run."""


def preload() -> None:
    """Imports what the forked processes share."""
    for name in PRELOADED:
        importlib.import_module(name)


class Reached(NamedTuple):
    """Tests by the lines that they run."""

    seconds: dict[str, float]
    """Test -> its time."""
    lines: dict[str, dict[int, list[str]]]
    """File -> line -> tests. Lines that run only while the module is imported have none."""

    def tests(self, file: str, line: int) -> list[str]:
        """Returns the tests that run a line, the quickest first.

        For a line that runs at import, these are the tests of whatever uses it: of the lines that name what it
        defines, else of the function or class around it, else of the whole module.
        """
        by_line = self.lines[file]
        for lines in _nearest_lines(ast.parse(Path(file).read_text(encoding="utf-8")), line):
            tests = {test for each in lines for test in by_line.get(each, ())}
            if tests:
                return sorted(tests, key=lambda test: self.seconds[test])
        return sorted(self.seconds, key=lambda test: self.seconds[test])

    def write(self, file: Path) -> None:
        """Writes the tables as JSON."""
        file.write_text(json.dumps(self._asdict()), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Reached:
        """Reads what `write` wrote."""
        found = json.loads(file.read_text(encoding="utf-8"))
        lines = {name: {int(line): tests for line, tests in of.items()} for name, of in found["lines"].items()}
        return cls(found["seconds"], lines)


def _nearest_lines(tree: ast.Module, line: int) -> Iterable[Iterable[int]]:
    """Yields the lines that tell which tests reach `line`, the best choice first."""
    around = [node for node in ast.walk(tree) if _first(node) <= line <= getattr(node, "end_lineno", 0)]
    statement = [node for node in around if isinstance(node, ast.stmt)][-1]
    body = getattr(statement, "body", None)
    yield range(_first(statement), body[0].lineno if body else (statement.end_lineno or 0) + 1)
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        names = {getattr(target, "id", None) for target in targets}
        yield [
            node.lineno
            for node in ast.walk(tree)
            if (isinstance(node, ast.Name) and node.id in names)
            or (isinstance(node, ast.Attribute) and node.attr in names)
        ]
    for node in reversed(around):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield range(node.lineno, (node.end_lineno or 0) + 1)
    yield range(1, max(node.end_lineno or 0 for node in tree.body) + 1)


def _first(node: ast.AST) -> int:
    """First line of a node, decorators included."""
    lines = [each.lineno for each in (node, *getattr(node, "decorator_list", ())) if hasattr(each, "lineno")]
    return min(lines, default=sys.maxsize)


def measure(files: Sequence[str], tests: Sequence[str]) -> Reached:
    """Runs tests once, each of which must pass, and returns those that run each line of some files."""
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch, "reached.json")
        code = in_fork(lambda: _measure(files, tests, found), None)
        if code != 0:
            raise RuntimeError(f"the tests do not pass as they are (exit code {code})")
        return Reached.read(found)


def _measure(files: Sequence[str], tests: Sequence[str], found: Path) -> int:
    import coverage
    import pytest

    seen = coverage.Coverage(data_file=None, include=list(files), config_file=False)
    seconds: dict[str, float] = defaultdict(float)

    class Contexts:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
            seen.switch_context(item.nodeid)
            return (yield)

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            seconds[report.nodeid] += report.duration

    with seen.collect():
        code = pytest.main(["-p", "no:cacheprovider", *tests], plugins=[Contexts()])
    data = seen.get_data()
    lines = {}
    for file in files:
        of = data.contexts_by_lineno(str(Path(file).resolve()))
        lines[file] = {line: sorted(set(tests) - {""}) for line, tests in of.items()}
    Reached(dict(seconds), lines).write(found)
    return int(code)


class _Changed(SourceFileLoader):
    """Loader of a module whose source is replaced."""

    source = ""

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Finder of one module, which gives it another source than its file."""

    def __init__(self, file: str, source: str) -> None:
        self.file = file
        self.name = ".".join(Path(file).with_suffix("").parts)
        self.source = source

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        loader = _Changed(fullname, str(Path(self.file).resolve()))
        loader.source = self.source
        return importlib.util.spec_from_file_location(fullname, loader.path, loader=loader)


def run_mutated(file: str, source: str, tests: Sequence[str], seconds: float) -> str:
    """Runs tests, until one fails, with another source of a module.

    Args:
        file: the module's file, relative to the current folder, which has the package.
        source: the changed source.
        tests: pytest's ids.
        seconds: time that the tests take as a rule.

    Returns:
        `KILLED`, `TIMED_OUT` or `SURVIVED`.
    """

    def run() -> int:
        import pytest

        finder = _Finder(file, source)
        sys.meta_path.insert(0, finder)
        try:
            importlib.import_module(finder.name)
        except Exception:
            return int(pytest.ExitCode.TESTS_FAILED)
        return int(pytest.main(["-x", "-p", "no:cacheprovider", *tests]))

    code = in_fork(run, SPARE_SECONDS + SLOWER * seconds)
    if code is None:
        return TIMED_OUT
    if code not in (0, 1, 2) and code > 0:
        raise RuntimeError(f"pytest could not run {tests} with a changed {file} (exit code {code})")
    return SURVIVED if code == 0 else KILLED  # 2: the changed module cannot be imported; below 0: a crash


def in_fork(work: Callable[[], int], seconds: float | None) -> int | None:
    """Runs work in a forked process without output, and returns its exit code, or `None` if time was up."""
    process = multiprocessing.get_context("fork").Process(target=_work, args=(work,))
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        return None
    return process.exitcode


def _work(work: Callable[[], int]) -> None:
    os.setsid()  # so that processes which a test started end with it
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    code = work()
    os._exit(code)


__all__ = ["KILLED", "SURVIVED", "TIMED_OUT", "Reached", "measure", "preload", "run_mutated"]
