"""Training MFN models with any Trainer: the feature losses beside its own loss, and the rules of MFN layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, has_length

from ..model.mfn_layer import mfn_parameters
from ..model.mfn_pass import ReconstructionRequest
from ..model.modes import unsteered
from ..model.twins import check_has_features
from ..utils.processes import watched_processes
from .arguments import MFNTrainingArguments
from .callbacks import ScheduleCallback, StatisticsCallback, UnitNormCallback
from .collation import collate_without_padding
from .distributed import check_distribution, unshard_for_gradients
from .feature_sums import FeatureSums
from .measurements import Evaluation, Measurements, name_of_loss
from .objective import FeatureObjective
from .observed_pass import ObservedPass, observing, without_reconstructions
from .record import find_complete_checkpoint, write_record
from .restarts import RestartCallback
from .statistics import FeatureStatistics
from .step_guard import StepGuard, check_weights
from .step_shares import StepShares, means_over_layers, predicted_tokens
from .trainable_features import TrainableFeatures
from .trained_parts import check_trained_parts, freeze_backbone, set_learning_rate


class MFNTrainerMixin(Trainer):
    """Makes a trainer train MFN models, with its own loss in place of the utility loss of eq. 4.

    ```python
    class MFNSFTTrainer(MFNTrainerMixin, SFTTrainer): ...


    @dataclass
    class MFNSFTConfig(SFTConfig, MFNTrainingArguments): ...
    ```

    The feature losses are added on the forward pass that the trainer's own loss is made of. Passes without gradients,
    such as those of a reference model, get none. Alpha and k follow their schedules, directions keep their norm, and
    checkpoints hold the training record and the statistics of the features.

    The trainer's loss must come from one forward pass with gradients. [`MFNTrainer`] is this mixin with the losses that
    only language modelling has.

    Args:
        args, kwargs: arguments of the trainer. Its `args` must also be [`MFNTrainingArguments`].

    Raises:
        TypeError: for a class that names a trainer with a loss before the mixin.
        ValueError: if the arguments do not fit the model, or the way that processes share its weights.
    """

    args: MFNTrainingArguments
    data_collator: Any
    base_model: nn.Module | None = None
    has_own_loss: bool = True
    """False if the loss is that of [`MFNTrainer`], with all its options."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        earlier = cls.__mro__[: cls.__mro__.index(MFNTrainerMixin)]
        others = [
            each.__name__
            for each in earlier
            if "compute_loss" in vars(each) and issubclass(each, Trainer) and not issubclass(each, MFNTrainerMixin)
        ]
        if others:
            raise TypeError(
                f"{cls.__name__} names {others[0]} before MFNTrainerMixin, whose losses would be lost; name "
                "MFNTrainerMixin first"
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_arguments(self.args)
        if self.args.mfn_warmup and self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = True  # the frozen backbone
        if isinstance(self.data_collator, DataCollatorWithPadding) and self.data_collator.tokenizer.pad_token is None:
            self.data_collator = collate_without_padding
        check_distribution(self.args, self.is_fsdp_enabled, self.is_deepspeed_enabled)
        self._resumed_from: str | None = None
        self._shares = StepShares(self.accelerator, self.args)
        self._batches_of_step: tuple[list, Any] = [], None
        """Batches of the optimizer step, and the number of their labels."""
        self._set_up()

    def _check_arguments(self, args: Any) -> None:
        """Raises `ValueError` if a training cannot have these arguments, whatever its model is."""
        if not isinstance(args, MFNTrainingArguments):
            raise ValueError(f"args is {type(args).__name__}; {type(self).__name__} takes MFNTrainingArguments")
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs; start with accelerate launch, or set CUDA_VISIBLE_DEVICES"
            )
        if self.has_own_loss:
            args.check_own_loss(type(self).__name__)

    def _set_up(self) -> None:
        """Sets up all that depends on the model: its trained parts, objective, statistics and callbacks."""
        check_has_features(self.model)
        self._check_models()
        args, config = self.args, self.model.config
        if args.trainable == "mfn":
            freeze_backbone(self.model)
        self._chosen = TrainableFeatures(args.trainable_features, config) if args.trainable_features else None
        if self._chosen is not None:
            self._chosen.freeze_the_rest(self.model)
        check_trained_parts(self.model, args, self.is_fsdp_enabled, has_base=self.base_model is not None)
        # `objective` is the Trainer's own name for the figure of a hyperparameter search
        self.feature_objective = FeatureObjective(args, config)
        self.statistics = FeatureStatistics(config, args.rate_window, args.device)
        self._in_evaluation = Evaluation(config, self.feature_objective, args.device)
        self._restarts = RestartCallback(self.statistics) if args.reinit_dead_every else None
        self._forget_batches()
        own: list[TrainerCallback | None] = [
            ScheduleCallback(),
            UnitNormCallback(),
            StatisticsCallback(self.statistics),
        ]
        for callback in [*own, self._restarts, self._chosen]:
            if callback is not None:
                self.remove_callback(type(callback))  # that of an earlier model
                self.add_callback(callback)

    def _check_models(self) -> None:
        """Raises `ValueError` if the arguments do not fit the model, or if it or its reference has an active preset."""
        self.args.check_model(self.model.config)
        reference = getattr(self, "ref_model", None)  # the name in trainers of TRL
        active = getattr(getattr(reference, "config", None), "active_preset", None)
        if active is not None:
            raise ValueError(
                f"active_preset of the reference model is {active!r}, and a reference must not be steered: set "
                "config.active_preset of the model to None and save it before, or give such a ref_model"
            )

    def _forget_batches(self) -> None:
        """Forgets the batches of an earlier training, which may have been interrupted within a step."""
        self._in_training = Measurements(self.model.config, self.args.device)
        self._guard = StepGuard(self.accelerator, self.args)
        for part in (self.statistics, self._restarts):
            if part is not None:
                part.drop_step()

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """Sets up a model that `model_init` made, and loads the statistics of the checkpoint.

        The Trainer asks for these values at the start of a training, when model and arguments are final.
        """
        if self.model_init is not None:
            self._set_up()
        self._check_models()  # their configs may have changed
        self._forget_batches()
        if self._resumed_from is not None:
            self.statistics.load(self._resumed_from)
        return super().set_initial_training_values(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Creates the optimizer, with groups for the MFN layers if they have their own learning rate."""
        optimizer = super().create_optimizer(model)
        if self.args.mfn_learning_rate is not None:
            features = mfn_parameters(model or self.model).values()
            set_learning_rate(optimizer, features, self.args.mfn_learning_rate)
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains as `Trainer.train` does. `resume_from_checkpoint=True` takes the last complete checkpoint.

        Raises:
            ValueError: if there is no complete checkpoint to resume from, or if the data set is empty.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = find_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} has no complete checkpoint to resume from")
        if self.train_dataset is not None and has_length(self.train_dataset) and not len(self.train_dataset):
            raise ValueError("train_dataset is empty")
        self._resumed_from = resume_from_checkpoint or None
        with watched_processes():
            return super().train(resume_from_checkpoint, **kwargs)

    def end_training(self) -> None:
        """Ends the work of several processes. Call it last, in every process.

        The wrapped model is freed before the process group: in the other order, gloo's threads can block each other.
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Begins an optimizer step: returns its batches, and counts their real tokens in all processes."""
        if self.state.global_step >= self.state.max_steps:  # resumed when complete: the Trainer would make one more
            self.control.should_training_stop = True
            return [], None
        self._in_training.begin_step()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = self._shares.begin_step(batches, device)
        if tokens is not None and self.args.include_num_input_tokens_seen == "no":  # otherwise the trainer counts them
            self.state.num_input_tokens_seen += int(tokens)
        if num_items is not None:
            # without labels, as in text for features alone, the utility loss is 0 and not 0 / 0
            num_items = torch.as_tensor(num_items, device=device).clamp_min(1)
        self._batches_of_step = batches, num_items
        return batches, num_items

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Runs `Trainer.training_step`, then drops the gradients of features that are not trained."""
        loss = super().training_step(model, *args, **kwargs)
        if self._chosen is not None:  # before gradients are clipped
            self._chosen.mask_gradients(self.model)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Any:
        """Returns the norm of the step's gradient, after dropping a step that is not finite.

        Private to the Trainer, and called once between the gradients and the optimizer. Callbacks do not get the norm.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if not self._guard.is_finite(norm, self.state.global_step, lambda: self._run_step_again(model)):
            self.optimizer.zero_grad()  # without gradients the optimizer moves nothing
            for part in (self._in_training, self.statistics, self._restarts):
                if part is not None:
                    part.drop_step()
        return norm

    def _run_step_again(self, model: nn.Module) -> nn.Module:
        """Makes the gradient of the optimizer step anew, before clipping. Returns the model that has it."""
        model.zero_grad()
        batches, num_items = self._batches_of_step
        for batch in batches:
            self.training_step(model, batch, num_items)
        return self.model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Adds the feature losses of one batch to the trainer's own loss, as the batch's share of the step."""
        parts, outputs, seen = self._run(model, inputs, return_outputs, num_items_in_batch)
        items, mask = seen.reconstructions, seen.mask
        sums = FeatureSums.of(self.model.mfn_layers, items, mask)
        layers = self._layer_losses(model, seen)
        share = self._share(mask, num_items_in_batch)
        parts |= means_over_layers(layers, share)
        total: Any = sum(self.feature_objective.weight(name) * part for name, part in parts.items())
        if self.model.training:
            named = {f"{name}_loss": part for name, part in parts.items()}
            if self.args.log_layers:
                for layer, losses in layers.items():
                    named |= {name_of_loss(layer, name): loss * share for name, loss in losses.items()}
            self._measure(named, sums, num_items_in_batch)
            self._guard.observe(total, parts, layers)
            if self._restarts is not None:
                self._restarts.observe(self.model.mfn_layers, items, mask)
        else:
            self._in_evaluation.add_batch(parts, layers, sums, self._averaged_over(inputs, mask, num_items_in_batch))
        return (total, without_reconstructions(outputs)) if return_outputs else total

    def _run(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items: Any
    ) -> tuple[dict[str, Tensor], Any, ObservedPass]:
        """Computes the trainer's own loss: {"util": loss}, or {} if it has no weight; outputs, and the model's pass."""
        with observing(self.model, self._request, inputs.get("input_ids")) as observer:
            found = super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items)
        seen = observer.seen
        loss, outputs = found if return_outputs else (found, None)
        if self.args.lambda_util and not self._warming_up():
            return {"util": loss}, outputs, seen
        unshard_for_gradients(model, seen.reconstructions)
        return {}, outputs, seen

    def _request(self, mask: Tensor) -> ReconstructionRequest:
        """Asks a forward pass for the inputs of the feature losses; `mask` (B, T) is nonzero where a token counts."""
        return self.feature_objective.request(mask, self._rare_features())

    def _rare_features(self) -> dict[int, Tensor]:
        """Features for the auxiliary loss: layer -> (R,)."""
        if not self.args.weight("aux") or not self.model.training:
            return {}
        found = self.statistics.below(self.args.rate_floor * self.feature_objective.rho)
        return found if self._chosen is None else self._chosen.among(found)

    def _warming_up(self) -> bool:
        return self.model.training and self.state.global_step < self.args.warmup_end(self.state.max_steps)

    def _layer_losses(self, model: nn.Module, seen: ObservedPass) -> dict[int, dict[str, Tensor]]:
        """Layer -> feature losses of this batch, without their lambdas."""
        # an evaluation divides by the share of all its tokens, at its end
        items, mask = seen.reconstructions, seen.mask
        variation = self.statistics.variation() if self.model.training else [1.0] * len(items)
        layers = {}
        for (layer, item), share in zip(items.items(), variation, strict=True):
            parts = self.feature_objective.losses(item, mask, seen.request, share)
            if not self.model.training:
                parts.pop("aux", None)  # a means of training, not a measure of the model
            layers[layer] = {name: loss.to(mask.device) for name, loss in parts.items()}
        if self.args.lambda_stab and self.args.stability_pass == "model":
            for layer, loss in self.feature_objective.second_pass(model, seen.inputs, items, mask).items():
                layers[layer]["stab"] = loss
        return layers

    def _share(self, mask: Tensor, num_items: Tensor | int | None) -> Tensor:
        """Weight of this batch's means in its optimizer step; 1 in evaluation."""
        if not self.model.training:
            return torch.ones((), device=mask.device)
        return self._shares.of_tokens(mask, self._divisor(num_items))

    def _divisor(self, num_items: Tensor | int | None) -> int:
        """Number by which the Trainer divides the loss of a batch."""
        # came with transformers 5.19; earlier ones do not read what a trainer says
        scaled = self.loss_is_scaled_for_ga if hasattr(Trainer, "loss_is_scaled_for_ga") else None
        if scaled is None:
            scaled = (num_items is not None and self.model_accepts_loss_kwargs) or self.compute_loss_func is not None
        return 1 if scaled else self.current_gradient_accumulation_steps

    def _measure(self, named: Mapping[str, Tensor], sums: FeatureSums, num_items: Any) -> None:
        """Adds a batch to the figures of the training."""
        self._in_training.add(named, 1 / self._divisor(num_items), 1 / self.current_gradient_accumulation_steps)
        self._in_training.count(sums)
        self.statistics.add(sums)

    def _averaged_over(self, inputs: Mapping[str, Any], mask: Tensor, num_items: Tensor | int | None) -> Tensor:
        """Weight of a batch's own loss in an evaluation: the tokens that it is a mean over, or rows without labels."""
        if num_items is not None:  # of all processes, unless each process averages on its own
            return torch.as_tensor(num_items, device=mask.device) / self._shares.processes
        if self.has_own_loss and inputs.get("labels") is None:
            return torch.tensor(len(mask), device=mask.device)
        return predicted_tokens(inputs).sum()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs the Trainer's figures with the parts of the loss, alpha, k and the figures of the features."""
        if "loss" in logs:
            config = self.accelerator.unwrap_model(self.model).config
            logs |= {"alpha": config.alpha, "k": config.k}
            logs |= self._in_training.take(self.args.log_layers, dead=self.statistics.silent())
        if not math.isfinite(logs.get("grad_norm", 0.0)):  # of a step that was left out
            del logs["grad_norm"]
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Runs the evaluation, and adds the parts of the loss and the figures of the features to its metrics.

        A preset that is active by default is off.

        Raises:
            ValueError: if the data set is empty.
        """
        if has_length(dataloader.dataset) and not len(dataloader.dataset):
            raise ValueError("the data set of the evaluation is empty")
        self._in_evaluation = Evaluation(self.model.config, self.feature_objective, self.args.device)
        with unsteered(self.model):
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        found = self._in_evaluation.take(self.args.log_layers)
        output.metrics.pop(f"{prefix}_loss", None)  # a mean over batches
        output.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return output

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Measures the features of rows without labels, too, of which `Trainer.prediction_step` makes no loss."""
        measured = self._in_evaluation.batches
        found = super().prediction_step(model, inputs, *args, **kwargs)
        if self._in_evaluation.batches == measured:
            plain = {name: value for name, value in self._prepare_inputs(inputs).items() if name != "labels"}
            with torch.no_grad(), self.compute_loss_context_manager(), observing(self.model, self._request) as observer:
                model(**plain | {"logits_to_keep": 1})
            seen = observer.seen
            sums = FeatureSums.of(self.model.mfn_layers, seen.reconstructions, seen.mask)
            self._in_evaluation.add_batch({}, self._layer_losses(model, seen), sums, seen.mask.sum())
        return found

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Saves the model as `Trainer.save_model` does, with the training record next to it.

        A checkpoint also gets the statistics of the features. Both are written before the Trainer's state, so that a
        checkpoint with a state is complete, and before the Trainer pushes the folder.

        Raises:
            ValueError: if a weight is not finite; nothing is written then.
        """
        check_weights(self.model)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_record(folder, self.args, self.state, self.model.config)
            if self.is_in_train and not self.args.save_only_model:
                self.statistics.save(folder)
        super().save_model(output_dir, *args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Compares models only once alpha and k have arrived at their ends: without the bottleneck the first is best.

        Private to the Trainer, without a public way: no callback is called between an evaluation and this comparison,
        which decides with `save_strategy="best"` whether a checkpoint is saved.
        """
        before = self.state.best_metric, self.state.best_global_step
        found = super()._determine_best_metric(metrics, trial)
        if not self.args.has_arrived(self.model.config):
            self.state.best_metric, self.state.best_global_step = before
            return False
        return found


__all__ = ["MFNTrainerMixin"]
