"""Numbers at the end of a precision's range: the right finite value, or an error that names them."""

import pytest
import torch
from conftest import make_base, make_mfn, tokens
from transformers import GPT2Config, LlamaConfig

from modeling_mfn import Add, Clamp, MFNConfig, MFNForCausalLM, Scale
from modeling_mfn.training import losses

FAMILIES = ["llama-tied", "gpt2-tied"]


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e19, 1e25, 1e30])
def test_residual_streams_of_any_size_are_standardised(size):
    """Compares with the equation in float64."""
    layer = make_mfn(make_base("llama-tied"), layers=[1]).mfn_layers[1]
    h = size * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    exact = h.double()
    mean, std = exact.mean(-1, keepdim=True), exact.std(-1, keepdim=True)
    read = layer.standardise(h)
    torch.testing.assert_close(read.x, ((exact - mean) / (std + 1e-5)).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read.std, std.float(), rtol=1e-5, atol=0)
    assert read.undo(read.x).isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1.8e19), (torch.bfloat16, 1.8e19), (torch.float16, 6.5e4)], ids=str
)
def test_steering_far_out_is_finite_or_refused(name, dtype, most):
    model = make_mfn(make_base(name)).to(dtype)
    for kind in (Clamp, Add, Scale):
        for value in (most, -most):
            with torch.no_grad(), model.steer({(layer, 3): kind(value) for layer in (0, 1, 2)}):
                assert model(**tokens(2, 6)).logits.isfinite().all()
        with pytest.raises(ValueError, match=r"on L1/3: .* is too large for a model in .*; it must be at most"):
            model.steer({(1, 3): kind(-2 * most)})


def test_what_a_far_clamp_means():
    """In float16 the stream is shortened, and logits are near those of float32, as the direction alone counts."""
    wide = make_mfn(make_base("llama-tied"), layers=[2])
    narrow = make_mfn(make_base("llama-tied"), layers=[2]).half()
    logits = []
    for model in (wide, narrow):
        with torch.no_grad(), model.steer({(2, 3): Clamp(6.5e4)}):
            logits.append(model(**tokens(1, 6)).logits.float())
    assert torch.nn.functional.cosine_similarity(*(each[0, -1] for each in logits), dim=0) > 0.9


@pytest.mark.parametrize("config", [LlamaConfig(hidden_size=1, num_attention_heads=1), GPT2Config(n_embd=1, n_head=1)])
def test_a_residual_stream_of_one_entry_is_refused(config):
    with pytest.raises(ValueError, match="hidden_size is 1"):
        MFNConfig(text_config=config, num_features=4, k=2)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_base_that_is_not_finite_is_not_converted(name):
    base = make_base(name)
    with torch.no_grad():
        base.get_output_embeddings().weight[5, 3] = torch.nan
    with pytest.raises(ValueError, match="of the base model is not finite"):
        MFNForCausalLM.from_base(base, num_features=80, k=8)


def test_losses_of_no_token_are_finite():
    """They are 0, except for firing rates of 0."""
    layer = make_mfn(make_base("llama-tied"), layers=[1]).mfn_layers[1]
    for normalize in (True, False):
        h = torch.zeros(0, 32, requires_grad=True)
        code = layer.encode(h)
        parts = [
            losses.reconstruction_loss(h, layer.reconstruct(code), normalize=normalize),
            losses.competition_loss(code, normalize=normalize),
            losses.stability_loss(code, code, normalize=normalize),
            losses.distillation_loss(h, h, torch.ones(0)),
        ]
        assert [part.item() for part in parts] == [0.0] * 4
        rate = losses.rate_loss(code, 0.1)
        assert rate.isfinite()
        (sum(parts) + rate).backward()
