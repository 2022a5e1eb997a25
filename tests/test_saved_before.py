"""Files of earlier versions load and give their old outputs. `fixtures/<version>/make.py` wrote these files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from fresh_process import run_without_the_plugin
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_mfn import (
    Ablate,
    Add,
    Clamp,
    FeatureAtlas,
    MFNConfig,
    MFNForCausalLM,
    MFNModel,
    MFNTrainer,
    MFNTrainingArguments,
    Scale,
)

SAVED = Path(__file__).parent / "fixtures" / "0.1.0"
PRUNED, NO_DIRECTION, NO_ENCODER = {"0": [3, 4, 11], "1": [5, 12]}, {"0": [3, 4, 11]}, {"0": [3, 11]}
CALM = {"L0/5": Clamp(4.0), "L1/7": Add(-1.5, when="L0/6", above=0.25), "L1/9": Scale(0.5), "L1/1": Ablate()}
PRESETS = {"calm": (CALM, "all"), "late": ({"L0/5": Clamp(9.0)}, "generated")}


def close(ours, theirs, atol=1e-5):
    """Compares with a tolerance, because versions of torch may differ in the last bits."""
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)


@pytest.fixture(params=["llama", "gpt2"])
def folder(request, tmp_path):
    """Copy of all saved files of one family, with the code in the model's folder."""
    return copied(request.param, tmp_path)


@pytest.fixture
def llama(tmp_path):
    return copied("llama", tmp_path)


def copied(family, tmp_path):
    folder = tmp_path / family
    shutil.copytree(SAVED / family, folder)
    shutil.copytree(SAVED / "code", folder / "model", dirs_exist_ok=True)
    return folder


@torch.no_grad()
def check_model(model, expected):
    found = model(expected["input_ids"], output_codes=True)
    close(found.logits, expected["logits"])
    for layer, code in found.codes.items():
        close(code.to_dense(), expected[f"codes.{layer}"])
    with model.steer("calm"):
        close(model(expected["input_ids"]).logits, expected["steered"])
    assert not torch.allclose(expected["steered"], expected["logits"], atol=0.1)
    assert model.presets == PRESETS
    config = model.config
    assert config.pruned_features == PRUNED
    assert config.removed_decoder_rows == NO_DIRECTION
    assert config.removed_encoder_rows == NO_ENCODER
    assert config.direction_norms == {"L1/20": 0.5}
    assert (config.alpha, config.k, config.num_features, config.mfn_version) == (0.75, 4, 32, "0.1.0")


def test_a_model_loads_with_the_plugin(folder):
    expected = load_file(folder / "expected.safetensors")
    for auto_class in (MFNForCausalLM, AutoModelForCausalLM):
        model = auto_class.from_pretrained(folder / "model")
        assert type(model) is MFNForCausalLM
        assert type(model.config) is MFNConfig
        check_model(model, expected)
    headless = MFNModel.from_pretrained(folder / "model")
    hidden = headless(expected["input_ids"]).last_hidden_state
    close(model.lm_head(hidden), expected["logits"])


SCRIPT = """
from peft import PeftModel

folder, expected = sys.argv[1], load_file(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__

def close(name, ours):
    torch.testing.assert_close(ours, expected[name], atol=1e-5, rtol=1e-5, msg=lambda message: name + ": " + message)

with torch.no_grad():
    found = model(expected["input_ids"], output_codes=True)
    close("logits", found.logits)
    for layer, code in found.codes.items():
        close(f"codes.{layer}", code.to_dense())
    with model.steer("calm"):
        close("steered", model(expected["input_ids"]).logits)
    headless = AutoModel.from_pretrained(folder, trust_remote_code=True)
    close("logits", model.lm_head(headless(expected["input_ids"]).last_hidden_state))
    assert set(model.presets) == {"calm", "late"}
    assert model.config.pruned_features == {"0": [3, 4, 11], "1": [5, 12]}
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).direction_norms == {"L1/20": 0.5}
    close("adapted", PeftModel.from_pretrained(model, sys.argv[3]).eval()(input_ids=expected["input_ids"]).logits)
assert not any(name.partition(".")[0] == "modeling_mfn" for name in sys.modules)
"""


@pytest.mark.parametrize(("family", "saved_again"), [("llama", False), ("gpt2", False), ("gpt2", True)])
def test_a_model_loads_without_the_plugin(family, saved_again, tmp_path):
    """Loads with the saved code, and with today's code saved over it. The two may have different files."""
    folder = copied(family, tmp_path)
    if saved_again:
        MFNForCausalLM.from_pretrained(folder / "model").save_pretrained(folder / "model")
    run_without_the_plugin(SCRIPT, folder, folder / "model", folder / "expected.safetensors", folder / "adapter")


@torch.no_grad()
def test_an_adapter_loads(folder, monkeypatch):
    """An adapter loads onto a given model. PEFT's class for causal LMs finds the model of the Llama adapter itself."""
    expected = load_file(folder / "expected.safetensors")
    monkeypatch.chdir(folder)
    loaded = [PeftModel.from_pretrained(MFNForCausalLM.from_pretrained("model"), "adapter")]
    if folder.name == "llama":
        loaded.append(AutoPeftModelForCausalLM.from_pretrained("adapter"))
    for adapted in loaded:
        assert isinstance(adapted.get_base_model(), MFNForCausalLM)
        assert (adapted.config.alpha, adapted.config.k) == (0.5, 3)
        close(adapted.eval()(input_ids=expected["input_ids"]).logits, expected["adapted"])
    assert not torch.allclose(expected["adapted"], expected["logits"], atol=0.1)


def test_a_training_goes_on_from_a_checkpoint(folder):
    """A resumed training ends with the weights of the uninterrupted run."""
    expected, told = load_file(folder / "expected.safetensors"), json.loads((folder / "training.json").read_text())
    shutil.copytree(folder / "checkpoint", folder / "out" / "checkpoint-3")
    rows = expected["training_ids"].tolist()
    trainer = MFNTrainer(
        MFNForCausalLM.from_pretrained(folder / "checkpoint"),
        MFNTrainingArguments(output_dir=str(folder / "out"), **told["arguments"]),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
    )
    trainer.train(resume_from_checkpoint=True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[3:] == pytest.approx(told["losses"], rel=1e-4)
    weights = dict(trainer.model.named_parameters())
    compared = [name for name in expected if name.startswith("trained.")]
    assert len(compared) > 8
    for name in compared:
        close(weights[name.removeprefix("trained.")].detach(), expected[name], atol=1e-4)
    assert (trainer.model.config.alpha, trainer.model.config.k) == (1.0, 3)


@torch.no_grad()
def test_an_atlas_loads(llama):
    """Counts of firings equal those of the model's codes."""
    atlas, model = FeatureAtlas.from_pretrained(llama / "model"), MFNForCausalLM.from_pretrained(llama / "model")
    assert len(atlas) == 64
    assert [(label.feature, label.label, label.source, label.score) for label in atlas.labels] == [
        ("L0/5", "animals", "human", None),
        ("L1/7", "colours", "automatic", 0.75),
    ]
    assert atlas["L1/7"].labels[0].details == {"precision": 0.5}
    assert [name for name in atlas if atlas[name].status == "pruned"] == ["L0/3", "L0/4", "L0/11", "L1/5", "L1/12"]
    ids = load_file(llama / "expected.safetensors")["atlas_ids"]
    codes = {layer: code.to_dense()[:, 1:] for layer, code in model(ids, output_codes=True).codes.items()}
    for layer, code in codes.items():
        counted = [atlas[layer, index].firing_count for index in range(32)]
        assert counted == (code > 0).sum((0, 1)).tolist()
    record = atlas["L0/5"]
    assert record.label == "animals"
    assert record.max_activation == pytest.approx(float(codes[0][..., 5].max()), rel=1e-5)
    first = record.examples[0]
    assert first.token == f"w{int(ids[first.window, first.position])}"
    assert first.source == ["drama", "prose"][first.window % 2]
    typical = atlas.steering({"animals": Clamp(2.0)}, model=model)
    assert typical == {(0, 5): Clamp(2.0 * record.mean_activation)}
    assert next(found.feature for found in atlas.search("colours")) == "L1/7"
    reading = atlas.top("w5 w6 w7", model, AutoTokenizer.from_pretrained(llama / "model"))
    assert [read.token for read in reading] == ["w5", "w6", "w7"]


@torch.no_grad()
def test_a_shared_decoder_loads(llama):
    expected = load_file(llama / "expected.safetensors")
    model = MFNForCausalLM.from_pretrained(llama / "shared")
    close(model(expected["input_ids"]).logits, expected["shared"])
    first, second = model.mfn_layers.values()
    assert first.decoder.weight is second.decoder.weight


def test_cached_residual_streams_load(llama):
    """The cache holds the inputs of the model's MFN layers, and a training can read it."""
    from modeling_mfn.training.activation_cache import ActivationCache, CachedResiduals

    cache, model = ActivationCache(llama / "cache"), MFNForCausalLM.from_pretrained(llama / "model")
    ids = load_file(llama / "expected.safetensors")["cached_ids"]
    assert [row["input_ids"].tolist() for row in cache] == ids.tolist()
    model.set_blend(0.0)
    with torch.no_grad():
        read = model(ids, output_reconstructions=True).reconstructions
    for place, layer in enumerate(cache.layers):
        kept = torch.stack([row["residuals"][place] for row in cache])
        torch.testing.assert_close(kept, read[layer].residual.half(), atol=1e-2, rtol=2e-3)
    settings = {"max_steps": 2, "lambda_util": 0.0, "alpha_end": 0.0, "report_to": [], "use_cpu": True}
    arguments = MFNTrainingArguments(output_dir=str(llama / "out"), save_strategy="no", disable_tqdm=True, **settings)
    trainer = MFNTrainer(CachedResiduals(model), arguments, train_dataset=cache)
    assert trainer.train().training_loss > 0
