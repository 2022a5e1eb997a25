"""Training MFN models with the Trainer of transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from .configuration_mfn import check_alpha, check_k
from .losses import reconstruction_loss
from .mfn_layer import FeatureDecoder
from .schedules import LinearSchedule

logger = logging.get_logger(__name__)


@dataclass
class MFNTrainingArguments(TrainingArguments):
    """`TrainingArguments`, and how MFN layers are trained."""

    lambda_recon: float = field(default=1.0, metadata={"help": "Weight of the reconstruction loss, eq. 5."})
    lambda_util: float = field(default=1.0, metadata={"help": "Weight of the next-token loss, eq. 9."})
    normalize_recon: bool = field(
        default=True, metadata={"help": "Count reconstruction errors as a share of the residual's variance."}
    )
    trainable: Literal["all", "mfn"] = field(
        default="all", metadata={"help": "What is trained: the whole model, or its MFN layers alone."}
    )
    alpha_start: float = field(default=0.0, metadata={"help": "Blend at the first step."})
    alpha_end: float = field(default=1.0, metadata={"help": "Blend after annealing."})
    alpha_anneal: float = field(default=0.5, metadata={"help": "Share of the training over which alpha moves."})
    k_start: int | None = field(
        default=None, metadata={"help": "Active features at the first step; by default k stays the model's."}
    )
    k_end: int | None = field(default=None, metadata={"help": "Active features after annealing."})
    k_anneal: float = field(default=0.5, metadata={"help": "Share of the training over which k moves."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda_recon", "lambda_util"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number of at least 0")
        for name in ("alpha_anneal", "k_anneal"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share of the training, from 0 to 1")
        if self.lambda_recon == self.lambda_util == 0:
            raise ValueError("lambda_recon and lambda_util are both 0; there is nothing to train on")
        check_alpha(self.alpha_start)
        check_alpha(self.alpha_end)
        if (self.k_start is None) != (self.k_end is None):
            raise ValueError(f"k_start is {self.k_start} and k_end is {self.k_end}; give both or neither")
        if self.trainable not in ("all", "mfn"):
            raise ValueError(f'trainable is {self.trainable!r}; it must be "all" or "mfn"')
        if self.label_smoothing_factor != 0:
            raise ValueError(f"label_smoothing_factor is {self.label_smoothing_factor}; MFN models are trained without")

    def alpha_schedule(self, total_steps: int) -> LinearSchedule:
        """Alpha over a training of `total_steps` optimizer steps."""
        return LinearSchedule(self.alpha_start, self.alpha_end, round(self.alpha_anneal * total_steps))

    def k_schedule(self, total_steps: int) -> LinearSchedule | None:
        """k likewise (to be rounded), or `None` where it stays as it is."""
        if self.k_start is None or self.k_end is None:
            return None
        return LinearSchedule(self.k_start, self.k_end, round(self.k_anneal * total_steps))


class ScheduleCallback(TrainerCallback):
    """Sets the model's alpha and k for the step to come. A checkpoint holds those with which training goes on, and a
    finished training leaves the schedule's last values."""

    def on_train_begin(
        self, args: MFNTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first step, of a resumed run too."""
        alpha = kwargs["model"].config.alpha
        if state.global_step == 0 and alpha > args.alpha_start:
            logger.warning(
                f"alpha goes back from {alpha} to {args.alpha_start}, where its schedule starts (alpha_start)"
            )
        self._set(args, state, kwargs["model"])

    def on_step_end(
        self, args: MFNTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After an optimizer step, before it is logged and saved."""
        self._set(args, state, kwargs["model"])

    def _set(self, args: MFNTrainingArguments, state: TrainerState, model: Any) -> None:
        model.set_blend(args.alpha_schedule(state.max_steps).at(state.global_step))
        k_schedule = args.k_schedule(state.max_steps)
        if k_schedule is not None:
            model.set_k(round(k_schedule.at(state.global_step)))


class UnitNormCallback(TrainerCallback):
    """Keeps decoder rows at unit norm (section 8): the part of their gradient that would only change their length is
    taken out before a step, and what remains of a change is undone after it."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After clipping, before the step."""
        for decoder in _decoders(kwargs["model"]):
            decoder.remove_parallel_gradient()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the step."""
        for decoder in _decoders(kwargs["model"]):
            decoder.normalise_rows()


def _decoders(model: nn.Module) -> list[FeatureDecoder]:
    """Those that are trained, each weight once."""
    decoders = (module for module in model.modules() if isinstance(module, FeatureDecoder))
    return list({decoder.weight: decoder for decoder in decoders if decoder.weight.requires_grad}.values())


class MFNTrainer(Trainer):
    """`Trainer` with the paper's objective, eq. 4: lambda_recon L_recon + lambda_util L_task.

    L_recon is the mean over MFN layers, and its gradients stay inside each of them. Each part is logged by itself,
    without its lambda, as are alpha and k.
    """

    args: MFNTrainingArguments

    def __init__(self, model: nn.Module | None = None, args: MFNTrainingArguments | None = None, **kwargs: Any) -> None:
        if args is None:
            args = MFNTrainingArguments(output_dir="tmp_trainer")  # as Trainer does
        if not isinstance(args, MFNTrainingArguments):
            raise ValueError(f"args is {type(args).__name__}; MFNTrainer takes MFNTrainingArguments")
        super().__init__(model, args, **kwargs)
        for k in (args.k_start, args.k_end):
            if k is not None:
                check_k(k, self.model.config.num_features)
        if args.trainable == "mfn":
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(".mfn." in name)
        self.add_callback(ScheduleCallback)
        self.add_callback(UnitNormCallback)
        self._tokens_in_step: Tensor | int = 0
        self._train_parts = _Averages()
        self._eval_parts = _Averages()

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Counts the real tokens of an optimizer step, of which each of its batches is a share."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._tokens_in_step = sum(_count_tokens(batch) for batch in batches)
        self._train_parts.weight += 1
        return batches, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Eq. 4. Over the batches of an optimizer step the losses add up to those of one large batch."""
        inputs = dict(inputs)
        if self.args.lambda_recon:
            inputs["output_reconstructions"] = True
        parts: dict[str, Tensor] = {}
        if self.args.lambda_util:
            parts["util"], outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            inputs.pop("labels", None)
            outputs = model(**inputs, logits_to_keep=1)
        if self.args.lambda_recon:
            parts["recon"] = self._reconstruction(outputs.reconstructions, inputs) * self._share(
                inputs, num_items_in_batch
            )
        loss = sum(getattr(self.args, f"lambda_{name}") * part for name, part in parts.items())
        self._record(parts, inputs, num_items_in_batch)
        if not return_outputs:
            return loss
        return loss, type(outputs)(**{name: value for name, value in outputs.items() if name != "reconstructions"})

    def _reconstruction(self, reconstructions: Mapping[int, Any], inputs: Mapping[str, Any]) -> Tensor:
        mask = inputs.get("attention_mask")
        losses = [
            reconstruction_loss(item.residual, item.reconstructed, mask, self.args.normalize_recon)
            for item in reconstructions.values()
        ]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    def _share(self, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor | float:
        """What a mean over this batch counts in its optimizer step. The Trainer divides by the number of batches
        itself where it does not know the number of items."""
        if not self.model.training:
            return 1.0
        share = _count_tokens(inputs) / self._tokens_in_step
        return share * self.current_gradient_accumulation_steps if self._divides(num_items_in_batch) else share

    def _divides(self, num_items_in_batch: Tensor | int | None) -> bool:
        return num_items_in_batch is None and self.compute_loss_func is None

    def _record(self, parts: Mapping[str, Tensor], inputs: Mapping[str, Any], num_items_in_batch: Any) -> None:
        if self.model.training:
            batches = self.current_gradient_accumulation_steps if self._divides(num_items_in_batch) else 1
            self._train_parts.add(parts, 1 / batches)
        else:
            rows = len(next(iter(inputs.values())))
            self._eval_parts.add(parts, rows)
            self._eval_parts.weight += rows

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the parts of the loss, alpha and k to the Trainer's own figures."""
        if "loss" in logs:
            config = self.accelerator.unwrap_model(self.model).config
            logs |= self._train_parts.take() | {"alpha": config.alpha, "k": config.k}
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Adds the parts of the loss to the metrics."""
        self._eval_parts.take()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self._eval_parts.take().items()})
        return output

    def _load_best_model(self) -> None:
        super()._load_best_model()
        # its weights were trained for its alpha and k, which are in its config
        path = os.path.join(self.state.best_model_checkpoint, "config.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                best = json.load(file)
            self.model.set_blend(best["alpha"])
            self.model.set_k(best["k"])


class _Averages:
    """Sums of loss parts, to be averaged over `weight`."""

    def __init__(self) -> None:
        self.weight = 0.0
        self._sums: dict[str, Tensor] = {}

    def add(self, parts: Mapping[str, Tensor], factor: float) -> None:
        for name, part in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + part.detach().float() * factor

    def take(self) -> dict[str, float]:
        """The averages, named `<part>_loss`; sums start again from 0."""
        averages = {f"{name}_loss": float(total) / max(self.weight, 1) for name, total in self._sums.items()}
        self.weight, self._sums = 0.0, {}
        return averages


def _count_tokens(batch: Mapping[str, Any]) -> Tensor | int:
    mask = batch.get("attention_mask")
    if mask is not None:
        return mask.sum()
    tokens = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"][..., 0]
    return tokens.numel()


__all__ = ["MFNTrainer", "MFNTrainingArguments"]
