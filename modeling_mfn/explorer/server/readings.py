"""Forward passes that answer one question each: reading, prediction, perplexity, explanation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...data.tokens import token_text
from ...features.attribution import explain
from ...features.reading import strongest_pairs
from .explored import Explored, finite
from .jobs import Job
from .requests import ExplainRequest, PerplexityRequest, PredictRequest, ReadRequest, Written

NEXT_TOKENS = 3
"""Next tokens that a reading tells per token."""
PREDICTED = 10
"""Next tokens that a prediction lists."""


@torch.no_grad()
def read(job: Job, explored: Explored, request: ReadRequest) -> dict[str, Any]:
    """Finds the features that are active on a text, layer by layer, and the next tokens that the model expects."""
    k = request.k
    if k > explored.limits.features_per_token:
        raise ValueError(f"k is {k}; this server tells {explored.limits.features_per_token} features at most")
    with explored.running(job):
        ids = explored.token_ids(request.text, explored.limits.text_tokens)
        out = explored.model(input_ids=ids, output_codes=True, use_cache=False)
        expected = finite(out.logits[0]).softmax(-1).topk(min(NEXT_TOKENS, out.logits.shape[-1]))
        tokens = [
            {
                "position": position,
                "token_id": token,
                "token": token_text(explored.tokenizer, token),
                "next": _named(explored, expected.indices[position], expected.values[position]),
            }
            for position, token in enumerate(ids[0].tolist())
        ]
    layers = []
    for layer, code in out.codes.items():
        features: list[list[tuple[int, float, float | None]]] = [[] for _ in tokens]
        for pair in strongest_pairs(explored.atlas.features, {layer: code}, k):
            features[pair.position].append((pair.feature, pair.activation, pair.relative))
        layers.append({"layer": layer, "features": features})
    return {"tokens": tokens, "layers": layers}


@torch.no_grad()
def predict(job: Job, explored: Explored, request: PredictRequest) -> dict[str, Any]:
    """Compares the next token's probabilities with and without interventions."""
    steering = explored.steering(request.interventions)
    with explored.running(job):
        ids = explored.token_ids(request.text, explored.limits.text_tokens)
        place = explored.place(request.position, ids)
        read = ids[:, : place + 1]
        plain = _probabilities(explored, read)
        with steering:
            steered = _probabilities(explored, read)
        changed = (steered - plain).abs().topk(min(PREDICTED, len(plain))).indices
        return {
            "token": token_text(explored.tokenizer, int(ids[0, place])),
            "position": place,
            "plain": _likeliest(explored, plain),
            "steered": _likeliest(explored, steered),
            "changed": [
                (token_text(explored.tokenizer, token), float(plain[token]), float(steered[token]))
                for token in changed.tolist()
            ],
        }


@torch.no_grad()
def perplexity(job: Job, explored: Explored, request: PerplexityRequest) -> dict[str, Any]:
    """Measures the perplexity of a text: plain, steered, and with a control."""
    ways: dict[str, Written] = {"plain": {}, "steered": request.interventions}
    if request.control is not None:
        ways["control"] = request.control.interventions
    contexts = {way: explored.steering(interventions) for way, interventions in ways.items()}
    with explored.running(job):
        ids = explored.token_ids(request.text, explored.limits.text_tokens)
        if ids.shape[1] < 2:
            raise ValueError("the text has one token; perplexity needs two, as it is that of next tokens")
        found: dict[str, Any] = {"tokens": ids.shape[1] - 1, "control": None}
        for way, steering in contexts.items():
            job.check()
            with steering:
                found[way] = _perplexity(explored, ids)
    return found


def explanation(job: Job, explored: Explored, request: ExplainRequest) -> dict[str, Any]:
    """Explains a prediction, also as a graph.

    No other pass may run meanwhile: attribution replaces the outputs of layers by hooks, which every pass would meet.
    """
    if request.top > explored.limits.explained_features:
        raise ValueError(f"top is {request.top}; this server explains {explored.limits.explained_features} at most")
    with explored.running(job), _checking(explored, job):
        ids = explored.token_ids(request.text, explored.limits.text_tokens)
        place = explored.place(request.position, ids)
        if place >= explored.limits.explained_tokens:
            raise ValueError(
                f"the text has {place + 1} tokens up to the position; this server explains "
                f"{explored.limits.explained_tokens} at most"
            )
        found = explain(
            explored.model,
            explored.tokenizer,
            request.text,
            place,
            token=request.token,
            against=request.against,
            atlas=explored.atlas,
            method=request.method,
            top=request.top,
        )
    return {"explanation": json.loads(found.to_json()), "graph": found.to_graph()}


@contextmanager
def _checking(explored: Explored, job: Job) -> Iterator[None]:
    """Ends an explanation at its next forward pass if nobody waits for it, or if its time is over."""
    handle = explored.model.base_model.register_forward_pre_hook(lambda module, arguments: job.check())
    try:
        yield
    finally:
        handle.remove()


def _probabilities(explored: Explored, ids: Tensor) -> Tensor:
    """Probabilities (V,) of the token after a text."""
    return finite(explored.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]).softmax(-1)


def _perplexity(explored: Explored, ids: Tensor) -> float:
    logits = finite(explored.model(input_ids=ids, use_cache=False).logits[0, :-1])
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    try:
        return math.exp(loss)
    except OverflowError:
        raise ValueError(
            f"the text's mean loss is {loss:.0f} nats, and its perplexity too large; choose smaller values"
        ) from None


def _likeliest(explored: Explored, probabilities: Tensor) -> list[tuple[str, float]]:
    best = probabilities.topk(min(PREDICTED, len(probabilities)))
    return _named(explored, best.indices, best.values)


def _named(explored: Explored, tokens: Tensor, probabilities: Tensor) -> list[tuple[str, float]]:
    texts = [token_text(explored.tokenizer, token) for token in tokens.tolist()]
    return list(zip(texts, probabilities.tolist(), strict=True))


__all__ = ["explanation", "perplexity", "predict", "read"]
