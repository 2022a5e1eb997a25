"""A stack that each thread and each asyncio task has for itself: what was entered in one is in force in no other."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch


class TaskStack:
    """Entries in force in the current task, the innermost last.

    A task that is created inside inherits them, and so does `asyncio.to_thread`.
    """

    def __init__(self, name: str) -> None:
        self._entries: ContextVar[tuple[tuple[object, Any], ...]] = ContextVar(name, default=())
        """Pairs of a key and an entry. The key stays if the entry is replaced."""
        self._compiled = threading.local()
        """For compiled code, which cannot read a ContextVar: `entries` as the thread's last change left them, `live`,
        the number of entries of all its tasks, and `mixed`, true once two tasks have changed them in turn."""
        self._everywhere: Counter[int] = Counter()
        """Id of a model -> number of its entries in all threads, without those that have none."""
        self._lock = threading.Lock()

    def innermost(self, model: Any) -> Any:
        """Returns the innermost entry whose first field is `model`, or `None`.

        Raises:
            ValueError: in compiled code, if two asyncio tasks of the thread are inside at once.
        """
        for _, entry in reversed(self._in_force()):
            if entry[0] is model:
                return entry
        return None

    def check_thread(self, model: Any) -> None:
        """Checks that compiled code without an entry of `model` has not overlooked one.

        Raises:
            ValueError: if another thread has one, which this thread may have inherited: compiled code cannot tell.
        """
        if torch.compiler.is_compiling() and id(model) in self._everywhere:
            raise ValueError(
                "the model is steered in another thread, and compiled code cannot tell whether this one began inside; "
                "enter steer({}) in this thread, which goes on with the contexts that it inherited"
            )

    def _in_force(self) -> tuple[tuple[object, Any], ...]:
        if not torch.compiler.is_compiling():
            return self._entries.get()
        if getattr(self._compiled, "mixed", False):
            raise ValueError("two asyncio tasks steer in one thread; a compiled model can be steered by one at a time")
        entries: tuple[tuple[object, Any], ...] = getattr(self._compiled, "entries", ())
        return entries

    @contextmanager
    def entered(self, entry: Any, left: Callable[[list[Any]], list[Any]] = list) -> Iterator[None]:
        """Puts an entry in force until the block is left, in whatever order blocks are left.

        Args:
            entry: tuple whose first field is a model.
            left: what becomes of the other entries if this one is not the innermost when it is left.
        """
        key, outer = object(), self._entries.get()
        entered = (*outer, (key, entry))
        self._change(entered, entry[0], 1)
        try:
            yield
        finally:
            self._change(outer if self._entries.get() is entered else self._without(key, left), entry[0], -1)

    def _without(self, key: object, left: Callable[[list[Any]], list[Any]]) -> tuple[tuple[object, Any], ...]:
        others = [pair for pair in self._entries.get() if pair[0] is not key]
        return tuple(zip([key for key, _ in others], left([entry for _, entry in others]), strict=True))

    def _change(self, entries: tuple[tuple[object, Any], ...], model: Any, by: int) -> None:
        with self._lock:
            self._everywhere[id(model)] += by
            self._everywhere += Counter()  # drops what is 0
        compiled = self._compiled
        live = getattr(compiled, "live", 0)
        changed_by_another = live > 0 and compiled.entries is not self._entries.get()
        compiled.mixed = live + by > 0 and (changed_by_another or getattr(compiled, "mixed", False))
        # what a thread inherited is its task's alone, and would stay in force in the thread's next task
        compiled.entries, compiled.live = entries if live + by else (), live + by
        self._entries.set(entries)


__all__ = ["TaskStack"]
