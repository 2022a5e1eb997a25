"""Turns at the model: one thread runs it at a time, in the order in which threads came."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Turns:
    """A lock that is handed on in the order of arrival.

    Attribution hooks into the model's layers for a moment, and sampling uses the random numbers of the whole process.
    So two passes must never run at the same time. A generation hands its turn on after every token.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._given = 0
        """Number of the next thread that comes."""
        self._serving = 0
        """Number of the thread whose turn it is."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for a turn and holds it until the block is left."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    def pass_on(self, device: torch.device) -> None:
        """Lets the threads that wait now go first; random numbers then go on as if they had not run.

        Args:
            device: Device of the model.
        """
        if self._serving + 1 == self._given:
            return
        on_gpu = device.type == "cuda"
        state = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None
        self._end()
        self._begin()
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)

    def _begin(self) -> None:
        with self._changed:
            number = self._given
            self._given += 1
            self._changed.wait_for(lambda: self._serving == number)

    def _end(self) -> None:
        with self._changed:
            self._serving += 1
            self._changed.notify_all()


__all__ = ["Turns"]
