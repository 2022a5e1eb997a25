"""A tiny random base model of every family, and the forward pass of its MFN model made of the base's own code."""

import copy
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
from conftest import BLOCKS, COMMON, HIDDEN
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from modeling_mfn.model.families import FAMILIES

SIZES = COMMON | {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "initializer_range": 0.2,
}
OWN_SIZES = {
    "gemma2": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gpt_neox": {"use_parallel_residual": True},
    "granite": {
        "residual_multiplier": 0.22,
        "embedding_multiplier": 12.0,
        "logits_scaling": 3.0,
        "attention_multiplier": 0.3,
    },
    # the fast products of experts have no float64
    "mixtral": {"num_local_experts": 4, "experts_implementation": "eager"},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "experts_implementation": "eager",
    },
}
"""Sizes that only one family has, and settings whose default would hide what they do."""
VARIANTS = {"gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False})}
NAMES = sorted([*FAMILIES, *VARIANTS])
"""Families, and variants of a family whose blocks have another form."""
FORMS = {"gemma2", "gpt2", "gpt_neox", "granite", "llama", "mixtral", "olmo", "olmo2", "phi3"}
"""One family of each form. The others repeat one of them under other names."""


@cache
def _base(name):
    kind, settings = VARIANTS.get(name, (name, {}))
    torch.manual_seed(7)
    config_class = CONFIG_MAPPING[kind]
    # a config keeps settings that its class does not know, and caches would obey a sliding_window
    sizes = {size: value for size, value in SIZES.items() if hasattr(config_class(), size)}
    config = config_class(**(sizes | OWN_SIZES.get(kind, {}) | settings))
    base = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for path, parameter in base.named_parameters():
            if "norm" in path or ".ln_" in path:  # gains of 1 and biases of 0 would hide a mistake
                parameter += 0.3 * torch.randn_like(parameter)
    return base


def family_base(name):
    return copy.deepcopy(_base(name))


def blocks_of(base):
    return getattr(base.base_model, FAMILIES[base.config.model_type].blocks)


@contextmanager
def silent(block, kind):
    """Makes a block's attention, or its MLP, write zeros. Each is found by the name of its class."""
    names = {"Attention": ("Attention",), "MLP": ("MLP", "SparseMoeBlock")}[kind]
    (child,) = (child for child in block.children() if type(child).__name__.endswith(names))

    def zeros(_, __, output):
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    handle = child.register_forward_hook(zeros)
    try:
        yield
    finally:
        handle.remove()


def reconstruct_densely(layer, u, k):
    """Eqs. 1 and 2 with dense matrices in float64: u (B, T, d) -> u_hat (B, T, d)."""
    mean, std = u.mean(-1, keepdim=True), u.std(-1, keepdim=True)
    weights = (layer.encoder.weight, layer.encoder.bias, layer.decoder.weight, layer.decoder.bias)
    encoder, bias, directions, centre = (weight.detach().double() for weight in weights)
    a = ((u - mean) / (std + 1e-5) @ encoder.T + bias).relu()
    z = torch.zeros_like(a).scatter(-1, a.topk(k).indices, a.topk(k).values)
    return (z @ directions + centre) * std + mean


@contextmanager
def figure_1(base, model):
    """Makes each block of a base model compute Figure 1 with the MFN layers of a model, by the block's own forward."""
    streams, config = {}, model.config
    parallel = getattr(config.text_config, "use_parallel_residual", False)
    with ExitStack() as undo:
        for number, block in enumerate(blocks_of(base)):
            own = block.forward

            def blended(h, number):
                before = streams[max(streams)] if config.codes == "update" else torch.zeros_like(h)
                if number not in model.mfn_layers:
                    return h
                h_hat = before + reconstruct_densely(model.mfn_layers[number], h - before, config.k)
                streams[number] = config.alpha * h_hat + (1 - config.alpha) * h
                return streams[number]

            def forward(x, *args, block=block, own=own, number=number, **kwargs):
                if number == 0:
                    streams.clear()
                    streams[-1] = x
                h = x
                if not parallel:
                    with silent(block, "MLP"):
                        h = own(x, *args, **kwargs)
                features = blended(h, number)
                if parallel and config.blend_into == "residual":
                    return own(features, *args, **kwargs)
                with silent(block, "Attention"):
                    residual_and_mlp = own(features, *args, **kwargs)
                if config.blend_into == "residual":
                    return residual_and_mlp
                attention = 0
                if parallel:
                    with silent(block, "MLP"):
                        attention = own(x, *args, **kwargs) - x
                return h + attention + (residual_and_mlp - features)

            block.forward = forward
            undo.callback(setattr, block, "forward", own)
        yield base
