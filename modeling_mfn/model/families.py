"""Families of base models: the block of the paper's Figure 1 for each, and the names of its parts."""

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .mfn_layer import MFNLayer, MFNPass


class MFNBlock:
    """Figure 1 of the paper. Mixed into a block class of transformers, whose children it calls by that class's names;
    an existing block becomes one by a change of its class."""

    parts: tuple[str, str, str]
    """What the class calls the norm before attention, the attention, and the norm before the MLP."""
    mfn: MFNLayer
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, mfn_pass: MFNPass | None = None, **kwargs: Any) -> Tensor:
        """(B, T, d) -> (B, T, d); further arguments are those of the attention."""
        attention_norm, attention, mlp_norm = [getattr(self, part) for part in self.parts]
        h = hidden_states + attention(attention_norm(hidden_states), *args, **kwargs)[0]
        features = self.mfn(h, mfn_pass)
        residual = features if self.mfn.config.blend_into == "residual" else h
        return residual + self.mlp(mlp_norm(features))


class MFNLlamaBlock(MFNBlock, LlamaDecoderLayer):
    """A Llama block with an MFN layer."""

    parts = ("input_layernorm", "self_attn", "post_attention_layernorm")


class MFNGPT2Block(MFNBlock, GPT2Block):
    """A GPT-2 block with an MFN layer."""

    parts = ("ln_1", "attn", "ln_2")


class Family(NamedTuple):
    """How MFN layers enter the blocks of one `model_type` of transformers."""

    block_class: type[MFNBlock]
    blocks: str
    """Name of the module list of blocks in the headless model."""
    embedding: str
    """Name of the token embedding in the headless model."""
    final_norm: str
    """Name of the norm after the last block in the headless model."""


FAMILIES = {
    "gpt2": Family(MFNGPT2Block, "h", "wte", "ln_f"),
    "llama": Family(MFNLlamaBlock, "layers", "embed_tokens", "norm"),
}


def family_of(text_config: PreTrainedConfig) -> Family:
    """`ValueError` for a base model whose blocks no entry of `FAMILIES` describes."""
    supported = ", ".join(sorted(FAMILIES))
    if text_config.model_type == "mfn":
        raise ValueError(f"the base model is an MFN model itself; give a plain one ({supported})")
    if text_config.model_type not in FAMILIES:
        raise ValueError(f"model type {text_config.model_type!r} is not supported; supported are {supported}")
    if getattr(text_config, "add_cross_attention", False):
        raise ValueError("a base model with cross-attention is not supported; supported are decoders alone")
    return FAMILIES[text_config.model_type]
