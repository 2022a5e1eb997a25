"""Generation token by token: plain, steered and with a control, each as `model.generate` alone would give it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .explored import Explored, finite
from .jobs import Job, Stopped
from .requests import GenerateRequest
from .token_pieces import TokenPieces

Emit = Callable[[dict[str, Any]], None]
"""Receiver of the events of a stream."""


class Stream(NamedTuple):
    """One text that is generated."""

    name: str
    """`plain`, `steered` or `control`."""
    ids: Tensor
    """(1, T) tokens of the prompt."""
    steering: Any
    """Context of `model.steer`."""
    settings: dict[str, Any]
    """Arguments of `model.generate`."""
    seed: int


def prepare(job: Job, explored: Explored, request: GenerateRequest) -> list[Stream]:
    """Checks a request and makes its streams; `ValueError` if the model cannot do what it asks for."""
    limits, new = explored.limits, request.max_new_tokens
    if new > limits.new_tokens:
        raise ValueError(f"max_new_tokens is {new}; this server generates {limits.new_tokens} at most")
    ways = {"plain": {}, "steered": request.interventions}
    if request.control is not None:
        ways["control"] = request.control.interventions
    contexts = {name: explored.steering(each, request.positions) for name, each in ways.items()}
    with explored.running(job):
        ids = explored.token_ids(request.prompt, limits.text_tokens, "prompt")
    limit = getattr(explored.model.config.text_config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + new - 1 > limit:  # the last token is generated and never read
        raise ValueError(
            f"the prompt has {ids.shape[1]} tokens and max_new_tokens is {new}; the model reads {limit} in all: "
            "shorten the prompt or generate fewer"
        )
    settings: dict[str, Any] = {"max_new_tokens": new, "do_sample": request.sample}
    if request.sample:
        settings["temperature"] = request.temperature
    return [Stream(name, ids, context, settings, request.seed) for name, context in contexts.items()]


def generate(job: Job, explored: Explored, stream: Stream, emit: Emit) -> None:
    """Generates one stream, and emits its tokens and its end."""
    pieces = TokenPieces(explored.tokenizer, stream.ids[0].tolist())
    told = _Told(stream.name, pieces, emit)
    try:
        with explored.running(job), stream.steering:
            torch.manual_seed(stream.seed)
            explored.model.generate(
                input_ids=stream.ids,
                attention_mask=torch.ones_like(stream.ids),
                pad_token_id=0,
                streamer=told,
                stopping_criteria=StoppingCriteriaList([_BetweenTokens(job, explored)]),
                logits_processor=LogitsProcessorList([_Finite()]),
                **stream.settings,
            )
            told.rest()
    except Stopped:
        return
    emit({"stream": stream.name, "end": True, "reason": _reason(job, stream, told.count)})


def _reason(job: Job, stream: Stream, count: int) -> str:
    if count >= stream.settings["max_new_tokens"]:
        return "length"
    return "time" if job.is_late else "end of text"


class _Told(BaseStreamer):
    """Tells the tokens of a stream as they come."""

    def __init__(self, name: str, pieces: TokenPieces, emit: Emit) -> None:
        self._name, self._pieces, self._emit = name, pieces, emit
        self._is_prompt = True
        self.count = 0

    def put(self, value: Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            self.count += 1
            self._tell(self._pieces.add(token))

    def rest(self) -> None:
        """Tells tokens that wait for the rest of a character."""
        self._tell(self._pieces.rest())

    def end(self) -> None:
        pass

    def _tell(self, pieces: list[tuple[int, str]]) -> None:
        for token, text in pieces:
            self._emit({"stream": self._name, "token_id": token, "token": text})


class _BetweenTokens(StoppingCriteria):
    """Hands the turn on after each token, and ends a generation that nobody waits for or that takes too long."""

    def __init__(self, job: Job, explored: Explored) -> None:
        self._job, self._explored = job, explored

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        self._explored.turns.pass_on(self._explored.model.device)
        is_over = self._job.is_stopped or self._job.is_late
        return torch.full((len(input_ids),), is_over, dtype=torch.bool, device=input_ids.device)


class _Finite(LogitsProcessor):
    """Ends a generation with a clear error if interventions made logits infinite."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        finite(scores)
        return scores


__all__ = ["Stream", "generate", "prepare"]
