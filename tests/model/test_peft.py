"""MFN models under PEFT: adapters on the backbone, and MFN layers trained next to adapters."""

import copy
from importlib.metadata import version

import pytest
import torch
from conftest import enable_checkpointing, make_base, make_mfn, tokens
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers_for_tests import numbered_words
from trainings import arguments, rows
from transformers import AutoModelForCausalLM

from modeling_mfn import Clamp, MFNTrainer, explain
from modeling_mfn.model.modes import as_base

TEXT = "w9 w33 w5 w71 w20 w9 w60"

BY_TRANSFORMERS = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.18"),
    reason="transformers 5.18 is the first whose own loading of adapters knows modules_to_save",
)


@pytest.fixture(params=[("llama-tied", "stream"), ("gpt2-tied", "update")], ids=" ".join)
def model(request):
    base, codes = request.param
    return make_mfn(make_base(base).double(), layers=[0, 2], codes=codes, coding_rounds=2 if codes == "update" else 1)


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


@pytest.mark.parametrize("weight", ["encoder.weight", "decoder.weight"])
def test_an_adapter_on_weights_of_mfn_layers_is_refused(model, weight):
    """Layers read these weights without PEFT's wrapper around them, so that it would learn nothing."""
    with pytest.raises(ValueError, match=r'Train MFN layers as a whole, with modules_to_save=\["mfn"\]'):
        get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_parameters=[f"mfn.{weight}"]))
    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[weight.partition(".")[0]]))


def test_token_rows_trained_beside_lora_are_those_of_the_tied_head(base):
    """PEFT reads `tie_word_embeddings` at the top of the config."""
    model = make_mfn(base.double())
    adapted = get_peft_model(model, lora(model, trainable_token_indices=[3, 5]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "token_adapter" in name:
                parameter += torch.randn_like(parameter)
    before, logits = base(**tokens(2, 6)).logits, adapted(**tokens(2, 6)).logits
    assert not torch.allclose(logits, before)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**tokens(2, 6)).logits, logits)
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == base.config.tie_word_embeddings


def test_mfn_layers_trained_beside_lora_follow_blend_and_steering(model, tmp_path):
    """PEFT deep-copies the layers that it trains. Alpha and interventions of the model must reach the copies."""
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
    base.set_blend(0.0)
    base.set_k(3)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(loaded(**batch).logits, trained)


def test_an_adapter_brings_its_alpha_and_k_in_any_precision(family_base, tmp_path):
    model = make_mfn(family_base, layers=[0, 2], k=5)
    names = set(model.state_dict())
    model.set_blend(0.3)  # bfloat16 cannot hold 0.3 exactly
    get_peft_model(model.bfloat16(), lora(model, modules_to_save=["mfn"])).save_pretrained(tmp_path)
    fresh = make_mfn(make_base(f"{family_base.config.model_type}-tied"), layers=[0, 2], alpha=0.0).bfloat16()
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=True)
    assert (loaded.config.alpha, loaded.config.k) == (0.3, 5)
    torch.testing.assert_close(loaded(**tokens(2, 6)).logits, model(**tokens(2, 6)).logits)
    twin = copy.deepcopy(loaded)
    twin.set_blend(0.7)
    assert loaded.config.alpha == 0.3
    assert twin(**tokens(2, 6)).logits.ne(loaded(**tokens(2, 6)).logits).any()
    # a merged model has the parameter names of an ordinary one
    merged = loaded.merge_and_unload()
    assert set(merged.state_dict()) == names
    assert (merged.config.alpha, merged.config.k) == (0.3, 5)


def perturbed(adapted):
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return adapted


@pytest.mark.parametrize("reentrant", [None, False], ids=["", "checkpointing"])
def test_without_its_adapter_the_model_is_as_it_was(model, reentrant):
    """An adapter's alpha and k come and go with it: DPO takes its reference from `disable_adapter`."""
    batch, labels = tokens(2, 6), tokens(2, 6)["input_ids"]
    model.set_blend(0.2)
    before = model(**batch).logits
    adapted = perturbed(get_peft_model(model, lora(model, modules_to_save=["mfn"], init_lora_weights=False)))
    if reentrant is not None:
        adapted.train()
        for module in adapted.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        enable_checkpointing(model, {"use_reentrant": reentrant})
    adapted.set_blend(0.7)
    adapted.set_k(3)
    out = adapted(**batch, labels=labels)
    with adapted.disable_adapter(), torch.no_grad():
        assert torch.equal(adapted(**batch).logits, before)
        assert (model.config.alpha, model.config.k) == (0.2, 8)
        with as_base(adapted):
            adapted(**batch)
        assert torch.equal(adapted(**batch).logits, before)
    out.loss.backward()  # blocks that run again have the adapter's alpha
    found = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
    adapted.zero_grad()
    again = adapted(**batch, labels=labels)
    assert torch.equal(again.logits, out.logits)
    assert (adapted.config.alpha, adapted.config.k) == (0.7, 3)
    again.loss.backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, adapted.get_parameter(name).grad)
    merged = copy.deepcopy(adapted).eval().merge_and_unload()
    assert (merged.config.alpha, merged.config.k) == (0.7, 3)
    torch.testing.assert_close(merged(**batch).logits, out.logits)
    plain = adapted.unload()
    assert (plain.config.alpha, plain.config.k) == (0.2, 8)
    assert torch.equal(plain(**batch).logits, before)
    plain.config.alpha = 0.0  # an ordinary model again
    assert not torch.allclose(plain(**batch).logits, before)


def save_two_adapters(model, folder):
    """Saves the model at alpha 0, and two adapters with other settings. Returns the logits of each, and without one."""
    model.set_blend(0.0)
    model.save_pretrained(folder / "model")
    batch = tokens(2, 6)
    expected = {"none": model(**batch).logits}
    for number, name in enumerate(("default", "other")):
        torch.manual_seed(number)
        settings = lora(model, modules_to_save=["mfn"], init_lora_weights=False)
        adapted = perturbed(get_peft_model(copy.deepcopy(model), settings))
        adapted.set_blend(0.3 + 0.5 * number)
        adapted.set_k(3 + number)
        expected[name] = adapted(**batch).logits
        adapted.save_pretrained(folder / name)
    return expected


def test_each_of_several_adapters_has_its_own_alpha_and_k(model, tmp_path):
    expected, batch = save_two_adapters(model, tmp_path), tokens(2, 6)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "default")
    loaded.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other", "default"):
        loaded.set_adapter(name)
        torch.testing.assert_close(loaded(**batch).logits, expected[name])
        assert loaded.config.alpha == (0.3 if name == "default" else 0.8)
        with loaded.disable_adapter():
            assert torch.equal(loaded(**batch).logits, expected["none"])
    loaded.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "both" / "other")
    torch.testing.assert_close(again(**batch).logits, expected["other"])
    loaded.delete_adapter("default")
    torch.testing.assert_close(loaded(**batch).logits, expected["other"])


@BY_TRANSFORMERS
def test_adapters_load_into_a_model_by_transformers_own_way(model, tmp_path):
    expected, batch = save_two_adapters(model, tmp_path), tokens(2, 6)
    direct = type(model).from_pretrained(tmp_path / "model", dtype=torch.float64)
    direct.load_adapter(tmp_path / "default")
    torch.testing.assert_close(direct(**batch).logits, expected["default"])
    direct.load_adapter(tmp_path / "other", "other")
    direct.set_adapter("other")
    torch.testing.assert_close(direct(**batch).logits, expected["other"])
    direct.disable_adapters()
    assert torch.equal(direct(**batch).logits, expected["none"])


@BY_TRANSFORMERS
def test_an_adapter_loads_as_a_model(model, tmp_path):
    model.set_blend(0.3)
    model.save_pretrained(tmp_path / "model")
    from_disk = type(model).from_pretrained(tmp_path / "model", dtype=torch.float64)
    adapted = perturbed(get_peft_model(from_disk, lora(model, modules_to_save=["mfn"], init_lora_weights=False)))
    adapted.set_blend(0.6)
    adapted.set_k(4)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float64)
    torch.testing.assert_close(loaded(**tokens(2, 6)).logits, adapted(**tokens(2, 6)).logits)
    assert (loaded.config.alpha, loaded.config.k) == (0.6, 4)


@pytest.mark.halved
@pytest.mark.parametrize(
    "settings", [{}, {"util_target": "kl", "lambda_stab": 0.1, "reinit_dead_every": 2, "rate_window": 40}]
)
def test_trained_by_the_trainer_and_merged_into_an_ordinary_model(family_base, tmp_path, settings):
    """LoRA and MFN layers learn, and alpha rises.

    Saved, loaded and merged models have the logits of the trained model. The merged model's head is still tied.
    """
    base_logits = family_base(**tokens(2, 6)).logits
    model = make_mfn(family_base, alpha=0.0, layers=[0, 2], k=4)
    adapted = get_peft_model(model, lora(model, modules_to_save=["mfn"], init_lora_weights=False))
    with torch.no_grad(), adapted.disable_adapter():
        adapted.set_blend(0.0)
        torch.testing.assert_close(adapted(**tokens(2, 6)).logits, base_logits)  # target of the KL loss
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    adapted.train()
    args = arguments(tmp_path / "training", max_steps=4, save_strategy="steps", save_steps=4, **settings)
    trainer = MFNTrainer(adapted, args, train_dataset=rows(32))
    trainer.train()
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {n for n in before if "lora_" in n or ".modules_to_save." in n}
    assert adapted.config.alpha == 1.0

    adapted.eval()
    trained = adapted(**tokens(2, 6)).logits
    fresh = make_mfn(make_base(f"{family_base.config.model_type}-tied"), layers=[0, 2], alpha=0.0, seed=5)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "training" / "checkpoint-4")
    torch.testing.assert_close(loaded(**tokens(2, 6)).logits, trained, atol=1e-5, rtol=1e-5)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**tokens(2, 6)).logits, trained, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(**tokens(2, 6)).logits, trained, atol=1e-5, rtol=1e-5)
    assert again.lm_head.weight.data_ptr() == again.get_input_embeddings().weight.data_ptr()
    assert again.config.alpha == 1.0


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"alpha_end": 0.0}, "no MFN layer is trained"),  # although a feature loss is on
        ({"lambda_recon": 0.0}, "no MFN layer is trained"),  # although alpha rises to 1
        ({"trainable": "mfn"}, "the adapter would not keep"),
        ({"lambda_recon": 0.0, "alpha_start": 1.0}, None),  # features are already trained
    ],
)
def test_mfn_layers_that_the_adapter_leaves_out(model, tmp_path, settings, problem):
    adapted = get_peft_model(model, lora(model))
    if problem is None:
        MFNTrainer(adapted, arguments(tmp_path, **settings))
        return
    with pytest.raises(ValueError, match=rf'{problem}.*modules_to_save=\["mfn"\]'):
        MFNTrainer(adapted, arguments(tmp_path, **settings))
    MFNTrainer(adapted.unload(), arguments(tmp_path, **settings))  # allowed without the adapter


def test_a_prediction_is_explained_as_that_of_the_merged_model(model):
    """Compares explanations of an adapted model, whose MFN layers PEFT has wrapped, with those of its merged copy."""
    adapted = get_peft_model(model, lora(model, modules_to_save=["mfn"], init_lora_weights=False))
    for method in ("gradient", "integrated"):
        settings = {"method": method, "steps": 2, "top": 3, "trace": 2, "verify": 2}
        found = explain(adapted, numbered_words(), TEXT, **settings)
        assert any(parameter.requires_grad for parameter in adapted.parameters())
        expected = explain(copy.deepcopy(adapted).merge_and_unload(), numbered_words(), TEXT, **settings)
        assert found.target.value == pytest.approx(expected.target.value, abs=1e-9)
        assert [feature.name for feature in found.features] == [feature.name for feature in expected.features]
        for one, other in zip(found.features, expected.features, strict=True):
            assert one.attribution == pytest.approx(other.attribution, abs=1e-6)
            assert (one.ablation, one.inputs and one.inputs.value) == pytest.approx(
                (other.ablation, other.inputs and other.inputs.value), abs=1e-6
            )
