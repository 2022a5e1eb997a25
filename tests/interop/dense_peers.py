"""Forward passes of SAELens 6.54, sparsify 1.3 and OpenAI's autoencoder, transcribed from their sources in float64.

Each returns dense codes (N, m) and reconstructions (N, d).
"""

import torch


def top(values, k):
    best = values.topk(k, dim=-1)
    return torch.zeros_like(values).scatter(-1, best.indices, best.values)


def standardised(x):
    mean = x.mean(-1, keepdim=True)
    std = (x - mean).std(-1, keepdim=True)
    return (x - mean) / (std + 1e-5), std, mean


def saelens(config, tensors, x):
    """TopKSAE, StandardSAE and JumpReLUSAE, with `normalize_activations` none or layer_norm."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    std, mean = 1, 0
    if config["normalize_activations"] == "layer_norm":
        x, std, mean = standardised(x)
    pre = (x - weights["b_dec"] * config["apply_b_dec_to_input"]) @ weights["W_enc"] + weights["b_enc"]
    norms = weights["W_dec"].norm(dim=-1) if config.get("rescale_acts_by_decoder_norm") else 1
    if config["architecture"] == "topk":
        codes = top(pre * norms, config["k"]).relu()
    else:
        codes = pre.relu() * (pre > weights.get("threshold", -torch.inf))
    return codes, (codes / norms @ weights["W_dec"] + weights["b_dec"]) * std + mean


def sparsify(config, tensors, x):
    """SparseCoder."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    pre = (x - weights["b_dec"]) @ weights["encoder.weight"].T + weights["encoder.bias"]
    codes = top(pre.relu(), config["k"])
    return codes, codes @ weights["W_dec"] + weights["b_dec"]


def openai(state, x):
    """Autoencoder.from_state_dict."""
    weights = {name: value.double() for name, value in state.items() if isinstance(value, torch.Tensor)}
    std, mean = 1, 0
    if state["activation"] == "TopK":
        x, std, mean = standardised(x)
    pre = (x - weights["pre_bias"]) @ weights["encoder.weight"].T + weights["latent_bias"]
    codes = (top(pre, state["activation_state_dict"]["k"]) if state["activation"] == "TopK" else pre).relu()
    return codes, (codes @ weights["decoder.weight"].T + weights["pre_bias"]) * std + mean
