"""What happens between the optimizer steps of an MFN training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..model.mfn_layer import MFNLayer, mfn_parameters
from ..utils.processes import broadcast
from .arguments import MFNTrainingArguments
from .statistics import FeatureStatistics

logger = logging.get_logger(__name__)

MOMENTS = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum", "square_avg", "grad_avg", "state1", "state2",
}  # fmt: skip
"""What the Trainer's optimizers call their averages of gradients, bitsandbytes' the last two."""


class ScheduleCallback(TrainerCallback):
    """Sets the model's alpha and k for the step to come, and freezes all but the MFN layers during their warm-up. A
    checkpoint holds the alpha and k with which training goes on, and a finished training leaves the schedules' last
    values."""

    def __init__(self) -> None:
        self._frozen: list[nn.Parameter] = []

    def on_train_begin(
        self, args: MFNTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first step, of a resumed run too."""
        args.check_schedules(state.max_steps)
        model = kwargs["model"]
        if state.global_step == 0 and model.config.alpha > args.alpha_start:
            logger.warning(
                f"alpha goes back from {model.config.alpha} to {args.alpha_start}, where its schedule starts "
                "(alpha_start)"
            )
        self._thaw()  # a training that was broken off
        if state.global_step < args.warmup_end(state.max_steps):
            # the optimizer has them already: without gradients it leaves them alone
            features = set(mfn_parameters(model).values())
            self._frozen = [p for p in model.parameters() if p.requires_grad and p not in features]
            for parameter in self._frozen:
                parameter.requires_grad_(False)
        set_to_schedule(model, args, state.global_step, state.max_steps)

    def on_step_end(
        self, args: MFNTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After an optimizer step, before it is logged and saved."""
        if state.global_step >= args.warmup_end(state.max_steps):
            self._thaw()
        set_to_schedule(kwargs["model"], args, state.global_step, state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A training that ends within its warm-up leaves nothing frozen."""
        self._thaw()

    def _thaw(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []


def set_to_schedule(model: Any, args: MFNTrainingArguments, step: int, total_steps: int) -> None:
    """Sets the alpha and k that are due once `step` of `total_steps` optimizer steps are done."""
    model.set_blend(args.alpha_schedule(total_steps).at(step))
    k_schedule = args.k_schedule(total_steps)
    if k_schedule is not None:
        model.set_k(round(k_schedule.at(step)))


class UnitNormCallback(TrainerCallback):
    """Keeps decoder rows at unit norm (section 8), or at the norm that `model.bake` gave them: the part of their
    gradient that would only change their length is taken out before a step, and what remains of a change is undone
    after it."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After clipping, before the step."""
        for layer in _trained_layers(kwargs["model"]):
            layer.decoder.remove_parallel_gradient()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the step."""
        for layer in _trained_layers(kwargs["model"]):
            layer.normalise_directions()


def _trained_layers(model: nn.Module) -> list[MFNLayer]:
    """Those whose decoder is trained, one of those that share it."""
    layers = (module for module in model.modules() if isinstance(module, MFNLayer))
    return list({each.decoder.weight: each for each in layers if each.decoder.weight.requires_grad}.values())


class StatisticsCallback(TrainerCallback):
    """Folds what the batches of a step showed into the running firing rates, and gives dead features a new start."""

    statistics: FeatureStatistics
    """Of the model in training; the trainer sets them."""

    def __init__(self) -> None:
        self.errors: dict[int, Tensor] = {}
        """Layer -> what the last batch's reconstructions lack, in the encoder's space (N, d)."""

    def on_step_end(
        self, args: MFNTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After an optimizer step, before it is logged and saved."""
        self.statistics.step()
        if not args.reinit_dead_every or state.global_step % args.reinit_dead_every:
            return
        layers, shared = kwargs["model"].mfn_layers, kwargs["model"].config.shared_decoder
        # each by itself, or all that have one decoder
        for group in [list(layers)] if shared else [[layer] for layer in layers]:
            features = self.statistics.dead(group)
            if not len(features):
                continue
            errors = torch.cat([self.errors[layer].to(args.device) for layer in group])
            directions = broadcast(_draw(errors, len(features)))
            for layer in group:
                layers[layer].reset_features(features, directions)
                for parameter, rows in layers[layer].rows_of(features):
                    _forget(kwargs["optimizer"], parameter, rows)
                self.statistics.restart(layer, features)
            logger.info(f"{len(features)} dead features of layers {group} start again")


def _draw(errors: Tensor, count: int) -> Tensor:
    """Unit directions (count, d) of errors (N, d), drawn in proportion to their square, none twice if they suffice."""
    chances = errors.float().square().sum(-1)
    chosen = torch.multinomial(chances, count, replacement=count > int((chances > 0).sum()))
    return nn.functional.normalize(errors[chosen].float(), dim=-1)


@torch.no_grad()
def _forget(optimizer: Any, parameter: Tensor, rows: Tensor) -> None:
    """Sets an optimizer's moments of some rows of a parameter back to 0, and nothing else that it keeps: that may be a
    copy of the weights, or quantised."""
    for name, memory in optimizer.state.get(parameter, {}).items():
        if name in MOMENTS and memory.shape == parameter.shape and memory.is_floating_point():
            memory[rows.to(memory.device)] = 0


__all__ = ["ScheduleCallback", "StatisticsCallback", "UnitNormCallback"]
