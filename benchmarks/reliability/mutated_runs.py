"""Runs of tests in forked processes, with the source of a module changed.

Tests are collected once. A forked process then puts changed code into the functions of the module, and runs some of the
tests. A change of what runs at import needs a process that has not imported the package yet.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import pytest

KILLED, TIMED_OUT, SURVIVED = "killed", "timed out", "survived"
PRELOADED = ("torch", "transformers", "accelerate", "datasets", "peft", "pyarrow", "hypothesis")
"""Packages that tests need and no change concerns."""
OPTIONS = ("-x", "-p", "no:faulthandler", "-p", "no:cacheprovider", "-o", "tmp_path_retention_policy=none")
SPARE_SECONDS = 60
"""Time of a run beside that of its tests."""
SLOWER = 5
"""Factor of the measured time after which a run hangs."""
FIRST = 6
"""Tests that are imported first."""
BYTES = 16 << 30
"""Address space of a run."""


class Outcome(NamedTuple):
    """End of a run."""

    name: str
    """`KILLED`, `TIMED_OUT` or `SURVIVED`."""
    test: str = ""
    """Test that failed."""


def preload() -> None:
    """Imports what the forked processes share."""
    for name in PRELOADED:
        importlib.import_module(name)


def in_fork(work: Callable[[], Any], seconds: float | None = None, quiet: bool = False) -> Any:
    """Runs work in a forked process and returns what it returned.

    Raises:
        TimeoutError: if time is up.
        ChildProcessError: if the process ended without a result.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(work, sender, quiet))
    process.start()
    sender.close()
    if not receiver.poll(seconds):
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        raise TimeoutError
    try:
        returned = receiver.recv()
    except EOFError:
        raise ChildProcessError from None
    finally:
        process.join()
    if isinstance(returned, BaseException):
        raise returned
    return returned


def _work(work: Callable[[], Any], sender: Any, quiet: bool) -> None:
    os.setsid()  # so that processes which a test started end with it
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    if quiet:
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nothing, stream)
    try:
        returned = work()
    except BaseException as error:
        returned = error
    sender.send(returned)
    os._exit(0)


def _outcome(work: Callable[[], str], seconds: float) -> Outcome:
    """Outcome of work that returns the test that failed, or an empty text."""
    try:
        failed = in_fork(work, SPARE_SECONDS + SLOWER * seconds, quiet=True)
    except TimeoutError:
        return Outcome(TIMED_OUT)
    except ChildProcessError:  # a crash
        return Outcome(KILLED)
    return Outcome(KILLED, failed) if failed else Outcome(SURVIVED)


class Failure:
    """pytest's plugin that notes the test, or the file of tests, that failed."""

    def __init__(self) -> None:
        self.test = ""

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.pytest_runtest_logreport(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed and not self.test:  # the session fails, too, and has no name
            self.test = report.nodeid


class CollectedTests:
    """pytest's plugin that does work with collected tests, in place of running them all."""

    def __init__(self, work: Callable[[CollectedTests], Any]) -> None:
        self.work = work
        self.items: dict[str, pytest.Item] = {}
        self.functions: dict[str, list[FunctionType]] = {}
        self.returned: Any = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        self.returned = self.work(self)
        return True

    def run(self, file: str, source: str, tests: Sequence[str], seconds: float) -> Outcome:
        """Runs tests in a forked process, until one fails, with other code in a module's functions.

        Args:
            file: the module's file.
            source: the changed source. Lines keep their numbers.
            tests: pytest's ids.
            seconds: time that the tests take as a rule.
        """
        if file not in self.functions:
            self.functions[file] = functions_of(file)
            gc.collect()
            gc.freeze()  # so that a forked process shares the memory of what is there
        items = [self.items[test] for test in tests]

        def work() -> str:
            change_functions(self.functions[file], file, source)
            failure = Failure()
            items[0].config.pluginmanager.register(failure)
            for item, following in zip(items, [*items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if failure.test:
                    break
            return failure.test

        return _outcome(work, seconds)


def with_collected(tests: Sequence[str], work: Callable[[CollectedTests], Any]) -> Any:
    """Collects tests in a forked process, and returns what work with them returns."""

    def collect() -> Any:
        plugin = CollectedTests(work)
        trouble = _run_pytest(tests, plugin)
        if trouble:
            raise RuntimeError(trouble)
        return plugin.returned

    return in_fork(collect)


def _run_pytest(tests: Sequence[str], plugin: Any) -> str:
    """Runs pytest without output. Returns what it told if it could not run the tests, else an empty text."""
    told = io.StringIO()
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(told):
        code = pytest.main([*OPTIONS, f"--basetemp={scratch}/tests", *tests], plugins=[plugin])
    ran = code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)
    return "" if ran else f"pytest cannot run {tests}:\n{told.getvalue()}"


def functions_of(file: str) -> list[FunctionType]:
    """Returns all functions of an imported module, methods and decorated ones included."""
    path = str(Path(file).resolve())
    gc.unfreeze()  # frozen objects are not listed
    return [each for each in gc.get_objects() if type(each) is FunctionType and each.__code__.co_filename == path]


def change_functions(functions: Iterable[FunctionType], file: str, source: str) -> None:
    """Gives functions of a module the code that they have in another source."""
    whole = compile(source, str(Path(file).resolve()), "exec", dont_inherit=True)
    changed = {(code.co_name, code.co_firstlineno): code for code in _codes(whole)}
    for function in functions:
        function.__code__ = changed[function.__code__.co_name, function.__code__.co_firstlineno]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def change_source(file: str, source: str) -> None:
    """Lets this process import a module from another source. Loaders are changed, as the package has its own finder."""
    path, original = str(Path(file).resolve()), SourceFileLoader.get_code

    def get_code(loader: SourceFileLoader, name: str) -> CodeType | None:
        if loader.path != path:
            return original(loader, name)
        return compile(source, path, "exec", dont_inherit=True)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]


def run_imported(file: str, source: str, tests: Sequence[str], seconds: float) -> Outcome:
    """Runs tests in a forked process, until one fails, with another source of a module that is not imported yet.

    Args:
        file: the module's file, relative to the current folder, which has the package.
        source: the changed source.
        tests: ids.
        seconds: time that the tests take as a rule.
    """
    name = ".".join(Path(file).with_suffix("").parts)
    if name in sys.modules:
        raise RuntimeError(f"{name} is imported already, so its source cannot change")

    def work() -> str:
        change_source(file, source)
        try:
            importlib.import_module(name)
        except Exception:
            return name
        failure = Failure()
        for part in (tests[:FIRST], tests[FIRST:]):  # most changes fail early, and files take time to import
            trouble = _run_pytest(part, failure) if part and not failure.test else ""
            if trouble and not failure.test:  # else the tests could not be imported
                raise RuntimeError(trouble)
        return failure.test

    return _outcome(work, seconds)
