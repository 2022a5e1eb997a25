"""Addresses of the server's API."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from ...model.checks import shown
from . import readings, saved
from .control import control_feature
from .errors import JSONAnswer, Refused
from .event_stream import GenerationStream
from .explored import Explored
from .jobs import Jobs
from .requests import (
    ExplainRequest,
    GenerateRequest,
    LabelRequest,
    PerplexityRequest,
    PredictRequest,
    PresetRequest,
    ReadRequest,
)


def make_routes(explored: Explored, jobs: Jobs) -> APIRouter:
    """Makes the API of one model."""
    routes = APIRouter(prefix="/api")
    routes.include_router(_passes(explored, jobs))
    routes.include_router(_kept(explored))

    @routes.get("/session")
    async def session() -> Response:
        config = explored.model.config
        return JSONAnswer(
            {
                "live": True,
                "writable": explored.folder is not None,
                "limits": explored.limits.for_model(config),
                "device": str(explored.model.device),
                "alpha": config.alpha,
                "active_preset": config.active_preset,
            }
        )

    @routes.get("/control")
    def control(feature: str, seed: int = 0) -> Response:
        return JSONAnswer(control_feature(explored.atlas, explored.model.config, feature, seed))

    @routes.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE", "PATCH"])
    async def unknown(path: str, request: Request) -> Response:
        raise Refused(404, f"this server has no {request.method} /api/{shown(path)[1:-1]}")

    return routes


def _passes(explored: Explored, jobs: Jobs) -> APIRouter:
    """Makes the addresses that run the model."""
    routes = APIRouter()

    @routes.post("/read")
    async def read(body: ReadRequest, request: Request) -> Response:
        return JSONAnswer(await jobs.run(request.receive, readings.read, explored, body))

    @routes.post("/predict")
    async def predict(body: PredictRequest, request: Request) -> Response:
        return JSONAnswer(await jobs.run(request.receive, readings.predict, explored, body))

    @routes.post("/perplexity")
    async def perplexity(body: PerplexityRequest, request: Request) -> Response:
        return JSONAnswer(await jobs.run(request.receive, readings.perplexity, explored, body))

    @routes.post("/explain")
    async def explain(body: ExplainRequest, request: Request) -> Response:
        return JSONAnswer(await jobs.run(request.receive, readings.explanation, explored, body))

    @routes.post("/generate")
    async def generate(body: GenerateRequest) -> Response:
        return GenerationStream(explored, jobs, body)

    return routes


def _kept(explored: Explored) -> APIRouter:
    """Makes the addresses of presets and labels."""
    routes = APIRouter()

    @routes.get("/presets")
    def presets() -> Response:
        return JSONAnswer(saved.presets(explored))

    @routes.put("/presets/{name:path}")
    def save_preset(name: str, body: PresetRequest) -> Response:
        return JSONAnswer(saved.save_preset(explored, name, body))

    @routes.delete("/presets/{name:path}")
    def delete_preset(name: str) -> Response:
        saved.delete_preset(explored, name)
        return JSONAnswer({"deleted": name})

    @routes.get("/labels")
    def labels() -> Response:
        return JSONAnswer(saved.labels(explored))

    @routes.put("/labels/{layer}/{index}")
    def save_label(layer: int, index: int, body: LabelRequest) -> Response:
        return JSONAnswer(saved.save_label(explored, layer, index, body.label))

    @routes.delete("/labels/{layer}/{index}")
    def delete_label(layer: int, index: int) -> Response:
        return JSONAnswer(saved.delete_label(explored, layer, index))

    return routes


__all__ = ["make_routes"]
