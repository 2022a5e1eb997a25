"""Tests of the central claims on the demo's real checkpoint, SmolLM2-135M."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_mfn import Clamp, MFNForCausalLM
from modeling_mfn.demo.assets import smollm2

pytestmark = pytest.mark.checkpoint
TEXTS = ["The capital of France is", "Two households, both alike in dignity, in fair Verona", "def main():"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(smollm2(), padding_side="left")


@pytest.fixture(scope="module")
def batch(tokenizer):
    return tokenizer(TEXTS, return_tensors="pt", padding=True)


@pytest.fixture(scope="module")
def wide(tokenizer, batch):
    """Model with wide layers in float64, at alpha 1, so that rounding cannot change which features are chosen."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float64)
    return MFNForCausalLM.from_base(base, layers=[5, 20], num_features=1152, k=64, alpha=1.0, calibration=dict(batch))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_0_in_every_block_gives_the_base_models_logits_to_the_bit(batch, dtype, attention):
    base = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=dtype, attn_implementation=attention)
    model = MFNForCausalLM.from_base(base, num_features=288, k=16, calibration=dict(batch))
    assert len(model.mfn_layers) == 30
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, base(**batch).logits)


@torch.no_grad()
def test_layers_equal_the_dense_equations_on_real_residual_streams(wide, batch):
    found = wide(**batch, output_reconstructions=True).reconstructions
    for index, layer in wide.mfn_layers.items():
        h = found[index].residual
        mean, std = h.mean(-1, keepdim=True), h.std(-1, keepdim=True)
        z = torch.relu((h - mean) / (std + 1e-5) @ layer.encoder.weight.T + layer.encoder.bias)
        z = torch.where(z >= z.sort(-1, descending=True).values[..., 63:64], z, 0)
        h_hat = (z @ layer.decoder.weight + layer.decoder.bias) * std + mean
        # first tokens of a row are hundreds of times larger than others
        torch.testing.assert_close(found[index].reconstructed, h_hat, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(found[index].code.to_dense(), z, atol=1e-10, rtol=1e-10)


def test_cached_padded_and_steered_generation(wide, tokenizer, batch):
    settings = {"max_new_tokens": 8, "do_sample": False}
    together = wide.generate(**batch, **settings)
    assert torch.equal(together, wide.generate(**batch, **settings, use_cache=False))
    for row, text in zip(together, TEXTS, strict=True):
        alone = wide.generate(**tokenizer(text, return_tensors="pt"), **settings)[0]
        assert torch.equal(row[-8:], alone[-8:])
    with wide.steer({(5, 3): Clamp(40.0)}):
        steered = wide.generate(**batch, **settings)
        assert torch.equal(steered, wide.generate(**batch, **settings, use_cache=False))
    assert not torch.equal(steered, together)
    assert torch.equal(wide.generate(**batch, **settings), together)


def test_saved_and_loaded(wide, batch, tmp_path):
    wide.save_pretrained(tmp_path, max_shard_size="300MB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, wide(**batch).logits)
