"""Models that the verbs work with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..model.modeling_mfn import MFNForCausalLM

    ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def load_mfn(source: str, **options: Any) -> MFNForCausalLM:
    """Loads an MFN model from a folder or the Hub; `options` are those of `from_pretrained`.

    Raises:
        ValueError: if a weight is not finite.
    """
    from ..model.modeling_mfn import MFNForCausalLM

    model: MFNForCausalLM = MFNForCausalLM.from_pretrained(source, **options)
    return with_finite_weights(model, source)


def with_finite_weights(model: ModelT, source: str) -> ModelT:
    """Returns a model that was loaded from a folder or the Hub; `ValueError` if a weight is not finite."""
    from ..model.finite import non_finite_weight

    if (name := non_finite_weight(model)) is not None:
        raise ValueError(f"{source}: weight {name} is not finite; the file is damaged, or the training diverged")
    return model


__all__ = ["load_mfn", "with_finite_weights"]
