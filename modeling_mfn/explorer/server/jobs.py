"""Work for clients: a limited number at a time, a short queue, and an end when the client goes away."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.types import Receive

from .errors import ClientGone, Refused
from .limits import Limits

STREAMS = 3
"""Threads of one request: plain, steered and control text are generated in turn."""
ResultT = TypeVar("ResultT")


class Stopped(Exception):
    """Error that ends work which nobody waits for."""


class Job:
    """Work for one request."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.began = time.monotonic()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Asks the threads of this job to end."""
        self._stopped.set()

    @property
    def is_stopped(self) -> bool:
        """True once nobody waits for the result."""
        return self._stopped.is_set()

    @property
    def is_late(self) -> bool:
        """True once the time of the job is over."""
        return self.elapsed > self.seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the job began."""
        return time.monotonic() - self.began

    def check(self) -> None:
        """Goes on if somebody waits for the result and its time is not over.

        Raises:
            Stopped: If nobody waits.
            Refused: If the time is over.
        """
        if self.is_stopped:
            raise Stopped
        if self.is_late:
            raise Refused(503, f"the work took more than {self.seconds:g} seconds and was stopped; ask for less")


class Jobs:
    """Jobs of a server."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting = 0
        """Requests that wait for a place."""
        self.running = 0
        """Requests that have a place."""
        self._places = asyncio.Semaphore(limits.running)
        self._pool = ThreadPoolExecutor(limits.running * STREAMS, "explorer")

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[Job]:
        """Waits for a place, and gives the job that has it.

        Raises:
            Refused: If too many wait already.
        """
        if self._places.locked() and self.waiting >= self.limits.waiting:
            raise Refused(429, f"{self.running} requests run and {self.waiting} wait already; try again in a moment")
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield Job(self.limits.seconds)
        finally:
            self.running -= 1
            self._places.release()

    async def in_thread(self, job: Job, function: Callable[..., ResultT], *arguments: Any) -> ResultT:
        """Runs a function in a thread. If this is cancelled, the job is stopped, and its thread waited for."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            job.stop()
            await asyncio.wait({future})
            raise

    async def run(self, receive: Receive, function: Callable[..., ResultT], *arguments: Any) -> ResultT:
        """Runs `function(job, *arguments)` in a thread, once there is a place.

        Raises:
            ClientGone: If the client goes away before the end.
        """

        async def work() -> ResultT:
            async with self.place() as job:
                return await self.in_thread(job, function, job, *arguments)

        return await while_connected(receive, work())


async def while_connected(receive: Receive, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Awaits work for a client, and cancels it when the client goes away; raises `ClientGone` then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait({task, gone})


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


__all__ = ["Job", "Jobs", "Stopped", "disconnected", "while_connected"]
