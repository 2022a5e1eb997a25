"""The explorer's server: pages from a folder, and what needs a forward pass."""

from __future__ import annotations

import socket
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.staticfiles import StaticFiles

from ...features.atlas import FeatureAtlas
from ...features.atlas.belonging import check_model
from ...model.mfn_for_causal_lm import MFNForCausalLM
from .access import Access, access_at, is_loopback
from .errors import add_handlers
from .explored import Explored
from .guard import TOKEN_PARAMETER, Guard
from .jobs import Jobs
from .limits import Limits
from .routes import make_routes

MAX_CONNECTIONS = 256
"""Connections of a server; further ones are refused."""
PATIENCE = 3
"""Seconds that requests have to end when the server ends. Their work stops at the next token anyway."""


def create_app(
    model: MFNForCausalLM,
    tokenizer: Any,
    atlas: FeatureAtlas,
    site: Path,
    *,
    folder: Path | None = None,
    limits: Limits | None = None,
    access: Access | None = None,
) -> FastAPI:
    """Makes the app of one model.

    Args:
        model: MFN model. It is put into evaluation mode.
        tokenizer: The model's tokenizer.
        atlas: The model's atlas.
        site: Folder with the pages.
        folder: The model's folder, in which presets and labels are saved. By default nobody may save.
        limits: Limits of requests.
        access: Rules of who may ask. By default only this machine may.

    Raises:
        ValueError: If the atlas is of another model.
    """
    check_model(atlas.metadata, model)
    explored = Explored(model.eval(), tokenizer, atlas, limits or Limits(), folder)
    jobs = Jobs(explored.limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        jobs.close()

    guard = Middleware(Guard, access=access or Access(), limits=explored.limits)
    app = FastAPI(lifespan=lifespan, middleware=[guard], docs_url=None, redoc_url=None, openapi_url=None)
    app.state.explored, app.state.jobs = explored, jobs
    add_handlers(app)
    app.include_router(make_routes(explored, jobs))
    app.mount("/", StaticFiles(directory=site, html=True))
    return app


def run_explorer(
    model: MFNForCausalLM,
    tokenizer: Any,
    atlas: FeatureAtlas,
    site: Path,
    *,
    folder: Path | None = None,
    host: str = "localhost",
    port: int = 0,
    open_browser: bool = False,
) -> None:
    """Serves the explorer until it is interrupted, and prints its address.

    Args:
        model: MFN model.
        tokenizer: The model's tokenizer.
        atlas: The model's atlas.
        site: Folder with the pages.
        folder: The model's folder, in which presets and labels are saved. By default nobody may save.
        host: Address to listen at. If other machines can reach it, a random token is demanded.
        port: Port to listen at; 0 for a free one.
        open_browser: True to open the address in a browser.

    Raises:
        ValueError: If the address cannot be listened at.
    """
    access = access_at(host)
    listener = listen(host, port)
    app = create_app(model, tokenizer, atlas, site, folder=folder, access=access)
    address = _address(host, listener.getsockname()[1], access.token)
    if not is_loopback(host):
        print(
            "warning: other machines can reach this server. Whoever has the address with its token may run the model"
            + ("" if folder is None else ", and save presets and labels")
            + ". The connection is not encrypted.",
            file=sys.stderr,
        )
    print(f"the explorer is at {address}  (Ctrl-C ends it)", flush=True)
    if open_browser:
        threading.Timer(0.5, webbrowser.open, [address]).start()
    serve(app, listener)
    print("the explorer has ended")


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serves an app at a socket until it is interrupted."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        ws="none",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=PATIENCE,
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn has ended by then, and passes the interrupt on
        pass
    finally:
        listener.close()


def listen(host: str, port: int) -> socket.socket:
    """Opens a socket at an address."""
    try:
        family, _, _, _, place = socket.getaddrinfo(
            "127.0.0.1" if host == "localhost" else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(place[:2], family=family)
    except OSError as error:
        raise ValueError(f"{host} with port {port} cannot be listened at: {error.strerror or error}") from error


def _address(host: str, port: int, token: str | None) -> str:
    """Address to open in a browser."""
    if host in ("0.0.0.0", "::"):  # all addresses of this machine
        host = socket.gethostname()
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + ("" if token is None else f"?{TOKEN_PARAMETER}={token}")


__all__ = ["create_app", "listen", "run_explorer", "serve"]
