"""Callbacks between the optimizer steps of an MFN training: schedules, unit norm of directions, firing rates."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..model.mfn_layer import MFNLayer
from ..model.twins import is_a
from .arguments import MFNTrainingArguments
from .statistics import FeatureStatistics
from .trained_parts import backbone_parameters

logger = logging.get_logger(__name__)


class ScheduleCallback(TrainerCallback):
    """Sets the model's alpha and k for the next step, and freezes all but the MFN layers during their warm-up.

    A checkpoint holds the alpha and k with which training continues. A finished training leaves the last values of the
    schedules.
    """

    def __init__(self) -> None:
        self._frozen: list[nn.Parameter] = []

    def on_train_begin(
        self, args: MFNTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets up the first step of a fresh or resumed run."""
        args.check_schedules(state.max_steps)
        model = kwargs["model"]
        if state.global_step == 0 and model.config.alpha > args.alpha_start:
            logger.warning(
                f"alpha goes back from {model.config.alpha} to {args.alpha_start}, where its schedule starts "
                "(alpha_start)"
            )
        self._thaw()  # an earlier run may have been interrupted
        if state.global_step < args.warmup_end(state.max_steps):
            # the optimizer has these parameters already, and leaves parameters without gradients alone
            self._frozen = list(backbone_parameters(model).values())
            for parameter in self._frozen:
                parameter.requires_grad_(False)
        set_to_schedule(model, args, state.global_step, state.max_steps)

    def on_step_end(
        self, args: MFNTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets up the next step, before this step is logged and saved."""
        if state.global_step >= args.warmup_end(state.max_steps):
            self._thaw()
        set_to_schedule(kwargs["model"], args, state.global_step, state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves nothing frozen, even if the training ends within its warm-up."""
        self._thaw()

    def _thaw(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []


def set_to_schedule(model: Any, args: MFNTrainingArguments, step: int, total_steps: int) -> None:
    """Sets the alpha and k that are due after `step` of `total_steps` optimizer steps."""
    model.set_blend(args.alpha_schedule(total_steps).at(step))
    k_schedule = args.k_schedule(total_steps)
    if k_schedule is not None:
        model.set_k(round(k_schedule.at(step)))


class UnitNormCallback(TrainerCallback):
    """Keeps directions at unit norm (section 8), or at the norm that `model.bake` gave them.

    The part of the gradient that would only change a direction's length is removed before a step. The rest of the
    change is undone after it.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Removes the parallel part of the gradient, after clipping."""
        for layer in _trained_layers(kwargs["model"]):
            layer.decoder.remove_parallel_gradient()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Brings directions back to their norm."""
        for layer in _trained_layers(kwargs["model"]):
            layer.normalise_directions()


def _trained_layers(model: nn.Module) -> list[MFNLayer]:
    """Layers whose decoder is trained; one of the layers that share it."""
    layers = (module for module in model.modules() if is_a(module, MFNLayer))
    return list({each.decoder.weight: each for each in layers if each.decoder.weight.requires_grad}.values())


class StatisticsCallback(TrainerCallback):
    """Makes the batches of an optimizer step part of the running statistics."""

    def __init__(self, statistics: FeatureStatistics) -> None:
        self._statistics = statistics

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Updates the statistics, before the step is logged and saved."""
        self._statistics.step()


__all__ = ["ScheduleCallback", "StatisticsCallback", "UnitNormCallback", "set_to_schedule"]
