"""Errors as a client is told them: one sentence, never a trace."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ...model.checks import shown

logger = logging.getLogger(__name__)
MAX_SENTENCE = 500
"""Characters of an error that a client is told."""
FAILED = "the server failed on this request; the terminal of mfn explore has the reason"


class Refused(Exception):
    """Error that a request's answer tells, with its status."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class ClientGone(Exception):
    """Error that ends the work for a client that went away."""


class JSONAnswer(Response):
    """JSON in ASCII, which can hold every text, also one that is not valid in UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Writes the content; `ValueError` if a number is not finite."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_answer(status: int, sentence: str) -> JSONAnswer:
    """Makes the answer to a request that failed."""
    if len(sentence) > MAX_SENTENCE:
        sentence = f"{sentence[:MAX_SENTENCE]}…"
    return JSONAnswer({"detail": " ".join(sentence.split())}, status)


def answer_to(error: BaseException) -> Response:
    """Makes the answer that tells an error. One that nobody foresaw is written to the log, and not told."""
    if isinstance(error, ClientGone):
        return Response(status_code=499)
    if isinstance(error, Refused):
        return error_answer(error.status, str(error))
    if isinstance(error, RequestValidationError):
        return error_answer(422, _in_words(error.errors()[0]))
    if isinstance(error, HTTPException):
        return error_answer(error.status_code, str(error.detail))
    if isinstance(error, ValueError):
        return error_answer(422, str(error))
    logger.error("a request failed", exc_info=error)
    return error_answer(500, FAILED)


def _in_words(error: dict[str, Any]) -> str:
    """Writes an error of pydantic as a sentence that names the field, its value and what is allowed."""
    where = ".".join(str(part) for part in error["loc"] if part not in ("body", "query", "path"))
    where = where if len(where) <= 80 else f"{where[:80]}…"
    if error["type"] == "json_invalid":
        return "the body is not JSON"
    if error["type"] == "missing" or (not where and error.get("input") is None):
        return f"{where or 'the body'} is missing"
    if error["type"] == "extra_forbidden":
        return f"there is no field {shown(where)} in this request"
    message = error["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "it must be").replace("String should", "it must")
    return f"{where or 'the body'} is {shown(error.get('input'))}; {message}"


def add_handlers(app: FastAPI) -> None:
    """Makes an app tell its errors as this module does."""

    async def handler(request: Request, error: Exception) -> Response:
        return answer_to(error)

    for kind in (Refused, ClientGone, RequestValidationError, HTTPException, ValueError):
        app.add_exception_handler(kind, handler)


__all__ = ["ClientGone", "JSONAnswer", "Refused", "add_handlers", "answer_to", "error_answer"]
