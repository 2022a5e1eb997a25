"""Forward passes that a trainer makes on its own, with the inputs of the feature losses collected on the way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from ..model.masks import tokens_that_count
from ..model.mfn_for_causal_lm import MFNModel
from ..model.mfn_pass import Reconstruction, ReconstructionRequest
from ..model.twins import is_a
from .activation_cache import CachedResiduals


@dataclass
class ObservedPass:
    """Forward pass of a batch that the feature losses are made of."""

    inputs: Mapping[str, Any]
    """Inputs of the model."""
    mask: Tensor
    """(B, T), nonzero where a token counts."""
    request: ReconstructionRequest
    reconstructions: Mapping[int, Reconstruction] = field(default_factory=dict)
    """Layer -> inputs of the feature losses."""
    concepts: Tensor | None = None
    """(B, T) concepts of the tokens, with named features."""


class PassObserver:
    """Hooks of a model that add a request to a trainer's forward pass and take what the MFN layers return.

    In training the pass is the one with gradients. In evaluation it is the first one of the batch's rows, or the first
    one if none has these rows. Others, such as those of a reference that is the same model without its adapters, run as
    they are.
    """

    def __init__(
        self, model: nn.Module, make_request: Callable[[Tensor], ReconstructionRequest], rows: Tensor | None
    ) -> None:
        self._model = model
        self._make_request = make_request
        self._rows = rows
        self._is_running = False
        self._seen: ObservedPass | None = None

    @property
    def seen(self) -> ObservedPass:
        """The pass. Raises `ValueError` if there was none."""
        if self._seen is None:
            raise ValueError("the trainer's loss ran no forward pass of the model with gradients; there must be one")
        return self._seen

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Adds the request to the inputs of the module whose outputs have reconstructions."""
        if torch.is_grad_enabled() != self._model.training:
            return None
        inputs = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        if self._seen is not None:
            if self._model.training:
                raise ValueError(
                    "the trainer's loss ran two forward passes of the model with gradients; there must be one"
                )
            if self._is_of_batch(self._seen.inputs) or not self._is_of_batch(inputs):
                return None
        mask = tokens_that_count(inputs)
        # DDP looks in the outputs for parameters that are used, and a trainer's own may lack the reconstructions
        request = replace(self._make_request(mask), reaches_all=False)
        self._seen, self._is_running = ObservedPass(inputs, mask, request), True
        return (), inputs | {"reconstruction_request": request}

    def _is_of_batch(self, inputs: Mapping[str, Any]) -> bool:
        """Tells a pass of the batch's rows from one of other rows, such as that of KTO for its KL term."""
        ids = inputs.get("input_ids")
        return ids is not None and self._rows is not None and torch.equal(ids, self._rows.to(ids.device))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Takes the reconstructions."""
        if self._is_running and self._seen is not None:
            self._seen.reconstructions, self._is_running = output.reconstructions, False


@contextmanager
def observing(
    model: nn.Module, make_request: Callable[[Tensor], ReconstructionRequest], rows: Tensor | None = None
) -> Iterator[PassObserver]:
    """Watches the forward passes of a model in training.

    Args:
        model: without the wrapping of DDP; PEFT may be around it.
        make_request: makes the request of a pass from its mask (B, T), nonzero where a token counts.
        rows: (B, T) tokens of the batch that an evaluation measures, if it has them.
    """
    observer = PassObserver(model, make_request, rows)
    inner = next(each for each in model.modules() if is_a(each, MFNModel) or is_a(each, CachedResiduals))
    handles = [
        inner.register_forward_pre_hook(observer.before, with_kwargs=True),
        inner.register_forward_hook(observer.after),
    ]
    try:
        yield observer
    finally:
        for handle in handles:
            handle.remove()


def without_reconstructions(outputs: Any) -> Any:
    """Returns a trainer's outputs without the inputs of the feature losses, which no metric reads.

    Outputs of a model may be parts of them, by name or in a row.
    """
    if isinstance(outputs, Mapping):
        named = {name: without_reconstructions(value) for name, value in outputs.items() if not _is_of_layers(value)}
        return type(outputs)(**named) if isinstance(outputs, ModelOutput) else named
    if type(outputs) in (tuple, list):
        return type(outputs)(without_reconstructions(value) for value in outputs if not _is_of_layers(value))
    return outputs


def _is_of_layers(value: Any) -> bool:
    return isinstance(value, Mapping) and any(is_a(each, Reconstruction) for each in value.values())


__all__ = ["ObservedPass", "PassObserver", "observing", "without_reconstructions"]
