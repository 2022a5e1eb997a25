"""Restarts of dead features from the errors of the reconstruction, after Bricken et al. 2023."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from ..model.feature_weights import WeightRows
from ..model.mfn_layer import MFNLayer
from ..model.mfn_pass import Reconstruction
from .arguments import MFNTrainingArguments
from .statistics import FeatureStatistics

logger = logging.get_logger(__name__)

MOMENTS = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum", "square_avg", "grad_avg", "state1", "state2",
}  # fmt: skip
"""Names of the averages of gradients in the Trainer's optimizers; bitsandbytes has the last two."""


class RestartCallback(TrainerCallback):
    """Gives dead features new directions, every `reinit_dead_every` steps.

    Directions are drawn from the errors of the last batch. Layers that share a decoder restart a feature together, once
    it is dead in all of them.
    """

    def __init__(self, statistics: FeatureStatistics) -> None:
        self._statistics = statistics
        self._errors: dict[int, Tensor] = {}
        """Layer -> x - x_hat of the last batch, (N, d)."""

    def observe(self, layers: Mapping[int, MFNLayer], items: Mapping[int, Reconstruction], mask: Tensor) -> None:
        """Remembers the errors of a batch; `mask` (B, T) is nonzero where a token counts."""
        for number, item in items.items():
            error = layers[number].input_and_error(item)[1]
            self._errors[number] = error[mask.bool().to(error.device)]

    def drop_step(self) -> None:
        """Forgets the errors of the last batch."""
        self._errors = {}

    def on_step_end(
        self, args: MFNTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restarts dead features, before the step is logged and saved."""
        if state.global_step % args.reinit_dead_every or not self._errors:
            return
        layers, shared = kwargs["model"].mfn_layers, kwargs["model"].config.shared_decoder
        for group in [list(layers)] if shared else [[number] for number in layers]:
            features = self._statistics.dead(group)
            if len(features):
                errors = torch.cat([self._errors[number].to(args.device) for number in group])
                directions = broadcast(_draw(errors, len(features)))
                for number in group:
                    layers[number].reset_features(features, directions)
                    for rows in layers[number].rows_of(features):
                        _forget(kwargs["optimizer"], rows)
                    self._statistics.restart(number, features)
                logger.info(f"{len(features)} dead features of layers {group} start again")


def _draw(errors: Tensor, count: int) -> Tensor:
    """Draws unit directions (count, d) from errors (N, d), with chances as their squares; none twice if it can be."""
    chances = errors.float().square().sum(-1)
    chosen = torch.multinomial(chances, count, replacement=count > int((chances > 0).sum()))
    return nn.functional.normalize(errors[chosen].float(), dim=-1)


@torch.no_grad()
def _forget(optimizer: Any, weights: WeightRows) -> None:
    """Zeroes an optimizer's moments of some rows. Its other memory may be a copy of the weights, or quantised."""
    for name, memory in optimizer.state.get(weights.parameter, {}).items():
        if name in MOMENTS and memory.shape == weights.parameter.shape and memory.is_floating_point():
            memory[weights.rows.to(memory.device)] = 0


__all__ = ["RestartCallback"]
