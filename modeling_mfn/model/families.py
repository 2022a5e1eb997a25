"""Families of base models: names of the parts of their blocks, and the forms of their norms and logits.

All is described, nothing is guessed: a model that no entry of `FAMILIES` describes is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from transformers import PreTrainedConfig

if TYPE_CHECKING:  # configs read this table, and torch takes seconds to import
    from torch import Tensor, nn


class BlockParts(NamedTuple):
    """Names of the children of a block that write to the residual stream, and of what stands around them.

    Attention writes `after_attention(attention(attention_norm(x)))`, and the MLP likewise. `None` is a part that the
    block does not have. The defaults are Llama's names.
    """

    attention_norm: str | None = "input_layernorm"
    attention: str = "self_attn"
    after_attention: str | None = None
    """Norm or dropout of what attention writes."""
    mlp_norm: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    after_mlp: str | None = None
    """Norm or dropout of what the MLP writes."""
    multiplier: str | None = None
    """Name of the block's factor for what attention and MLP write."""


class Norm(NamedTuple):
    """Form of a family's norms: gain * h / sqrt(mean of squares + epsilon), of a centred h or of h itself."""

    centred: bool
    """True for LayerNorm, which takes the mean out first; False for RMSNorm."""
    epsilon: str | float
    """Name of the norm's epsilon, or the epsilon itself where the norm has no name for it."""
    weight: str | None = "weight"
    """Name of the norm's weight; `None` for a gain of 1."""
    weight_plus_one: bool = False
    """True if the gain is 1 + weight, as in Gemma."""

    def epsilon_of(self, norm: nn.Module) -> float:
        """Returns the epsilon of a norm."""
        return float(getattr(norm, self.epsilon)) if isinstance(self.epsilon, str) else self.epsilon

    def gain_of(self, norm: nn.Module) -> Tensor | None:
        """Returns the gain (d,) of a norm; `None` for a gain of 1."""
        if self.weight is None:
            return None
        weight = norm.get_parameter(self.weight)
        return weight + 1 if self.weight_plus_one else weight


class Logits(NamedTuple):
    """Steps from the LM head's outputs to the logits. Each name is that of a number in the base's config."""

    divisor: str | None = None
    """Number that the outputs are divided by."""
    cap: str | None = None
    """Largest absolute logit c: c tanh(output / c). The config's `None` is no cap."""

    def of(self, outputs: Tensor, text_config: PreTrainedConfig) -> Tensor:
        """Makes logits of the LM head's outputs, in the steps of the base, so that they are equal to the bit."""
        outputs = outputs if self.divisor is None else outputs / getattr(text_config, self.divisor)
        cap = None if self.cap is None else getattr(text_config, self.cap)
        return outputs if cap is None else (outputs / cap).tanh() * cap

    def scale(self, text_config: PreTrainedConfig) -> float:
        """Returns the factor from the LM head's outputs to the logits before the cap."""
        return 1.0 if self.divisor is None else 1.0 / getattr(text_config, self.divisor)


class Family(NamedTuple):
    """Names and forms of one `model_type` of transformers that MFN layers and measures rely on.

    The defaults are Llama's names.
    """

    block: str
    """Block class of transformers, as `module.Class` of `transformers.models`."""
    norm: Norm
    parts: BlockParts = BlockParts()
    blocks: str = "layers"
    """Name of the module list of blocks in the headless model."""
    embedding: str = "embed_tokens"
    """Name of the token embedding in the headless model."""
    final_norm: str = "norm"
    """Name of the norm after the last block in the headless model."""
    attention_output: str = "o_proj"
    """Name of the projection of all heads' outputs back to the residual stream, in the attention."""
    positions: str | None = None
    """Name of the table of position embeddings in the headless model; `None` where positions are not in the stream."""
    logits: Logits = Logits()
    embedding_multiplier: str | None = None
    """Name of the number in the config that the headless model multiplies embeddings by."""
    scaled_embedding: bool = False
    """True if the embedding multiplies its rows by the square root of d, as in Gemma."""
    parallel: str | None = None
    """Name of the switch in the config with which attention and MLP read the same stream. The MFN layer then stands
    before both."""

    def attention_of(self, block: nn.Module) -> nn.Module:
        """Returns a block's attention."""
        return block.get_submodule(self.parts.attention)

    def is_parallel(self, text_config: PreTrainedConfig) -> bool:
        """Returns True if attention and MLP of a block read the same stream."""
        return self.parallel is not None and getattr(text_config, self.parallel)

    def embedding_scale(self, text_config: PreTrainedConfig) -> float:
        """Returns the factor from a row of the embedding's table to the residual stream."""
        if self.scaled_embedding:
            return float(text_config.hidden_size**0.5)
        return 1.0 if self.embedding_multiplier is None else float(getattr(text_config, self.embedding_multiplier))


RMS_NORM = Norm(False, "variance_epsilon")
LAYER_NORM = Norm(True, "eps")
GEMMA_NORM = Norm(False, "eps", weight_plus_one=True)
AFTER = BlockParts(None, "self_attn", "post_attention_layernorm", None, "mlp", "post_feedforward_layernorm")
"""Parts of a block whose norms stand after attention and MLP alone."""
AROUND = AFTER._replace(attention_norm="input_layernorm", mlp_norm="pre_feedforward_layernorm")
"""Parts of a block whose norms stand before and after attention and MLP."""
GEMMA_2 = Family(
    "gemma2.Gemma2DecoderLayer",
    GEMMA_NORM,
    AROUND,
    logits=Logits(cap="final_logit_softcapping"),
    scaled_embedding=True,
)

FAMILIES = {
    "arcee": Family("arcee.ArceeDecoderLayer", RMS_NORM),
    "ernie4_5": Family("ernie4_5.Ernie4_5DecoderLayer", RMS_NORM),
    "exaone4": Family("exaone4.Exaone4DecoderLayer", RMS_NORM, AFTER),
    "gemma": Family("gemma.GemmaDecoderLayer", GEMMA_NORM, scaled_embedding=True),
    "gemma2": GEMMA_2,
    "gemma3_text": GEMMA_2._replace(block="gemma3.Gemma3DecoderLayer"),
    "gpt2": Family(
        "gpt2.GPT2Block",
        LAYER_NORM,
        BlockParts(attention_norm="ln_1", attention="attn", mlp_norm="ln_2"),
        blocks="h",
        embedding="wte",
        final_norm="ln_f",
        attention_output="c_proj",
        positions="wpe",
    ),
    "gpt_neox": Family(
        "gpt_neox.GPTNeoXLayer",
        LAYER_NORM,
        BlockParts(attention="attention", after_attention="post_attention_dropout", after_mlp="post_mlp_dropout"),
        embedding="embed_in",
        final_norm="final_layer_norm",
        attention_output="dense",
        parallel="use_parallel_residual",
    ),
    "granite": Family(
        "granite.GraniteDecoderLayer",
        RMS_NORM,
        BlockParts(multiplier="residual_multiplier"),
        logits=Logits(divisor="logits_scaling"),
        embedding_multiplier="embedding_multiplier",
    ),
    "helium": Family("helium.HeliumDecoderLayer", RMS_NORM),
    "llama": Family("llama.LlamaDecoderLayer", RMS_NORM),
    "mistral": Family("mistral.MistralDecoderLayer", RMS_NORM),
    "mixtral": Family("mixtral.MixtralDecoderLayer", RMS_NORM),
    "olmo": Family("olmo.OlmoDecoderLayer", Norm(True, 1e-5, weight=None)),
    "olmo2": Family("olmo2.Olmo2DecoderLayer", RMS_NORM, AFTER),
    "olmo3": Family("olmo3.Olmo3DecoderLayer", RMS_NORM, AFTER),
    "phi3": Family(
        "phi3.Phi3DecoderLayer",
        RMS_NORM,
        BlockParts(after_attention="resid_attn_dropout", after_mlp="resid_mlp_dropout"),
    ),
    "qwen2": Family("qwen2.Qwen2DecoderLayer", RMS_NORM),
    "qwen3": Family("qwen3.Qwen3DecoderLayer", RMS_NORM),
    "qwen3_moe": Family("qwen3_moe.Qwen3MoeDecoderLayer", RMS_NORM),
    "seed_oss": Family("seed_oss.SeedOssDecoderLayer", RMS_NORM),
    "smollm3": Family("smollm3.SmolLM3DecoderLayer", RMS_NORM),
    "stablelm": Family("stablelm.StableLmDecoderLayer", LAYER_NORM, BlockParts(after_mlp="dropout")),
    "starcoder2": Family("starcoder2.Starcoder2DecoderLayer", LAYER_NORM),
}
"""Families by `model_type`."""


def family_of(text_config: PreTrainedConfig) -> Family:
    """Returns the family of a base model.

    Raises:
        ValueError: if no entry of `FAMILIES` describes its blocks, or a setting of it is one that no entry describes.
    """
    kind = text_config.model_type
    if kind == "mfn":
        raise ValueError(f"the base model is an MFN model itself; give a plain one ({', '.join(sorted(FAMILIES))})")
    if kind not in FAMILIES:
        raise ValueError(f"model type {kind!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    for setting, reason in UNSUPPORTED.items():
        if getattr(text_config, setting, False) and setting != FAMILIES[kind].parallel:
            raise ValueError(f"{setting} is {getattr(text_config, setting)} in this {kind} model; {reason}")
    return FAMILIES[kind]


UNSUPPORTED = {
    "add_cross_attention": "a base model with cross-attention is not supported; give a decoder without it",
    "use_parallel_residual": "blocks whose attention and MLP read the same stream are not supported in this family",
    "output_router_logits": "MFN models do not add the loss that balances experts; set it to False",
}
"""Settings of a base that change what its blocks or its loss compute, and why they are refused."""


__all__ = ["FAMILIES", "UNSUPPORTED", "BlockParts", "Family", "Logits", "Norm", "family_of"]
