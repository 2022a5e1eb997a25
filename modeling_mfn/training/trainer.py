"""Training MFN models with the Trainer of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..model.mfn_layer import mfn_parameters
from ..model.mfn_pass import Reconstruction, ReconstructionRequest
from ..model.modes import as_base
from ..utils.processes import all_reduce_sum, world_size
from .activation_cache import CachedResiduals
from .arguments import MFNTrainingArguments
from .callbacks import ScheduleCallback, StatisticsCallback, UnitNormCallback
from .distributed import unshard_for_gradients
from .losses import distillation_loss
from .objective import FeatureObjective, choose, tokens_that_count
from .record import find_complete_checkpoint, write_record
from .statistics import Averages, FeatureStatistics, variation_of
from .trainable import TrainableFeatures, check_peft, check_shared_decoder, freeze_backbone, trains_backbone

logger = logging.get_logger(__name__)

GLOBAL = ("rate", "comp")
"""Losses of the batch of all processes."""


class MFNTrainer(Trainer):
    """`Trainer` with the paper's objective, eq. 4, and the auxiliary loss that keeps features alive.

    The losses of all MFN layers add up, so that a lambda weighs the same in a model with one and with thirty; their
    gradients stay inside each layer, but for the utility loss. Over the accumulated batches of an optimizer step, and
    over processes, the losses add up to those of one large batch; the firing rates and covariances of the rate and
    competition losses are those of a batch of all processes. Every part is logged by itself, without its lambda and as
    a mean over layers, as are alpha, k and the figures of [`FeatureStatistics`].

    Args:
        model: an `MFNForCausalLM`, or a PEFT model around one.
        args: [`MFNTrainingArguments`].
        base_model: with `util_target="kl"`, the model whose distribution is the target. By default this model at
            alpha = 0, without adapters: its base, as long as the backbone's own weights are not trained.
        others, kwargs: those of `Trainer`, in its order.
    """

    args: MFNTrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: MFNTrainingArguments | None = None,
        *others: Any,
        base_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = MFNTrainingArguments(output_dir="tmp_trainer")  # as Trainer does
        if not isinstance(args, MFNTrainingArguments):
            raise ValueError(f"args is {type(args).__name__}; MFNTrainer takes MFNTrainingArguments")
        if args.mfn_warmup and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # the frozen backbone
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs; start with accelerate launch, or set CUDA_VISIBLE_DEVICES"
            )
        super().__init__(model, args, *others, **kwargs)
        if args.reinit_dead_every and self.is_fsdp_enabled:
            raise ValueError("reinit_dead_every is not available under FSDP, where no process has whole weights")
        if args.trainable_features and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("trainable_features is not available under FSDP and DeepSpeed, which spread weights")
        self.base_model = base_model
        if base_model is not None:
            base_model.requires_grad_(False).eval().to(args.device)
        self._statistics_callback = StatisticsCallback()
        for callback in (ScheduleCallback, UnitNormCallback, self._statistics_callback):
            self.add_callback(callback)
        self._tokens_in_step: Tensor | float = 0
        self._set_up()

    def _set_up(self) -> None:
        """What depends on the model: what of it is trained, its objective and its statistics."""
        args, config = self.args, self.model.config
        args.check_model(config)
        if isinstance(self.model, CachedResiduals):
            args.check_cached()
        if config.shared_decoder:
            check_shared_decoder(self.model, self.is_fsdp_enabled)
        if args.trainable == "mfn":
            freeze_backbone(self.model)
        self._chosen = TrainableFeatures(args.trainable_features, config) if args.trainable_features else None
        if self._chosen is not None:
            self.remove_callback(TrainableFeatures)
            self.add_callback(self._chosen)  # after that of unit norm
            self._chosen.freeze_the_rest(self.model)
        if hasattr(self.model, "peft_config"):
            check_peft(self.model, args)
        if any(p.requires_grad and p.dtype.itemsize < 4 for p in mfn_parameters(self.model).values()):
            # small steps are rounded away
            logger.warning("MFN layers below float32 stop learning at small rates; load float32, train with bf16=True")
        if args.util_target == "kl" and self.base_model is None and trains_backbone(self.model):
            raise ValueError(
                'util_target is "kl", but training moves the logits of the backbone: give the base model as base_model'
            )
        # `objective` is the Trainer's own name for the figure of a hyperparameter search
        self.feature_objective = FeatureObjective(args, config)
        self.statistics = FeatureStatistics(config, args.rate_window, args.device)
        self._statistics_callback.statistics = self.statistics
        self._eval_statistics = self._statistics_of_an_evaluation()
        self._train_parts, self._eval_parts = Averages(), Averages()

    def _statistics_of_an_evaluation(self) -> FeatureStatistics:
        # which is one step to them: a feature that was silent for a token was silent on all
        return FeatureStatistics(self.model.config, 1, self.args.device)

    def _hp_search_setup(self, trial: Any) -> None:
        # where `train` has its model from `model_init`, and a search has set its arguments
        super()._hp_search_setup(trial)
        if self.model_init is not None:
            self._set_up()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Gives MFN layers groups of their own where they have a learning rate of their own."""
        optimizer = super().create_optimizer(model)
        if self.args.mfn_learning_rate is None:
            return optimizer
        ours = set(mfn_parameters(model or self.model).values())
        for group in list(optimizer.param_groups):
            mine = [parameter for parameter in group["params"] if parameter in ours]
            if mine:
                group["params"] = [parameter for parameter in group["params"] if parameter not in ours]
                optimizer.add_param_group(group | {"params": mine, "lr": self.args.mfn_learning_rate})
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """`Trainer.train`; `resume_from_checkpoint=True` takes the last checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = find_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} has no complete checkpoint to resume from")
        return super().train(resume_from_checkpoint, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Counts the real tokens of an optimizer step in all processes, of which each batch is a share."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = torch.tensor(float(sum(int(tokens_that_count(batch).sum()) for batch in batches)), device=device)
        self._tokens_in_step = all_reduce_sum(tokens)
        self.state.num_input_tokens_seen += int(self._tokens_in_step)
        return batches, num_items

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        """Nothing: `get_batch_samples` has counted them, padding left out, for the training record."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """`Trainer.training_step`; gradients of features that are not trained are gone before they are clipped."""
        loss = super().training_step(model, *args, **kwargs)
        if self._chosen is not None:
            self._chosen.mask_gradients(self.model)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Eq. 4 for one batch, as its share of the optimizer step."""
        mask = tokens_that_count(inputs)
        request = self.feature_objective.request(mask, self._to_revive())
        parts, outputs = self._utility(model, inputs | {"reconstruction_request": request}, num_items_in_batch)
        layers = self._layer_losses(outputs.reconstructions, mask, request)
        if self.args.lambda_stab and self.args.stability_pass == "model":
            self._second_pass(model, inputs, outputs.reconstructions, mask, layers)
        share = self._share(mask, num_items_in_batch)
        mean_share = all_reduce_sum(torch.as_tensor(share, device=mask.device)) / world_size()
        for name in next(iter(layers.values())):
            losses = [parts_of_layer[name] for parts_of_layer in layers.values()]
            # those of all processes' tokens are the same in each, whatever its own share
            weight = mean_share if name in GLOBAL else share
            parts[name] = torch.stack(losses).mean() * weight
        loss = sum(
            self.args.weight(name) * part * (1 if name == "util" else len(layers)) for name, part in parts.items()
        )
        self._record(parts, layers, outputs.reconstructions, mask, share, num_items_in_batch)
        if not return_outputs:
            return loss
        return loss, type(outputs)(**{name: value for name, value in outputs.items() if name != "reconstructions"})

    def _utility(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> tuple[dict[str, Tensor], Any]:
        """Runs the model: the utility loss, where there is one, and the outputs."""
        distils = self.args.util_target == "kl"  # which needs no labels
        unlabelled = inputs.get("labels") is None and not self.model.training and not distils
        if not self.args.lambda_util or self._warming_up() or unlabelled:
            outputs = model(**{"logits_to_keep": 1} | {n: value for n, value in inputs.items() if n != "labels"})
            unshard_for_gradients(model, outputs.reconstructions)
            return {}, outputs
        if distils:
            loss, outputs = self._distil(model, inputs, num_items)
        else:
            loss, outputs = super().compute_loss(model, inputs, True, num_items)
        return {"util": loss}, outputs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """As the Trainer's, which measures nothing on data without labels: the feature losses need none."""
        if not prediction_loss_only:
            inputs = inputs | {"logits_to_keep": 0}  # all of them, whether or not a loss is made from them
        if inputs.get("labels") is not None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        measured = loss if torch.is_tensor(loss) else None  # the utility may be the only loss
        return measured, None if prediction_loss_only else outputs.get("logits"), None

    def _warming_up(self) -> bool:
        return self.model.training and self.state.global_step < self.args.warmup_end(self.state.max_steps)

    def _to_revive(self) -> dict[int, Tensor]:
        if not self.args.weight("aux") or not self.model.training:
            return {}
        found = self.statistics.below(self.args.rate_floor * self.feature_objective.rho)
        return found if self._chosen is None else self._chosen.among(found)

    def _layer_losses(
        self, reconstructions: Mapping[int, Reconstruction], mask: Tensor, request: ReconstructionRequest
    ) -> dict[int, dict[str, Tensor]]:
        layers = {}
        if self.model.training:
            variation = self.statistics.variation()
        else:  # an evaluation says the same whatever was trained on before
            variation = {layer: variation_of(item.residual, mask) for layer, item in reconstructions.items()}
        for layer, item in reconstructions.items():
            parts = self.feature_objective.losses(item, mask, request, variation[layer])
            if not self.model.training:
                parts.pop("aux", None)  # a means of training, no measure of the model
            layers[layer] = {name: loss.to(mask.device) for name, loss in parts.items()}
        return layers

    def _second_pass(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        clean: Mapping[int, Reconstruction],
        mask: Tensor,
        layers: dict[int, dict[str, Tensor]],
    ) -> None:
        """Section 4.4's training note: some rows once more, from perturbed embeddings."""
        rows = choose(torch.arange(len(mask), device=mask.device), self.args.stability_fraction)
        again = {
            name: value[rows] if torch.is_tensor(value) and len(value) == len(mask) else value
            for name, value in inputs.items()
            if name != "labels"
        }
        again |= {"reconstruction_request": self.feature_objective.second_request(), "logits_to_keep": 1}
        perturbed = model(**again).reconstructions
        unshard_for_gradients(model, perturbed)
        for layer, parts in layers.items():
            code, perturbed_code = clean[layer].code, perturbed[layer].code
            chosen = rows.to(code.values.device)
            code = code._replace(indices=code.indices[chosen], values=code.values[chosen])
            parts["stab"] = self.feature_objective.stability(code, perturbed_code, mask[rows]).to(mask.device)

    def _distil(self, model: nn.Module, inputs: Mapping[str, Any], num_items: Any) -> tuple[Tensor, Any]:
        """KL(base || model) a predicted token, scaled like the next-token loss."""
        plain = {n: v for n, v in inputs.items() if n not in ("labels", "reconstruction_request")}
        with torch.no_grad(), self._as_base() if self.base_model is None else nullcontext():
            target = (self.base_model or model)(**plain).logits
        labels = inputs.get("labels")
        measured = None if self.model.training else labels
        outputs = model(**plain, labels=measured, reconstruction_request=inputs["reconstruction_request"])
        if measured is not None:
            self._eval_parts.add({"next_token_loss": outputs.loss}, len(measured), len(measured))
        counted = (tokens_that_count(inputs) if labels is None else labels != -100)[:, 1:]
        loss = distillation_loss(outputs.logits[:, :-1], target[:, :-1], counted)
        if num_items is None:
            return loss / counted.sum().clamp_min(1), outputs
        if self.args.average_tokens_across_devices:
            loss = loss * world_size()
        return loss / num_items, outputs

    @contextmanager
    def _as_base(self) -> Iterator[None]:
        model = self.accelerator.unwrap_model(self.model)
        adapters: AbstractContextManager = (
            model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
        )
        with adapters, as_base(model):
            yield

    def _share(self, mask: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
        """What a mean over this batch counts in its optimizer step. Gradients are averaged over processes, and the
        Trainer divides by the number of batches itself where it does not know the number of items."""
        if not self.model.training:
            return 1.0
        share = mask.sum() / self._tokens_in_step * world_size()
        return share * self.current_gradient_accumulation_steps if self._divides(num_items_in_batch) else share

    def _divides(self, num_items_in_batch: Tensor | int | None) -> bool:
        return num_items_in_batch is None and self.compute_loss_func is None

    def _record(
        self,
        parts: Mapping[str, Tensor],
        layers: Mapping[int, Mapping[str, Tensor]],
        reconstructions: Mapping[int, Reconstruction],
        mask: Tensor,
        share: Tensor | float,
        num_items_in_batch: Any,
    ) -> None:
        named = {f"{name}_loss": part for name, part in parts.items()}
        if self.args.log_layers:
            for layer, losses in layers.items():
                named |= {f"layer_{layer}/{name}_loss": loss * share for name, loss in losses.items()}
        if self.model.training:
            share_of_step = 1 / self.current_gradient_accumulation_steps
            self._train_parts.add(named, share_of_step if self._divides(num_items_in_batch) else 1, share_of_step)
            self.statistics.count(self.model.mfn_layers, reconstructions, mask)
            if self.args.reinit_dead_every:
                self._statistics_callback.errors = {
                    layer: self.model.mfn_layers[layer].input_and_error(item)[1][mask.bool().to(item.residual.device)]
                    for layer, item in reconstructions.items()
                }
        else:
            rows = len(mask)
            self._eval_parts.add(named, rows, rows)
            self._eval_statistics.count(self.model.mfn_layers, reconstructions, mask)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the parts of the loss, alpha, k and what the features do to the Trainer's own figures."""
        if "loss" in logs:
            config = self.accelerator.unwrap_model(self.model).config
            logs |= self._train_parts.take() | {"alpha": config.alpha, "k": config.k}
            logs |= self.statistics.figures(self.args.log_layers)
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Adds the parts of the loss and what the features did to the metrics."""
        self._eval_parts.take()
        self._eval_statistics = self._statistics_of_an_evaluation()
        output = super().evaluation_loop(*args, **kwargs)
        self._eval_statistics.step()
        prefix = kwargs.get("metric_key_prefix", "eval")
        found = self._eval_parts.take() | self._eval_statistics.figures(self.args.log_layers)
        output.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return output

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.statistics.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.statistics.load(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_record(output_dir or self.args.output_dir, self.args, self.state, self.model.config)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Compares models whose alpha and k have arrived at their ends. The bottleneck is not there yet in earlier
        ones: the first would be best."""
        before = self.state.best_metric, self.state.best_global_step
        found = super()._determine_best_metric(metrics, trial)
        if not self.args.has_arrived(self.model.config):
            self.state.best_metric, self.state.best_global_step = before
            return False
        return found


__all__ = ["MFNTrainer", "MFNTrainingArguments"]
