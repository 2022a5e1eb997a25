"""A preset that is active by default steers wherever the model is only loaded, and no reader or training by mistake."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_base, make_mfn, tokens
from fresh_process import run_without_the_plugin
from safetensors.torch import save_file
from trainings import arguments, rows
from transformers import AutoModel

from modeling_mfn import Ablate, Add, Clamp, MFNConfig, MFNForCausalLM, MFNTrainer, perplexity
from modeling_mfn.hub.card import model_card
from modeling_mfn.model.modes import as_base, evaluating

CALM = {"L0/5": Clamp(6.0), "L2/7": Add(3.0, when="L0/5"), "L1/2": Ablate()}
GENERATE = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(params=["llama-tied", "gpt2-tied"])
def model(request):
    model = make_mfn(make_base(request.param))
    model.save_preset("calm", CALM)
    model.save_preset("late", {"L1/3": Clamp(20.0)}, positions="generated")
    return model


@pytest.fixture
def steered(model):
    """Logits and generated ids without steering, with `calm`, and with `late` inside of `calm`."""
    ids, found = tokens(2, 9)["input_ids"], {}
    for name, presets in {"plain": [], "calm": ["calm"], "both": ["calm", "late"]}.items():
        with model.steer(presets[0] if presets else {}), model.steer(presets[1] if presets[1:] else {}):
            found[name] = model(ids).logits.detach()
            found[f"{name}_ids"] = model.generate(ids, **GENERATE)
    assert not torch.equal(found["plain"], found["calm"])
    assert not torch.equal(found["calm_ids"], found["both_ids"])
    return found | {"ids": ids}


SCRIPT = """
folder, expected = sys.argv[1], load_file(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(model(expected["ids"]).logits, expected["calm"])
assert torch.equal(
    model.generate(expected["ids"], max_new_tokens=6, do_sample=False, eos_token_id=None), expected["calm_ids"]
)
"""


@pytest.mark.halved
def test_a_folder_that_is_only_loaded_is_steered(model, steered, tmp_path):
    model.config.active_preset = "calm"
    model.save_pretrained(tmp_path / "model")
    save_file(steered, tmp_path / "expected")
    run_without_the_plugin(SCRIPT, tmp_path, tmp_path / "model", tmp_path / "expected")
    for loaded in (model, MFNForCausalLM.from_pretrained(tmp_path / "model"), copy.deepcopy(model)):
        assert torch.equal(loaded(steered["ids"]).logits, steered["calm"])
        with loaded.steer("late"):  # acts on the result, as a nested context does
            assert torch.equal(loaded.generate(steered["ids"], **GENERATE), steered["both_ids"])
        assert torch.equal(loaded.generate(steered["ids"], **GENERATE), steered["calm_ids"])
    headless = AutoModel.from_pretrained(tmp_path / "model")
    assert torch.equal(model.lm_head(headless(steered["ids"]).last_hidden_state), steered["calm"])
    assert "calm</code> is active by default.**" in str(model_card(tmp_path / "model", "me/model"))
    model.config.active_preset = None
    assert torch.equal(model(steered["ids"]).logits, steered["plain"])
    model.save_pretrained(tmp_path / "model")
    assert "active by default" not in str(model_card(tmp_path / "model", "me/model"))


def test_changes_of_preset_weights_and_alpha_count(model, steered):
    model.config.active_preset = "calm"
    model(steered["ids"])
    model.config.active_preset = "late"
    assert torch.equal(model(steered["ids"]).logits, steered["plain"])  # it begins after the prompt
    model.config.active_preset = "calm"
    with as_base(model):
        base = model(steered["ids"]).logits
    model.config.active_preset = None
    with as_base(model):
        assert torch.equal(model(steered["ids"]).logits, base)
    model.config.active_preset = "calm"
    outer, inner = model.steer("late"), model.steer({"L0/9": Clamp(30.0)})
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    moved = model.generate(steered["ids"], **GENERATE)
    inner.__exit__(None, None, None)
    with model.steer({"L0/9": Clamp(30.0)}):
        assert torch.equal(model.generate(steered["ids"], **GENERATE), moved)
    model.prune_features(0, [5])
    model.double()
    pruned = model(steered["ids"]).logits
    model.config.active_preset = None
    with model.steer("calm"):
        assert torch.equal(model(steered["ids"]).logits, pruned)


@pytest.mark.halved
def test_a_compiled_model_is_steered_once_the_preset_is_known(model, steered):
    model.config.active_preset = "calm"
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="run the model once before it is compiled"):
        compiled(steered["ids"])
    torch._dynamo.reset()
    model(steered["ids"])
    torch.testing.assert_close(compiled(steered["ids"]).logits, steered["calm"])
    model.config.active_preset = None
    model.delete_preset("calm")
    model.save_preset("calm", {(0, 5): Clamp(60.0)})
    model.config.active_preset = "calm"  # another one of the same name
    with pytest.raises(Exception, match="run the model once before it is compiled"):
        compiled(steered["ids"])


def test_readers_of_one_task_leave_other_tasks_alone(model, steered):
    model.config.active_preset = "calm"
    first, second = evaluating(model), evaluating(model)
    with ThreadPoolExecutor(1) as thread:
        first.__enter__()
        second.__enter__()
        elsewhere = thread.submit(lambda: model(steered["ids"]).logits).result()
        first.__exit__(None, None, None)
        still_inside = model(steered["ids"]).logits
        second.__exit__(None, None, None)
    torch.testing.assert_close(elsewhere, steered["calm"])
    assert torch.equal(still_inside, steered["plain"])
    torch.testing.assert_close(model(steered["ids"]).logits, steered["calm"])


def test_readers_and_trainings_go_without_it(model, steered, tmp_path):
    windows = rows(8)
    plain = perplexity(model, windows)
    model.config.active_preset = "calm"
    assert perplexity(model, windows) == plain
    with evaluating(model):
        assert torch.equal(model(steered["ids"]).logits, steered["plain"])
    assert model.config.active_preset == "calm"
    with pytest.raises(ValueError, match="active_preset is 'calm', and a model in training must not be steered"):
        MFNTrainer(model, arguments(tmp_path), train_dataset=windows)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    torch.testing.assert_close(model(steered["ids"]).logits, steered["plain"])


def test_it_must_be_a_preset_of_the_model(model, tmp_path):
    with pytest.raises(ValueError, match="active_preset is 'shy'; it must be null or a preset: calm, late"):
        model.config.active_preset = "shy"
    model.config.active_preset = "calm"
    with pytest.raises(ValueError, match="active_preset is 'calm'; it must be null or a preset: late"):
        model.delete_preset("calm")
    assert model.config.active_preset == "calm"
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"active_preset": "shy"}))
    with pytest.raises(ValueError, match="active_preset is 'shy'"):
        MFNConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="active_preset"):
        MFNForCausalLM.from_base(make_base("llama-tied"), num_features=80, active_preset="calm")


def test_a_baked_preset_is_no_longer_active(model, steered):
    model.save_preset("soft", {"L0/5": Clamp(6.0)})
    model.config.active_preset = "soft"
    expected = model(steered["ids"]).logits
    model.bake("soft")
    assert model.config.active_preset is None
    torch.testing.assert_close(model(steered["ids"]).logits, expected)
