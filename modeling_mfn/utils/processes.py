"""The processes of `accelerate launch`: joined, and not waited for when one of them is dead."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from torch.distributed import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store
from transformers.utils import logging

logger = logging.get_logger(__name__)

BEAT, SILENCE = 1.0, 60.0
"""Seconds between two signs of life of a process, and without one until the process counts as dead."""
BEGINNING = 1800.0
"""Seconds until a process that never gave a sign counts as dead. It may still be loading something."""

_waits = itertools.count()
"""Numbers of this process' waits. Every process waits in the same order."""


def join_processes() -> PartialState:
    """Joins the processes of `accelerate launch` and returns the state that all of accelerate shares.

    On a machine without an accelerator, accelerate joins processes only if it is told that they run on CPUs.
    """
    process = PartialState(cpu=not torch.accelerator.is_available())
    if process.num_processes > 1 and not any(isinstance(thread, _Heart) for thread in threading.enumerate()):
        _Heart(process.process_index).start()
    return process


def wait_for_processes(what: str) -> None:
    """Waits until every process has come to this call.

    Args:
        what: The thing that is waited for, for the error.

    Raises:
        TimeoutError: If a process gives no sign of life: it has ended, or is stopped.
    """
    process = join_processes()
    if process.num_processes == 1:
        return
    store, number = _store(), next(_waits)
    store.set(f"{number}/{process.process_index}", what)
    ranks = range(process.num_processes)
    signs = _SignsOfLife(ranks)
    try:
        while missing := [rank for rank in ranks if not store.check([f"{number}/{rank}"])]:
            for rank, silent in signs.silent(missing):
                raise TimeoutError(
                    f"process {rank} has given no sign of life for {silent:.0f} s, while process "
                    f"{process.process_index} waited for {what}; look at its messages, and run all of them again"
                )
            time.sleep(BEAT / 4)
    except RuntimeError as error:  # the process that keeps the store has ended
        raise TimeoutError(
            f"the connection to the other processes is lost, while process {process.process_index} waited for {what}; "
            "look at their messages, and run all of them again"
        ) from error


@contextmanager
def watched_processes() -> Iterator[None]:
    """Context in which the log names a process that gives no sign of life. The others may wait for it in vain."""
    process = join_processes()
    over = threading.Event()
    if process.num_processes > 1:
        others = [rank for rank in range(process.num_processes) if rank != process.process_index]
        threading.Thread(target=_watch, args=(others, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(ranks: list[int], over: threading.Event) -> None:
    signs = _SignsOfLife(ranks)
    while ranks and not over.wait(BEAT):
        try:
            silent = dict(signs.silent(ranks))
        except (RuntimeError, ValueError):  # the store, or the group of processes, is no more
            return
        for rank, seconds in silent.items():
            logger.error(
                f"process {rank} has given no sign of life for {seconds:.0f} s. The others wait for it until "
                "ddp_timeout; look at its messages, and go on from the last checkpoint"
            )
        ranks = [rank for rank in ranks if rank not in silent]


def _store() -> PrefixStore:
    """Store that all processes share, with keys of this package alone."""
    return PrefixStore("mfn", _get_default_store())


class _SignsOfLife:
    """Signs of life of other processes, as their hearts leave them in the store."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self._heard = dict.fromkeys(ranks, (b"", time.monotonic()))
        """Process -> its last sign, and when that was new."""

    def silent(self, ranks: Iterable[int]) -> Iterator[tuple[int, float]]:
        """Yields the processes that count as dead, with the seconds since their last sign."""
        store = _store()
        for rank in ranks:
            sign = store.get(f"alive/{rank}") if store.check([f"alive/{rank}"]) else b""
            if sign != self._heard[rank][0]:
                self._heard[rank] = sign, time.monotonic()
            last, heard = self._heard[rank]
            seconds = time.monotonic() - heard
            if seconds > (SILENCE if last else BEGINNING):
                yield rank, seconds


class _Heart(threading.Thread):
    """Gives signs of life in the store of all processes, until the process or the store ends."""

    def __init__(self, rank: int) -> None:
        super().__init__(daemon=True)
        self._rank = rank

    def run(self) -> None:
        for number in itertools.count(1):
            try:
                _store().set(f"alive/{self._rank}", str(number))
            except (RuntimeError, ValueError):  # the store, or the group of processes, is no more
                return
            time.sleep(BEAT)


__all__ = ["join_processes", "wait_for_processes", "watched_processes"]
