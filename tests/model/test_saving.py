"""Saved models load unchanged: with Auto classes, without the plugin, in shards, with a device map.

Damaged or incompatible checkpoints raise an error that names the cause.
"""

import json

import pytest
import torch
from conftest import make_base, make_mfn, tokens
from fresh_process import IMPORTS, run_fresh, run_without_the_plugin
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline

import modeling_mfn
from modeling_mfn import MFNConfig, MFNForCausalLM, MFNModel


@pytest.fixture
def saved(base, tmp_path):
    model = make_mfn(base, layers=[0, 2])
    model.set_blend(0.75)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_the_auto_classes_give_the_same_logits(saved):
    model, folder = saved
    batch = tokens(2, 9)
    logits = model(**batch).logits
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is MFNForCausalLM
    assert torch.equal(loaded(**batch).logits, logits)
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is MFNConfig
    assert config.to_dict() == loaded.config.to_dict()
    headless = AutoModel.from_pretrained(folder)
    assert type(headless) is MFNModel
    assert torch.equal(headless(**batch).last_hidden_state, model.model(**batch).last_hidden_state)
    again = folder.parent / "again"
    loaded.save_pretrained(again)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(again)(**batch).logits, logits)


SCRIPT = """
folder, expected = sys.argv[1], load_file(sys.argv[2])
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError:
    pass
else:
    raise SystemExit("loaded code without trust")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(model(expected["input_ids"]).logits, expected["logits"]), "logits"
assert model.generate(expected["input_ids"], max_new_tokens=3, do_sample=False).shape[1] > 9
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).k == model.config.k
headless = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(model.lm_head(headless(expected["input_ids"]).last_hidden_state), expected["logits"]), "headless"
model.save_pretrained(folder + "-again")
again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
assert torch.equal(again(expected["input_ids"]).logits, expected["logits"]), "saved again"
assert not any(name.partition(".")[0] == "modeling_mfn" for name in sys.modules)
"""


@pytest.mark.parametrize(("base", "codes"), [("llama-tied", "stream"), ("gpt2-tied", "update")])
def test_a_fresh_process_without_the_plugin_loads_it_as_remote_code(base, codes, tmp_path):
    from safetensors.torch import save_file

    model = make_mfn(make_base(base), layers=[0, 2], codes=codes)
    model.save_pretrained(tmp_path / "model")
    ids = tokens(2, 9)["input_ids"]
    save_file({"input_ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "expected")
    run_without_the_plugin(SCRIPT, tmp_path, tmp_path / "model", tmp_path / "expected")


@pytest.mark.halved
@pytest.mark.parametrize("base", ["llama-tied", "gpt2-untied"], indirect=True)
def test_a_model_as_working_directory(saved):
    """Its code lies beside the script, where Python looks first."""
    _, folder = saved
    run_fresh(
        IMPORTS
        + """
import modeling_mfn
model = modeling_mfn.MFNForCausalLM.from_pretrained(".")
assert model.config.auto_map["AutoModelForCausalLM"].partition(".")[0] + ".py" in os.listdir()
assert type(AutoModelForCausalLM.from_pretrained(".")) is modeling_mfn.MFNForCausalLM
remote = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
from modeling_mfn.cli.main import main
""",
        folder,
    )


def test_text_generation_pipeline(saved, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    model, folder = saved
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0").save_pretrained(folder)
    generate = pipeline("text-generation", model=str(folder))
    found = generate("w5 w6 w7", max_new_tokens=4, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert list(found) == expected[0].tolist()


def test_ways_to_load(saved, tmp_path):
    model, folder = saved
    batch = tokens(2, 9)
    logits = model(**batch).logits
    with torch.device("meta"):
        assert MFNForCausalLM(model.config).device.type == "meta"
    on_device = MFNForCausalLM.from_pretrained(folder, device_map="auto", low_cpu_mem_usage=True)
    assert torch.equal(on_device(**batch).logits, logits)
    for layer in on_device.mfn_layers.values():
        assert {parameter.device.type for parameter in layer.parameters()} == {"cpu"}
    model.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(MFNForCausalLM.from_pretrained(tmp_path / "shards")(**batch).logits, logits)
    for dtype in ("bfloat16", torch.bfloat16):
        low = MFNForCausalLM.from_pretrained(folder, dtype=dtype)
        assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
        assert low.config.alpha == 0.75
        low.set_blend(0.0)
        assert torch.isfinite(low(**batch).logits).all()


def test_missing_mfn_weights_start_as_a_conversion_does(family_base):
    """Loads a state dict without MFN weights. The layers start with unit-norm directions and tied encoders."""
    model = make_mfn(family_base)
    weights = {name: value for name, value in model.state_dict().items() if ".mfn." not in name}
    loaded = MFNForCausalLM.from_pretrained(None, config=model.config, state_dict=weights)
    for layer in loaded.mfn_layers.values():
        torch.testing.assert_close(layer.decoder.weight.norm(dim=-1), torch.ones(80))
        assert torch.equal(layer.encoder.weight, layer.decoder.weight)
        assert not layer.encoder.bias.any()
    loaded.set_blend(0.0)
    assert torch.equal(loaded(**tokens(2, 9)).logits, family_base(**tokens(2, 9)).logits)


def test_damaged_checkpoints_are_named(saved, tmp_path):
    model, folder = saved
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for size in (len(whole) // 2, 4, 0):
        weights.write_bytes(whole[:size])
        for auto_class in (MFNForCausalLM, AutoModelForCausalLM, AutoModel):
            with pytest.raises(OSError, match=f"weights of {folder} are truncated"):
                auto_class.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        MFNForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    gone = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(OSError, match=gone.name):
        MFNForCausalLM.from_pretrained(tmp_path / "shards")


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", '"text"', "the config of {folder} is ('text'; it must be a mapping|damaged)"),
        ("config.json", "null", "the config of {folder} is damaged"),
        ("config.json", "{{}}", "the config of {folder} has no model_type"),
        ("config.json", '{{"model_type": "mfn", "k": 0{rest}', "{folder}: k is 0; it must be"),
        ("config.json", DEEP, "the config of {folder} is damaged: maximum recursion"),
        (
            "config.json",
            '{{"model_type": "mfn", "dtype": "flot32"{rest}',
            "dtype is 'flot32'; it must be a type of torch",
        ),
        ("config.json", '{{"model_type": "mfn", "dtype": [1]{rest}', r"dtype is \[1\]; it must be"),
        ("config.json", '{{"model_type": "mfn", "id2label": 1.5{rest}', "id2label is 1.5; "),
        ("generation_config.json", "1.5", "{folder}/generation_config.json is damaged"),
        ("generation_config.json", '{{"pad_token_id": [0]}}', "{folder}/generation_config.json is damaged"),
    ],
)
def test_settings_of_wrong_types_are_named(saved, name, text, message):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    rest = "".join(f", {json.dumps(key)}: {json.dumps(config[key])}" for key in ("num_features", "text_config")) + "}"
    (folder / name).write_text(text.format(rest=rest))
    with pytest.raises(ValueError, match=message.format(folder=folder)):
        MFNForCausalLM.from_pretrained(folder)


def test_a_config_of_a_newer_major_version_is_refused(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    assert config["mfn_version"] == modeling_mfn.__version__
    newer = int(modeling_mfn.__version__.split(".")[0]) + 1
    config["mfn_version"] = f"{newer}.0.0"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"modeling_mfn {newer}\.0\.0.*upgrade"):
        MFNForCausalLM.from_pretrained(folder)
