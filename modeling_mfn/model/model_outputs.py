"""Outputs of MFN models: those of transformers, with codes and reconstructions."""

from dataclasses import dataclass, fields

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .mfn_pass import Reconstruction
from .sparse_code import SparseCode

CACHE = next(each.name for each in fields(BaseModelOutputWithPast) if each.name in ("cache", "past_key_values"))
"""Name of the cache of keys and values in calls and outputs: `"cache"` from transformers 5.24 on."""


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """Returns the cache that was given by either of its names.

    Raises:
        ValueError: if two different ones were given.
    """
    if past_key_values is not None and cache is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument; give one of them")
    return past_key_values if cache is None else cache


@dataclass
class MFNModelOutput(BaseModelOutputWithPast):
    """Output of `MFNModel`: that of a headless model of transformers, and more.

    The fields of transformers are `last_hidden_state` (B, T, d), the cache, `hidden_states` and `attentions`.
    """

    codes: dict[int, SparseCode] | None = None
    """With `output_codes=True`: layer -> code (B, T, K)."""
    embedding_codes: dict[str, SparseCode] | None = None
    """Embeddings as codes, with `output_codes=True` and `codes="update"`; see [`MFNCausalLMOutput`]."""
    reconstructions: dict[int, Reconstruction] | None = None
    """With `output_reconstructions=True`: layer -> residual, reconstruction and code."""


@dataclass
class MFNCausalLMOutput(CausalLMOutputWithPast):
    """Output of `MFNForCausalLM`: that of a causal LM of transformers, and more.

    The fields of transformers are `loss`, the mean next-token cross entropy in nats where labels were given, `logits`
    (B, T, vocabulary), the cache, `hidden_states` and `attentions`.
    """

    codes: dict[int, SparseCode] | None = None
    """With `output_codes=True`: layer -> code (B, T, K), or (B, T, K + I) where I features are steered."""
    embedding_codes: dict[str, SparseCode] | None = None
    """With `output_codes=True` and `codes="update"`: the parts of the residual stream before the first MFN layer, as
    codes (B, T, 1). The value is 1, or the number by which a family multiplies its embeddings. `"token"` has token ids,
    and `"position"` position ids where positions are in the stream. Directions are the rows of the embedding tables.
    `"token"` is missing where `inputs_embeds` were given."""
    reconstructions: dict[int, Reconstruction] | None = None
    """With `output_reconstructions=True`: layer -> residual, reconstruction and code."""


__all__ = ["CACHE", "MFNCausalLMOutput", "MFNModelOutput", "one_cache"]
