"""Tests by the lines that they run, as coverage sees them."""

from __future__ import annotations

import ast
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.reliability.mutated_runs import in_fork

FILES = 2
"""Files of tests for a line that runs at import. Each one takes time to import."""


class Reached(NamedTuple):
    """Tests by the lines that they run."""

    seconds: dict[str, float]
    """Test -> its time."""
    lines: dict[str, dict[int, list[str]]]
    """File -> line -> tests. Lines that run only while the module is imported have none."""

    def tests(self, file: str, line: int) -> list[str]:
        """Returns the tests that run a line. Files with most words of the module's name come first, and quick tests.

        For a line that runs at import, these are the tests in a few files: those with most words of the module's name,
        then those that have most tests of what uses the line. That is lines that name what it defines, else the
        function or class around it, else the whole module.
        """
        own, *others = (
            {test for each in lines for test in self.lines[file].get(each, ())}
            for lines in _nearest_lines(ast.parse(Path(file).read_text(encoding="utf-8")), line)
        )
        if own:
            return sorted(own, key=lambda test: (-_common_words(_file_of(test), file), self.seconds[test]))
        counts = Counter(_file_of(test) for test in next(filter(None, others), ()))
        files = sorted(counts, key=lambda name: (-_common_words(name, file), -counts[name]))[:FILES]
        return sorted((test for test in self.seconds if _file_of(test) in files), key=lambda test: self.seconds[test])

    def write(self, file: Path) -> None:
        """Writes the tables as JSON."""
        file.write_text(json.dumps(self._asdict()), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Reached:
        """Reads what `write` wrote."""
        found = json.loads(file.read_text(encoding="utf-8"))
        lines = {name: {int(line): tests for line, tests in of.items()} for name, of in found["lines"].items()}
        return cls(found["seconds"], lines)


def _file_of(test: str) -> str:
    return test.partition("::")[0]


def _common_words(tests: str, module: str) -> int:
    return len({*Path(module).stem.split("_")} & {*Path(tests).stem.split("_")})


def _nearest_lines(tree: ast.Module, line: int) -> Iterable[set[int]]:
    """Yields the lines that tell which tests reach `line`, the best choice first."""
    around = [node for node in ast.walk(tree) if _first_line(node) <= line <= getattr(node, "end_lineno", 0)]
    statement = [node for node in around if isinstance(node, ast.stmt)][-1]
    yield _lines_of(statement)
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    names = {getattr(target, "id", "") for target in targets}
    users = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and names & _names_read(node)]
    yield set().union(*(_lines_of(node) for node in users))
    for node in reversed(around):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield set(range(node.lineno, (node.end_lineno or 0) + 1))
    yield set().union(*(range(node.lineno, (node.end_lineno or 0) + 1) for node in tree.body))


def _first_line(node: ast.AST) -> float:
    """First line of a node, decorators included."""
    return min(getattr(each, "lineno", math.inf) for each in (node, *getattr(node, "decorator_list", ())))


def _lines_of(statement: ast.stmt) -> set[int]:
    """Lines of a statement; its head alone, if it has a body."""
    body = getattr(statement, "body", None)
    end = body[0].lineno - 1 if body else statement.end_lineno or 0
    return set(range(int(_first_line(statement)), end + 1))


def _names_read(statement: ast.stmt) -> set[str]:
    """Names and attributes that a statement reads, those of a body apart."""
    inside = {id(each) for part in getattr(statement, "body", ()) for each in ast.walk(part)}
    found = [node for node in ast.walk(statement) if id(node) not in inside]
    read = [getattr(node, "id", None) or getattr(node, "attr", "") for node in found if _is_read(node)]
    return set(read)


def _is_read(node: ast.AST) -> bool:
    return isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load)


def measure(files: Sequence[str], tests: Sequence[str]) -> Reached:
    """Runs tests once, each of which must pass, and returns those that run each line of some files."""
    return in_fork(partial(_measure, files, tests))


def _measure(files: Sequence[str], tests: Sequence[str]) -> Reached:
    from coverage import Coverage

    seen = Coverage(data_file=None, include=list(files), config_file=False)
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
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"the tests do not pass as they are (exit code {int(code)})")
    data, lines = seen.get_data(), {}
    for file in files:
        by_line = data.contexts_by_lineno(str(Path(file).resolve()))
        lines[file] = {line: sorted(set(tests) - {""}) for line, tests in by_line.items()}
    return Reached(dict(seconds), lines)
