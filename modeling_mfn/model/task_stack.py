"""A stack that each thread and each asyncio task has for itself: what was entered in one is in force in no other."""

from __future__ import annotations

import threading
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

    def innermost(self, model: Any) -> Any:
        """Returns the innermost entry whose first field is `model`, or `None`.

        Raises:
            ValueError: in compiled code, if two asyncio tasks of the thread are inside at once.
        """
        for _, entry in reversed(self._in_force()):
            if entry[0] is model:
                return entry
        return None

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
        self._change(entered, 1)
        try:
            yield
        finally:
            self._change(outer if self._entries.get() is entered else self._without(key, left), -1)

    def _without(self, key: object, left: Callable[[list[Any]], list[Any]]) -> tuple[tuple[object, Any], ...]:
        others = [pair for pair in self._entries.get() if pair[0] is not key]
        return tuple(zip([key for key, _ in others], left([entry for _, entry in others]), strict=True))

    def _change(self, entries: tuple[tuple[object, Any], ...], by: int) -> None:
        compiled = self._compiled
        live = getattr(compiled, "live", 0)
        changed_by_another = live > 0 and compiled.entries is not self._entries.get()
        compiled.mixed = live + by > 0 and (changed_by_another or getattr(compiled, "mixed", False))
        compiled.entries, compiled.live = entries, live + by
        self._entries.set(entries)


__all__ = ["TaskStack"]
