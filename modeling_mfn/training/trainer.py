"""Training MFN models with the Trainer of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..model.masks import tokens_that_count
from .arguments import MFNTrainingArguments
from .distillation import base_outputs, streams_loss
from .distributed import unshard_for_gradients
from .losses import distillation_loss
from .named_features import CONCEPTS, NamedFeatures
from .observed_pass import ObservedPass
from .step_shares import predicted_tokens
from .trainer_mixin import MFNTrainerMixin


class MFNTrainer(MFNTrainerMixin):
    """`Trainer` with the paper's objective, eq. 4, and the auxiliary loss that keeps features alive.

    The losses of all MFN layers add up, so a lambda weighs the same in a model with one layer and with thirty. Their
    gradients stay inside each layer, except for the utility loss.

    Accumulated batches and batches of several processes have the losses of one large batch. Only the firing rates and
    covariances of the rate and competition losses are those of one batch of all processes.

    Logs hold every part of the loss, without its lambda and as a mean over layers. They also hold alpha, k and the
    figures of [`measurements.layer_figures`].

    Args:
        model: an `MFNForCausalLM`, a PEFT model around one, or [`CachedResiduals`].
        args: [`MFNTrainingArguments`].
        base_model: model whose distribution is the target with `util_target="kl"`. Default: the model itself at
            alpha = 0 and without adapters, which is its base as long as the backbone's own weights stay.
        others, kwargs: arguments of `Trainer`, in its order.

    Raises:
        ValueError: if the arguments do not fit the model, or the way that processes share its weights.
    """

    has_own_loss = False

    def __init__(
        self,
        model: nn.Module | None = None,
        args: MFNTrainingArguments | None = None,
        *others: Any,
        base_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = MFNTrainingArguments(output_dir="tmp_trainer")  # the Trainer's own default
        self._check_arguments(args)
        self.base_model = base_model
        if base_model is not None:
            base_model.requires_grad_(False).eval().to(args.device)
        super().__init__(model, args, *others, **kwargs)

    def _set_up(self) -> None:
        super()._set_up()
        named = self.args.named_features
        self._named = NamedFeatures(named, self.model.config) if named else None

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the column of concepts, which no model takes, where named features need it."""
        super()._set_signature_columns_if_needed()
        if self._named is not None and CONCEPTS not in self._signature_columns:
            self._signature_columns.append(CONCEPTS)

    def _run(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items: Any
    ) -> tuple[dict[str, Tensor], Any, ObservedPass]:
        """Runs the model, which returns the inputs of the feature losses with its outputs."""
        concepts = None if self._named is None else self._named.concepts_in(inputs)
        inputs = {name: value for name, value in inputs.items() if name != CONCEPTS}
        mask = tokens_that_count(inputs)
        request = self._request(mask)
        parts, outputs = self._utility(model, inputs | {"reconstruction_request": request}, num_items)
        return parts, outputs, ObservedPass(inputs, mask, request, outputs.reconstructions, concepts)

    def _layer_losses(self, model: nn.Module, seen: ObservedPass) -> dict[int, dict[str, Tensor]]:
        """Layer -> feature losses of this batch, with that of named features."""
        layers = super()._layer_losses(model, seen)
        if self._named is not None and seen.concepts is not None:
            for layer, item in seen.reconstructions.items():
                named_loss = self._named.loss(self.model.mfn_layers[layer], item, seen.concepts, seen.mask)
                layers[layer]["named"] = named_loss.to(seen.mask.device)
        return layers

    def _utility(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> tuple[dict[str, Tensor], Any]:
        """Runs the model: {"util": loss}, or {} if the batch has no utility loss, and the outputs."""
        distils = self.args.util_target == "kl"  # needs no labels
        unlabelled = inputs.get("labels") is None and not self.model.training and not distils
        if not self.args.lambda_util or self._warming_up() or unlabelled:
            outputs = model(**{"logits_to_keep": 1} | {n: value for n, value in inputs.items() if n != "labels"})
            unshard_for_gradients(model, outputs.reconstructions)
            return {}, outputs
        if distils:
            return self._distil(model, inputs, num_items)
        loss, outputs = super(MFNTrainerMixin, self).compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items
        )
        return {"util": loss}, outputs

    def _distil(self, model: nn.Module, inputs: Mapping[str, Any], num_items: Any) -> tuple[dict[str, Tensor], Any]:
        """KL(base || model) per predicted token, scaled like the next-token loss, and the distance of the streams."""
        plain = {n: v for n, v in inputs.items() if n not in ("labels", "reconstruction_request")}
        if self.args.lambda_streams:
            plain["output_hidden_states"] = True
        target = base_outputs(model, self.accelerator.unwrap_model(self.model), self.base_model, plain)
        labels = inputs.get("labels")
        measured = None if self.model.training else labels
        outputs = model(**plain, labels=measured, reconstruction_request=inputs["reconstruction_request"])
        if measured is not None:
            predicted = predicted_tokens(inputs).sum()
            self._in_evaluation.add({"next_token_loss": outputs.loss}, predicted, predicted)
        mask, counted = tokens_that_count(inputs), predicted_tokens(inputs)
        divergence = distillation_loss(outputs.logits[:, :-1], target.logits[:, :-1], counted)
        divisor = counted.sum().clamp_min(1) if num_items is None else num_items / self._shares.processes
        parts = {"util": divergence / divisor}
        if self.args.lambda_streams:
            distance = streams_loss(outputs.hidden_states, target.hidden_states, mask, self.args.normalize_losses)
            parts["streams"] = distance * self._share(mask, num_items)
        return parts, outputs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Measures data without labels, too, where `Trainer.prediction_step` measures nothing."""
        if not prediction_loss_only:
            inputs = inputs | {"logits_to_keep": 0}  # all logits, even if no loss is made from them
        if inputs.get("labels") is not None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        measured = loss if torch.is_tensor(loss) else None  # the utility may be the only loss
        return measured, None if prediction_loss_only else outputs.get("logits"), None


__all__ = ["MFNTrainer", "MFNTrainingArguments"]
