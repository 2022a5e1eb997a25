"""Runs of tests in a forked process, with the source of a module changed.

A forked process has torch and transformers already, and imports the package anew. So a run takes seconds.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

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

    finder = _Finder(file, source)
    if finder.name in sys.modules:
        raise RuntimeError(f"{finder.name} is imported already, so its source cannot change")

    def run() -> int:
        import pytest

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
