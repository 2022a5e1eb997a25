"""Outputs of MFN models: those of transformers, with codes and reconstructions."""

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from .mfn_pass import Reconstruction
from .sparse_code import SparseCode


@dataclass
class MFNModelOutput(ModelOutput):
    """Output of `MFNModel`."""

    last_hidden_state: Tensor | None = None
    """(B, T, d)."""
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    codes: dict[int, SparseCode] | None = None
    """With `output_codes=True`: layer -> code (B, T, K)."""
    embedding_codes: dict[str, SparseCode] | None = None
    """Embeddings as codes, with `output_codes=True` and `codes="update"`; see [`MFNCausalLMOutput`]."""
    reconstructions: dict[int, Reconstruction] | None = None
    """With `output_reconstructions=True`: layer -> residual, reconstruction and code."""


@dataclass
class MFNCausalLMOutput(ModelOutput):
    """Output of `MFNForCausalLM`."""

    loss: Tensor | None = None
    """Mean next-token cross entropy in nats, where labels were given."""
    logits: Tensor | None = None
    """(B, T, vocabulary)."""
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    codes: dict[int, SparseCode] | None = None
    """With `output_codes=True`: layer -> code (B, T, K), or (B, T, K + I) where I features are steered."""
    embedding_codes: dict[str, SparseCode] | None = None
    """With `output_codes=True` and `codes="update"`: the parts of the residual stream before the first MFN layer, as
    codes (B, T, 1) with the value 1. `"token"` has token ids, and `"position"` position ids where positions are in the
    stream. Directions are the rows of the embedding tables. `"token"` is missing where `inputs_embeds` were given."""
    reconstructions: dict[int, Reconstruction] | None = None
    """With `output_reconstructions=True`: layer -> residual, reconstruction and code."""


__all__ = ["MFNCausalLMOutput", "MFNModelOutput"]
