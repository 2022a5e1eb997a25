"""Models and tokenizers that verbs read. What is wrong with one is found before the work begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from ..utils.readers import readable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..model.configuration_mfn import MFNConfig
    from ..model.mfn_for_causal_lm import MFNForCausalLM

    ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def read_config(model: str) -> MFNConfig:
    """Reads the config of an MFN model; an error names a folder or id that is missing or is not an MFN model."""
    from ..model.configuration_mfn import MFNConfig
    from ..model.whole_files import readable_source

    with readable_source(model):
        return MFNConfig.from_pretrained(model)


def read_tokenizer(model: str) -> Any:
    """Reads the tokenizer next to a model.

    Raises:
        ValueError: If there is none. For some models transformers then makes one that knows no text.
    """
    from transformers import AutoTokenizer

    with readable(f"the tokenizer of {model}"):
        tokenizer = AutoTokenizer.from_pretrained(model)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError("there is none; save one into the folder with tokenizer.save_pretrained")
    return tokenizer


def load_mfn(source: str, **options: Any) -> MFNForCausalLM:
    """Loads an MFN model from a folder or the Hub; `options` are those of `from_pretrained`.

    Raises:
        ValueError: If a weight is not finite.
    """
    from ..model.mfn_for_causal_lm import MFNForCausalLM

    model: MFNForCausalLM = MFNForCausalLM.from_pretrained(source, **options)
    return with_finite_weights(model, source)


def with_finite_weights(model: ModelT, source: str) -> ModelT:
    """Returns a model that was loaded from a folder or the Hub; `ValueError` if a weight is not finite."""
    from ..model.finite import non_finite_weight

    if (name := non_finite_weight(model)) is not None:
        raise ValueError(
            f"{source}: weight {name} is not finite, or its norm is not; the file is damaged, or training diverged"
        )
    return model


__all__ = ["load_mfn", "read_config", "read_tokenizer", "with_finite_weights"]
