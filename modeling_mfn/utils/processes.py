"""The processes of `accelerate launch`: joined, and not waited for when one of them is dead."""

from __future__ import annotations

import itertools
import threading
import time

import torch
from accelerate import PartialState
from torch.distributed import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

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
    store, number = PrefixStore("mfn", _get_default_store()), next(_waits)
    store.set(f"{number}/{process.process_index}", what)
    begun = time.monotonic()
    beats: dict[int, bytes] = {}
    heard = dict.fromkeys(range(process.num_processes), begun)
    try:
        while missing := [rank for rank in heard if not store.check([f"{number}/{rank}"])]:
            for rank in missing:
                beat = store.get(f"alive/{rank}") if store.check([f"alive/{rank}"]) else b""
                if beat != beats.setdefault(rank, b""):
                    beats[rank], heard[rank] = beat, time.monotonic()
                silent = time.monotonic() - heard[rank]
                if silent > (SILENCE if beats[rank] else BEGINNING):
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


class _Heart(threading.Thread):
    """Gives signs of life in the store of all processes, until the process or the store ends."""

    def __init__(self, rank: int) -> None:
        super().__init__(daemon=True)
        self._rank = rank

    def run(self) -> None:
        for number in itertools.count(1):
            try:
                PrefixStore("mfn", _get_default_store()).set(f"alive/{self._rank}", str(number))
            except (RuntimeError, ValueError):  # the store, or the group of processes, is no more
                return
            time.sleep(BEAT)


__all__ = ["join_processes", "wait_for_processes"]
