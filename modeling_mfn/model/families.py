"""Families of base models: the block of the paper's Figure 1 for each, and the names of its parts."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .mfn_layer import MFNLayer
from .mfn_pass import MFNPass


class MFNBlock:
    """A transformer block with an MFN layer, Figure 1 of the paper.

    It is mixed into a block class of transformers and calls the children by that class's names. An existing block
    becomes one when its class changes.
    """

    parts: tuple[str, str, str]
    """Names of the norm before attention, the attention, and the norm before the MLP."""
    mfn: MFNLayer
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, mfn_pass: MFNPass | None = None, **kwargs: Any) -> Tensor:
        """Runs the block: (B, T, d) -> (B, T, d). Further arguments go to the attention."""
        attention_norm, attention, mlp_norm = (getattr(self, part) for part in self.parts)
        mfn_pass = mfn_pass or MFNPass()
        h = hidden_states + attention(attention_norm(hidden_states), *args, **kwargs)[0]
        features = self.mfn(h, mfn_pass)
        mfn_pass.leave_stream(self.mfn.layer_index, features)
        residual = features if self.mfn.config.blend_into == "residual" else h
        return residual + self.mlp(mlp_norm(features))


class MFNLlamaBlock(MFNBlock, LlamaDecoderLayer):
    """A Llama block with an MFN layer."""

    parts = ("input_layernorm", "self_attn", "post_attention_layernorm")


class MFNGPT2Block(MFNBlock, GPT2Block):
    """A GPT-2 block with an MFN layer."""

    parts = ("ln_1", "attn", "ln_2")


class Norm(NamedTuple):
    """Form of a family's norms: weight * h / sqrt(mean of squares + epsilon), of a centred h or of h itself."""

    centred: bool
    """True for LayerNorm, which takes the mean out first; False for RMSNorm."""
    epsilon: str
    """Name of the norm's epsilon."""


class Family(NamedTuple):
    """Names and forms of one `model_type` of transformers that MFN layers and measures rely on."""

    block_class: type[MFNBlock]
    blocks: str
    """Name of the module list of blocks in the headless model."""
    embedding: str
    """Name of the token embedding in the headless model."""
    final_norm: str
    """Name of the norm after the last block in the headless model."""
    norm: Norm
    attention_output: str
    """Name of the projection of all heads' outputs back to the residual stream, in the attention."""
    positions: str | None = None
    """Name of the table of position embeddings in the headless model; `None` where positions are not in the stream."""

    def attention_of(self, block: nn.Module) -> nn.Module:
        """Returns a block's attention."""
        return block.get_submodule(self.block_class.parts[1])


FAMILIES = {
    "gpt2": Family(MFNGPT2Block, "h", "wte", "ln_f", Norm(True, "eps"), "c_proj", "wpe"),
    "llama": Family(MFNLlamaBlock, "layers", "embed_tokens", "norm", Norm(False, "variance_epsilon"), "o_proj"),
}
"""Families by `model_type`."""


def family_of(text_config: PreTrainedConfig) -> Family:
    """Returns the family of a base model.

    Raises:
        ValueError: if no entry of `FAMILIES` describes its blocks, or it has cross-attention.
    """
    supported = ", ".join(sorted(FAMILIES))
    if text_config.model_type == "mfn":
        raise ValueError(f"the base model is an MFN model itself; give a plain one ({supported})")
    if text_config.model_type not in FAMILIES:
        raise ValueError(f"model type {text_config.model_type!r} is not supported; supported are {supported}")
    if getattr(text_config, "add_cross_attention", False):
        raise ValueError("a base model with cross-attention is not supported; give a decoder without it")
    return FAMILIES[text_config.model_type]


__all__ = ["FAMILIES", "Family", "MFNBlock", "Norm", "family_of"]
