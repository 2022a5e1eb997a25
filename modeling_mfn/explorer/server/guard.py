"""Guard in front of an app: who may ask, how much a request may bring, and what browsers may do with answers."""

from __future__ import annotations

import asyncio
import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .access import Access
from .errors import ClientGone, Refused, answer_to
from .limits import Limits

TOKEN_HEADER, TOKEN_COOKIE, TOKEN_PARAMETER = "x-mfn-token", "mfn_token", "token"
READING = {"GET", "HEAD"}
POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors "
)
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",
}


class Guard:
    """Middleware that refuses requests before the app sees them, and adds headers to all answers."""

    def __init__(self, app: ASGIApp, access: Access, limits: Limits) -> None:
        self._app, self._access, self._limits = app, access, limits
        self._headers = SECURITY_HEADERS | {"content-security-policy": POLICY + (access.framed_by or "'none'")}
        if access.framed_by is None:
            self._headers["x-frame-options"] = "DENY"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or hands it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there is nothing for a WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return

        begun = False

        async def send_guarded(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                self._add_headers(scope, message)
            await send(message)

        try:
            self._check(scope)
            receive = await self._with_body(scope, receive)
            await self._app(scope, receive, send_guarded)
        except Exception as error:  # what the app foresaw, it has answered itself
            if begun:
                raise
            await answer_to(error)(scope, receive, send_guarded)

    def _add_headers(self, scope: Scope, message: Message) -> None:
        headers = MutableHeaders(scope=message)
        for name, value in self._headers.items():
            headers[name] = value
        if scope["path"].startswith("/api/"):
            headers["cache-control"] = "no-store"
        elif message["status"] < 400 and self._access.token is not None and TOKEN_PARAMETER in _query(scope):
            # scripts and data files are asked for without the token
            headers["set-cookie"] = f"{TOKEN_COOKIE}={self._access.token}; HttpOnly; SameSite=Strict; Path=/"

    def _check(self, scope: Scope) -> None:
        """Raises `Refused` for a request from where none may come."""
        headers = Headers(scope=scope)
        if self._access.hosts is not None and _host_name(headers.get("host", "")) not in self._access.hosts:
            raise Refused(421, "this server answers only under the address that mfn explore printed")
        if _is_from_another_site(scope["method"], headers):
            raise Refused(403, "this server takes no requests from pages of other sites")
        if not self._has_token(scope, headers):
            raise Refused(401, "this server needs a token; open the address that mfn explore printed")

    def _has_token(self, scope: Scope, headers: Headers) -> bool:
        if self._access.token is None:
            return True
        given = [headers.get(TOKEN_HEADER, ""), _cookie(headers), *_query(scope).get(TOKEN_PARAMETER, [])]
        return any(hmac.compare_digest(each.encode(), self._access.token.encode()) for each in given)

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """Reads the body of a request, and returns a `receive` that has it.

        Raises:
            Refused: If the body is too large, comes too slowly, or is not JSON by its type.
            ClientGone: If the client goes away before its end.
        """
        if scope["method"] in READING:
            return receive
        try:
            body = await asyncio.wait_for(self._body(receive), self._limits.body_seconds)
        except asyncio.TimeoutError:  # another class before Python 3.11
            raise Refused(408, f"the body did not arrive within {self._limits.body_seconds:g} seconds") from None
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        if body and kind != "application/json":
            raise Refused(415, "the body must be JSON, with the Content-Type application/json")
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return messages.pop() if messages else await receive()

        return receive_again

    async def _body(self, receive: Receive) -> bytes:
        body, has_more = bytearray(), True
        while has_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            has_more = message.get("more_body", False)
            if len(body) > self._limits.body_bytes:
                raise Refused(413, f"the body is too large; this server takes {self._limits.body_bytes} bytes at most")
        return bytes(body)


def _is_from_another_site(method: str, headers: Headers) -> bool:
    """True for a request that a page of another site makes. Programs other than browsers send no such headers."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        # a link on another site may lead here; it must not include our data as a script, nor post anything
        is_link = method in READING and headers.get("sec-fetch-mode") == "navigate"
        return site not in ("same-origin", "none") and not is_link
    origin = headers.get("origin")
    if origin is None or method in READING:
        return False
    try:
        return urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
    except ValueError:
        return True


def _host_name(host: str) -> str:
    """Name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _query(scope: Scope) -> dict[str, list[str]]:
    try:
        return parse_qs(scope.get("query_string", b"").decode("latin-1"))
    except ValueError:
        return {}


def _cookie(headers: Headers) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(TOKEN_COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


__all__ = ["Guard"]
