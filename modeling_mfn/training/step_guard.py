"""Guard of the weights in a training: a loss, gradient or weight that is not finite goes no further."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, reduce
from torch import Tensor, nn
from transformers.utils import logging

from ..model.finite import has_finite_norm, non_finite_weight, whole
from .arguments import OF_THE_MODEL, MFNTrainingArguments

logger = logging.get_logger(__name__)

NAMED = 3
"""Parameters that an error names."""


class StepGuard:
    """Decides before each optimizer step, alike in all processes, if its losses and gradient are finite.

    A step that is not finite stops the training. The first `skipped` of such steps are left out instead.

    float16 is trained with a scaled loss. Its gradients overflow now and then, and the scaler leaves such steps out. So
    there a gradient counts only once the loss is no longer scaled up.

    DeepSpeed and some optimizers move the weights in the backward pass. There, a training stops only after that.
    """

    def __init__(self, accelerator: Accelerator, args: MFNTrainingArguments) -> None:
        self._accelerator = accelerator
        self._has_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self._moves_in_backward = self._has_deepspeed or args.moves_in_backward
        self._left = args.skip_nonfinite_steps
        self._losses: list[tuple[list[str], Tensor]] = []
        """Names of the losses of each batch since the last step, and a mask of the finite ones."""

    def observe(self, total: Tensor, parts: Mapping[str, Tensor], layers: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Notes the losses of a batch, those of layers by layer. `total` is what gradients are made of."""
        named = {f"the {name} loss of layer {at}": loss for at, own in layers.items() for name, loss in own.items()}
        named |= {f"the {name} loss": parts[name] for name in OF_THE_MODEL if name in parts} | {"the loss": total}
        losses = torch.stack([each.detach().float().to(total.device) for each in named.values()])
        self._losses.append((list(named), losses.isfinite()))

    def is_finite(self, gradient_norm: Tensor | float | None, step: int, run_again: Callable[[], nn.Module]) -> bool:
        """Returns False if the step is to be left out.

        Args:
            gradient_norm: norm of the whole gradient, `None` if unknown.
            step: number of optimizer steps before this one.
            run_again: makes the step's gradient anew and returns the model: clipping has spread what is not finite.

        Raises:
            ValueError: if the step is not finite, and no more steps may be left out.
        """
        losses, self._losses = self._losses, []
        device = self._accelerator.device
        norm = whole(torch.as_tensor(0.0 if gradient_norm is None else gradient_norm)).to(device)
        finite = torch.stack([*(mask.all().to(device) for _, mask in losses), norm.isfinite()])
        wrong = reduce(torch.stack([~finite[:-1].all(), ~finite[-1]]).float(), "sum")
        in_losses, in_gradient = (wrong > 0).tolist()
        if not in_losses and (not in_gradient or self._is_scaled_up()):
            return True
        named = [name for names, mask in losses for name, fine in zip(names, mask.tolist(), strict=True) if not fine]
        named += ["a loss of another process"] if in_losses else ["the gradient, of finite losses,"]
        report = f"is not finite in step {step + 1}"
        if self._left:
            self._left -= 1
            logger.warning(f"{named[0]} {report}, which is left out; {self._left} more may be")
            return False
        if self._moves_in_backward:
            raise ValueError(
                f"{named[0]} {report}; the training stops, after the backward pass moved the weights. Go on from a "
                "checkpoint; a smaller learning_rate may help"
            )
        if not in_losses and (names := non_finite_gradients(run_again())):
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            named = [f"the gradient, of finite losses, of {', '.join(names[:NAMED])}{more}"]
        raise ValueError(
            f"{named[0]} {report}; the training stops, and the weights are those before it. A smaller learning_rate "
            "may help; skip_nonfinite_steps leaves such steps out"
        )

    def _is_scaled_up(self) -> bool:
        if self._has_deepspeed:  # has a scaler of its own, which leaves steps out in float16 alone
            return self._accelerator.mixed_precision == "fp16"
        scaler = self._accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1


def non_finite_gradients(model: nn.Module) -> list[str]:
    """Returns the names of parameters whose gradient is not finite, those of the last layers first.

    A backward pass begins there, and carries on what is not finite. Every process of a sharded model must call it.
    """
    return [
        name
        for name, each in reversed(list(model.named_parameters()))
        if each.grad is not None and not has_finite_norm(each.grad)
    ]


def check_weights(model: nn.Module) -> None:
    """Raises `ValueError` if a weight is not finite, so that no such model is saved."""
    name = non_finite_weight(model)
    if name is not None:
        raise ValueError(f"weight {name} is not finite, or its norm is not; the model is not saved")


__all__ = ["StepGuard", "check_weights", "non_finite_gradients"]
