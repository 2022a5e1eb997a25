"""Post-hoc baseline: TopK autoencoders of EleutherAI's sparsify, trained by its own trainer on cached residual streams.

Weights of the autoencoders are copied into the MFN layers of a model, so that both methods are measured by the same
code.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modeling_mfn import MFNForCausalLM
from modeling_mfn.model.mfn_layer import MFNLayer
from modeling_mfn.training.activation_cache import ActivationCache


class Taps(nn.Module):
    """Stand-in for the language model that sparsify's trainer expects.

    Token ids are row numbers of a cache. Modules `taps.<block>` output the input of the MFN layer's encoder: the
    residual stream with `input_norm="none"`, the standardised one with `"layer"`.
    """

    def __init__(self, layers: Mapping[int, MFNLayer], cache: ActivationCache) -> None:
        super().__init__()
        self.taps = nn.ModuleDict({str(number): nn.Identity() for number in layers})
        self.device = torch.device("cpu")
        self.dummy_inputs = {"row_numbers": torch.zeros(1, 1, dtype=torch.long)}
        self._layers, self._cache = dict(layers), cache

    @property
    def base_model(self) -> Taps:
        return self

    def forward(self, row_numbers: Tensor) -> None:
        rows = [self._cache[number]["residuals"] for number in row_numbers[:, 0].tolist()]
        residuals = torch.stack(rows, 1).float()
        for tap, layer, h in zip(self.taps.values(), self._layers.values(), residuals, strict=True):
            tap(layer.standardise(h)[0])


def train(model: MFNForCausalLM, cache: ActivationCache, rows: Sequence[int], folder: Path, **settings: Any) -> None:
    """Trains an autoencoder for each MFN layer and copies its weights into the layer.

    Args:
        model: MFN model that gets the weights. Its config sets size, k and `input_norm` of the autoencoders.
        cache: residual streams of this model.
        rows: rows of the cache, in the order of training.
        folder: folder for sparsify's checkpoint.
        settings: fields of sparsify's `TrainConfig`, in place of its defaults.
    """
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer

    coder = SparseCoderConfig(num_latents=model.config.num_features, k=model.config.k)
    config = TrainConfig(
        coder, hookpoints=["taps.*"], log_to_wandb=False, save_dir=str(folder), run_name="sparsify", **settings
    )
    length = len(cache[0]["input_ids"])
    taps = Taps(model.mfn_layers, cache)
    Trainer(config, [{"input_ids": torch.full((length,), row)} for row in rows], taps).fit()
    torch.set_float32_matmul_precision("highest")  # the trainer lowers it for the whole process
    for place, (number, layer) in enumerate(model.mfn_layers.items()):
        coder = SparseCoder.load_from_disk(folder / "sparsify" / f"taps.{number}")
        adopt(layer, coder)
        check(layer, coder, cache[rows[0]]["residuals"][place].float())


@torch.no_grad()
def adopt(layer: MFNLayer, coder: Any) -> None:
    """Copies the weights of a sparsify autoencoder.

    sparsify subtracts the decoder's bias before encoding. The encoder's bias accounts for that.
    """
    layer.encoder.weight.copy_(coder.encoder.weight)
    layer.encoder.bias.copy_(coder.encoder.bias - coder.encoder.weight @ coder.b_dec)
    layer.decoder.weight.copy_(coder.W_dec)
    layer.decoder.bias.copy_(coder.b_dec)


@torch.no_grad()
def check(layer: MFNLayer, coder: Any, h: Tensor) -> None:
    """Raises `RuntimeError` if layer and autoencoder reconstruct residual streams (T, d) differently."""
    x, _, _ = layer.standardise(h)
    ours, theirs = layer.reconstruct(layer.encode(h)), coder(x).sae_out
    difference = float((ours - theirs).norm() / theirs.norm())
    if difference > 1e-4:
        raise RuntimeError(f"block {layer.layer_index} differs from sparsify's autoencoder by {difference:.1e}")
