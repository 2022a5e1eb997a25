"""The explorer's server: pages from a folder, and what needs a forward pass."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

from ..features.atlas import FeatureAtlas
from ..features.atlas.belonging import check_model
from ..model.mfn_for_causal_lm import MFNForCausalLM
from .errors import add_handlers
from .explored import Explored
from .jobs import Jobs
from .limits import Limits
from .routes import make_routes


def create_app(
    model: MFNForCausalLM,
    tokenizer: Any,
    atlas: FeatureAtlas,
    site: Path,
    *,
    folder: Path | None = None,
    limits: Limits | None = None,
) -> FastAPI:
    """Makes the app of one model.

    Args:
        model: MFN model. It is put into evaluation mode.
        tokenizer: The model's tokenizer.
        atlas: The model's atlas.
        site: Folder with the pages.
        folder: The model's folder, in which presets and labels are saved. By default nobody may save.
        limits: Limits of requests.

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

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.jobs = jobs
    add_handlers(app)
    app.include_router(make_routes(explored, jobs))
    app.mount("/", StaticFiles(directory=site, html=True))
    return app


__all__ = ["create_app"]
