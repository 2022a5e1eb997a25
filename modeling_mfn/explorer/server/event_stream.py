"""Answers that come line by line while the model works, and end with the client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import answer_to
from .explored import Explored
from .generation import Stream, generate, prepare
from .jobs import Job, Jobs, disconnected
from .requests import GenerateRequest

Item = dict[str, Any] | BaseException | None
"""Event, or error that ends a stream; `None` at the end."""
BEGIN: dict[str, Any] = {}
"""Event that is not told: the request was checked."""


class GenerationStream(Response):
    """Tokens of the texts of one request, one JSON object per line (NDJSON).

    An error before the first token is an ordinary answer. Later ones are the last line, `{"error": "..."}`.
    """

    media_type = "application/x-ndjson"

    def __init__(self, explored: Explored, jobs: Jobs, request: GenerateRequest) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._explored, self._jobs, self._request = explored, jobs, request
        self._items: asyncio.Queue[Item] = asyncio.Queue()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generates and sends until all is told or the client has gone."""
        work, gone = asyncio.ensure_future(self._work()), asyncio.ensure_future(disconnected(receive))
        gone.add_done_callback(lambda _: self._items.put_nowait(None))
        try:
            await self._send(scope, receive, send)
        finally:
            for each in (work, gone):
                each.cancel()
            await asyncio.wait({work, gone})

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = await self._items.get()
        if isinstance(first, BaseException):
            await answer_to(first)(scope, receive, send)
        if first is None or isinstance(first, BaseException):
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while (item := await self._items.get()) is not None:
            if isinstance(item, BaseException):
                item = {"error": json.loads(bytes(answer_to(item).body))["detail"]}
            line = json.dumps(item).encode("ascii") + b"\n"
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _work(self) -> None:
        try:
            async with self._jobs.place() as job:
                streams = await self._jobs.in_thread(job, prepare, job, self._explored, self._request)
                self._items.put_nowait(BEGIN)
                await self._generate(job, streams)
                self._items.put_nowait({"done": True, "seconds": job.elapsed})
        except Exception as error:
            self._items.put_nowait(error)
        self._items.put_nowait(None)

    async def _generate(self, job: Job, streams: list[Stream]) -> None:
        """Generates all streams in turn; an error in one of them ends the others."""
        loop = asyncio.get_running_loop()

        def emit(event: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(self._items.put_nowait, event)

        tasks = [
            asyncio.ensure_future(self._jobs.in_thread(job, generate, job, self._explored, stream, emit))
            for stream in streams
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            job.stop()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


__all__ = ["GenerationStream"]
