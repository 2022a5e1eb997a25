"""The steering engine: contexts of a task, and the rows, tokens and layers of a forward on which they act."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .feature_names import format_feature, parse_feature
from .interventions import CheckedInterventions, Intervention
from .sparse_code import SparseCode
from .task_stack import TaskStack


def activations(code: SparseCode, features: Tensor) -> Tensor:
    """Returns the activations (..., I) of features (I,) in a code (..., K), 0 where a feature is inactive."""
    return (code.values.unsqueeze(-1) * (code.indices.unsqueeze(-1) == features)).sum(-2)


class CodeEdit(NamedTuple):
    """Change z <- scale * z + shift of I features of one MFN layer.

    scale and shift are (I,), or (..., I) where they differ from token to token.
    """

    features: Tensor
    """(I,) int64, distinct."""
    scale: Tensor
    """(..., I)."""
    shift: Tensor
    """(..., I)."""

    def then(self, scale: Tensor, shift: Tensor) -> CodeEdit:
        """Combines this edit with a further edit of the same features, which acts on its result."""
        return self._replace(scale=scale * self.scale, shift=scale * self.shift + shift)

    def apply(self, code: SparseCode) -> SparseCode:
        """Changes a code: (..., K) -> (..., K + I).

        Features leave their old pairs (value 0) and come as extra pairs. On tokens where an edit changes nothing, the
        old pair stays and the extra pair has value 0.
        """
        features = self.features.to(code.indices.device)
        old = activations(code, features)
        scale, shift = self.scale.to(old), self.shift.to(old)
        idle = (scale == 1) & (shift == 0)
        moved = ((code.indices.unsqueeze(-1) == features) & ~idle.unsqueeze(-2)).any(-1)
        new = (old * scale + shift).masked_fill(idle, 0)
        return SparseCode(
            torch.cat([code.indices, features.expand(new.shape)], -1),
            torch.cat([code.values.masked_fill(moved, 0), new], -1),
            code.num_features,
        )


Positions = Literal["all", "prompt", "generated"] | Tensor
"""Tokens that interventions act on. A tensor is a mask (B, T), True on these tokens."""


def check_range(feature: tuple[int, int], intervention: Intervention, dtype: torch.dtype) -> None:
    """Raises `ValueError` if a model of this type cannot compute with the numbers of an intervention."""
    # a square must be finite in float32, and a number of float16 itself
    most = torch.finfo(dtype).max if dtype == torch.float16 else torch.finfo(torch.float32).max ** 0.5
    number = max((*intervention.coefficients, intervention.above), key=abs)
    if abs(number) > most:
        raise ValueError(
            f"{intervention!r} on {format_feature(*feature)}: {number:g} is too large for a model in "
            f"{str(dtype).removeprefix('torch.')}; it must be at most {most:g}"
        )


class Context(NamedTuple):
    """One context of `steer`."""

    rows: tuple[CheckedInterventions, ...]
    """One mapping for all rows of a batch, or n that share them: row b of B has mapping b // (B / n)."""
    positions: Positions


class Step(NamedTuple):
    """Interventions of one context on a layer's I features, in R mappings."""

    context: int
    """Place of the context among those in force."""
    scale: Tensor
    """(R, I), float32 or the model's wider type; 1 where it leaves a feature alone."""
    shift: Tensor
    """(R, I)."""
    condition: Tensor | None
    """(R, I) int64, column of the activation (see `LayerPlan.watched`) that an intervention's condition reads, 0 for no
    condition. `None` if the step has no condition."""
    above: Tensor
    """(R, I), the value that this activation has to exceed."""


class LayerPlan(NamedTuple):
    """Effect of all contexts in force on one layer."""

    features: Tensor
    """(I,) that some context acts on."""
    steps: tuple[Step, ...]
    """Steps, the outermost context first. A step acts on the result of the steps before it."""
    watched: Tensor
    """(C,) features of the layer that conditions read. Their columns follow those of earlier layers; column 0 is
    infinite and serves interventions without a condition."""


class InForce(NamedTuple):
    """Contexts of one model that a task is in."""

    model: Any
    contexts: tuple[Context, ...]
    plans: dict[int, LayerPlan]


class LayerEdit:
    """Interventions on one layer in one forward."""

    def __init__(self, layer: int, plan: LayerPlan, tokens: list[Tensor | None], seen: dict[int, Tensor]) -> None:
        self.layer = layer
        self.plan = plan
        self.tokens = tokens
        """Mask (1 or B, T) of each context, or None for every token."""
        self.seen = seen
        """Layer -> activations (B, T, C) that conditions read, shared by the layers of a forward.

        It outlives the forward: gradient checkpointing runs a block again before the blocks below it."""

    def apply(self, code: SparseCode) -> SparseCode:
        """Changes the layer's code: (B, T, K) -> (B, T, K + I)."""
        if len(self.plan.watched):
            self.seen[self.layer] = activations(code, self.plan.watched.to(code.indices.device)).detach()
        edit = None
        for step in self.plan.steps:
            scale, shift = self._coefficients(step, code)
            edit = CodeEdit(self.plan.features, scale, shift) if edit is None else edit.then(scale, shift)
        return code if edit is None else edit.apply(code)

    def _coefficients(self, step: Step, code: SparseCode) -> tuple[Tensor, Tensor]:
        """Returns the step's scale and shift, (1 or B, 1 or T, I)."""
        rows, device = code.indices.shape[0], code.indices.device
        scale, shift = [_by_row(each.to(device), rows).unsqueeze(1) for each in (step.scale, step.shift)]
        chosen = self.tokens[step.context]
        if chosen is not None:
            chosen = chosen.to(device).unsqueeze(-1)
        if step.condition is not None:
            fired = self._fired(step.condition.to(device), step.above.to(device), code)
            chosen = fired if chosen is None else chosen & fired
        if chosen is None:
            return scale, shift
        return torch.where(chosen, scale, 1.0), torch.where(chosen, shift, 0.0)

    def _fired(self, condition: Tensor, above: Tensor, code: SparseCode) -> Tensor:
        """Returns (B, T, I), True where an intervention's condition holds."""
        rows, tokens = code.indices.shape[:2]
        read = [self.seen[layer].to(code.values.device) for layer in sorted(self.seen) if layer <= self.layer]
        always = code.values.new_full((rows, tokens, 1), torch.inf)
        columns = _by_row(condition, rows).unsqueeze(1).expand(rows, tokens, -1)
        return torch.cat([always, *read], -1).gather(-1, columns) > _by_row(above, rows).unsqueeze(1)


def _by_row(given: Tensor, rows: int) -> Tensor:
    """Repeats (n, ...) to (rows, ...) in the order in which `generate` repeats rows for beams; one row stays one."""
    return given if given.shape[0] == 1 else given.repeat_interleave(rows // given.shape[0], 0)


_contexts = TaskStack("steering contexts")
"""Entries are `InForce`."""
_readers = TaskStack("readers of models without their active preset")
"""Entries are (model,)."""
_prompts = TaskStack("prompts of generate")
"""Entries are (model, start, end) of the prompt's places in the text, one per running call of `generate`."""


class ActivePreset(NamedTuple):
    """Preset that is active by default, as a context that nobody entered."""

    made_of: tuple[Any, ...]
    """Name, presets and pruned features of the config."""
    made_for: tuple[Any, ...]
    """Precision and device of the model."""
    in_force: InForce


def active_by_default(model: Any) -> InForce | None:
    """Returns what `config.active_preset` puts in force for a headless model; `None` in training and for readers.

    Raises:
        ValueError: if the preset has nothing left, or if it was never worked out before the model was compiled.
    """
    config, known = model.config, model.active_preset
    if config.active_preset is None or model.training or _readers.innermost(model) is not None:
        return None
    made_of = (config.active_preset, config.steering_presets, config.pruned_features)
    is_known = (
        known is not None
        and known.made_of[0] == made_of[0]
        and known.made_of[1] is made_of[1]
        and known.made_of[2] is made_of[2]
    )
    if torch.compiler.is_compiling():
        if not is_known:
            raise ValueError(
                "active_preset, or what it is made of, has changed since the model ran last; run the model once before "
                "it is compiled or exported"
            )
        return known.in_force
    made_for = (model.dtype, model.device)
    if not is_known or known.made_for != made_for:
        contexts = (model.active_context(),)
        known = ActivePreset(made_of, made_for, InForce(model, contexts, _plans(contexts, _like(model))))
        model.active_preset = known
    return known.in_force


@contextmanager
def without_active_preset(model: Any) -> Iterator[None]:
    """Switches the preset of a headless model off that is active by default, in this task."""
    with _readers.entered((model,)):
        yield


def _like(model: Any) -> Tensor:
    """Empty tensor in the precision and on the device of interventions on a model."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    return torch.empty(0, dtype=dtype, device="cpu" if model.device.type == "meta" else model.device)


@contextmanager
def steering(model: Any, context: Context) -> Iterator[None]:
    """Puts interventions in force for `model`, in this task, until the block is left, also by an exception.

    Within another such context they act on that context's result, or on that of the preset that is active by default.
    """
    like = _like(model)

    def with_context(outer: Any, context: Context) -> InForce:
        contexts = (*(outer.contexts if outer else ()), context)
        return InForce(model, contexts, _plans(contexts, like))

    def without_this(others: list[InForce]) -> list[InForce]:
        made, outer = [], active_by_default(model)
        for each in others:
            if each.model is model:
                each = outer = with_context(outer, each.contexts[-1])
            made.append(each)
        return made

    outer = _contexts.innermost(model) or active_by_default(model)
    with _contexts.entered(with_context(outer, context), without_this):
        yield


def is_steered(model: Any) -> bool:
    """Returns True if a context of `model` is in force."""
    return _contexts.innermost(model) is not None


@contextmanager
def generating(model: Any, prompt: Tensor | None, mask: Tensor | None = None) -> Iterator[None]:
    """Notes the place of the prompt of `generate` in its text.

    Args:
        model: headless model.
        prompt: ids (B, T) or embeddings (B, T, d); None means the one token it starts from.
        mask: attention mask (B, S) of the whole text, S > T where a cache has its beginning.
    """
    length = 1 if prompt is None else prompt.shape[1]
    end = length if mask is None or mask.ndim != 2 else mask.shape[1]
    # tensors, so that compiled models serve prompts of every length
    places = torch.tensor([end - length, end], device=None if prompt is None else prompt.device)
    with _prompts.entered((model, *places)):
        yield


def edits_in_force(model: Any, inputs: Tensor | None, cache: Any) -> dict[int, LayerEdit]:
    """Returns the interventions on a forward of `model`, by layer.

    Args:
        model: headless model.
        inputs: input ids (B, T) or embeddings (B, T, d).
        cache: key-value cache, whose length is the position of the inputs in their text, or None.
    """
    entry = _contexts.innermost(model)
    if entry is None:
        _contexts.check_thread(model)
        entry = active_by_default(model)
    if entry is None or inputs is None:
        return {}
    for context in entry.contexts:
        _check_rows("mappings of interventions", len(context.rows), inputs.shape[0])
    tokens = [_tokens(context.positions, model, inputs, cache) for context in entry.contexts]
    seen: dict[int, Tensor] = {}
    return {layer: LayerEdit(layer, plan, tokens, seen) for layer, plan in entry.plans.items()}


def _tokens(positions: Positions, model: Any, inputs: Tensor, cache: Any) -> Tensor | None:
    """Returns the tokens of a forward that `positions` mean, as a mask (1 or B, T), or None for all."""
    if isinstance(positions, str) and positions == "all":
        return None
    rows, length = inputs.shape[:2]
    place = torch.arange(length, device=inputs.device) + (0 if cache is None else cache.get_seq_length())
    prompt = _prompts.innermost(model)
    start, end = (None, None) if prompt is None else (each.to(place.device) for each in prompt[1:])
    if isinstance(positions, Tensor):
        _check_rows("rows of a positions mask", positions.shape[0], rows)
        last = positions.shape[1] - 1
        place = place if start is None else place - start
        return _by_row(positions.to(place.device)[:, place.clamp(0, last)] & (place >= 0) & (place <= last), rows)
    in_prompt = torch.ones_like(place, dtype=torch.bool) if end is None else place < end
    return (in_prompt if positions == "prompt" else ~in_prompt).unsqueeze(0)


def _check_rows(what: str, given: int, rows: int) -> None:
    if rows % given:
        raise ValueError(f"a batch of {rows} rows cannot be shared by {given} {what}; give one, or one for each row")


def _plans(contexts: tuple[Context, ...], like: Tensor) -> dict[int, LayerPlan]:
    """Works contexts out by layer, in the precision and on the device of `like`."""
    given = [item for context in contexts for row in context.rows for item in row.items()]
    acted_on = sorted({feature for feature, _ in given})
    watched = sorted({parse_feature(each.when) for _, each in given if each.when is not None})
    columns = {format_feature(layer, index): place for place, (layer, index) in enumerate(watched, start=1)}
    plans = {}
    for layer in sorted({layer for layer, _ in [*acted_on, *watched]}):
        features = [index for at, index in acted_on if at == layer]
        steps = [
            _step(place, [[row.get((layer, index)) for index in features] for row in context.rows], columns, like)
            for place, context in enumerate(contexts)
            if any(at == layer for row in context.rows for at, _ in row)
        ]
        plans[layer] = LayerPlan(
            like.new_tensor(features, dtype=torch.long),
            tuple(steps),
            like.new_tensor([index for at, index in watched if at == layer], dtype=torch.long),
        )
    return plans


def _step(context: int, rows: list[list[Intervention | None]], columns: dict[str, int], like: Tensor) -> Step:
    """Turns R rows of interventions on I features (None for no intervention) into tensors."""
    coefficients = [[each.coefficients if each else (1.0, 0.0) for each in row] for row in rows]
    scale, shift = like.new_tensor(coefficients).unbind(-1)
    condition = [[columns[str(each.when)] if each and each.when else 0 for each in row] for row in rows]
    above = [[each.above if each else 0.0 for each in row] for row in rows]
    depends = any(column for row in condition for column in row)
    return Step(
        context,
        scale,
        shift,
        like.new_tensor(condition, dtype=torch.long) if depends else None,
        like.new_tensor(above),
    )


__all__ = [
    "Positions",
]
