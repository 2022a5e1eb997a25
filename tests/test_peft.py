"""MFN models under PEFT: adapters on the backbone, and MFN layers that are trained beside them."""

import pytest
import torch
from conftest import make_mfn, tokens
from peft import LoraConfig, PeftModel, get_peft_model

from modeling_mfn import Clamp


@pytest.fixture
def model(family_base):
    return make_mfn(family_base.double(), layers=[0, 2])


def lora(model, **settings):
    target = "q_proj" if model.config.text_config.model_type == "llama" else "c_attn"
    return LoraConfig(task_type="CAUSAL_LM", target_modules=[target], r=2, **settings)


def test_lora_leaves_mfn_layers_alone(model):
    before = model(**tokens(2, 6)).logits
    for target in (lora(model), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2)):
        adapted = get_peft_model(model, target)
        assert not any(".mfn." in name and parameter.requires_grad for name, parameter in adapted.named_parameters())
        torch.testing.assert_close(adapted(**tokens(2, 6)).logits, before)
        model = adapted.unload()


def test_mfn_layers_trained_beside_lora_follow_blend_and_steering(model, tmp_path):
    """PEFT deep-copies the layers that it trains: what the model sets must reach the copies."""
    batch = tokens(2, 6)
    expected = {}
    for alpha in (0.0, 0.3):
        model.set_blend(alpha)
        expected[alpha] = model(**batch).logits
    with model.steer({(0, 3): Clamp(5.0)}):
        expected["steered"] = model(**batch).logits
    adapted = get_peft_model(model, lora(model, modules_to_save=["mfn"]))
    assert any(".mfn." in name and parameter.requires_grad for name, parameter in adapted.named_parameters())
    for alpha in (0.0, 0.3):
        adapted.set_blend(alpha)
        torch.testing.assert_close(adapted(**batch).logits, expected[alpha])
    with adapted.steer({(0, 3): Clamp(5.0)}):
        torch.testing.assert_close(adapted(**batch).logits, expected["steered"])
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter)
    trained = adapted(**batch).logits
    assert not torch.allclose(trained, expected[0.3])
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.unload().save_pretrained(tmp_path / "base")
    base = type(model).from_pretrained(tmp_path / "base", dtype=torch.float64)
    base.set_blend(0.3)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(loaded(**batch).logits, trained)
