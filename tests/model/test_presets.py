"""Presets: saved as JSON in the model's config, and checked when they are saved and loaded."""

import json

import pytest
import torch
from conftest import make_base, make_mfn, tokens
from fresh_process import run_without_the_plugin
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline

from modeling_mfn import Ablate, Add, Clamp, MFNForCausalLM, Scale

CALM = {
    (0, 5): Clamp(4.0),
    "L2/7": Add(-1.5, when=(0, 3), above=0.25),
    (2, 9): Scale(0.5, when=(2, 9)),
    "L2/1": Ablate(),
}


@pytest.fixture
def model():
    model = make_mfn(make_base("llama-tied"), layers=[0, 2])
    model.save_preset("calm", CALM)
    model.save_preset("late", {(0, 5): Clamp(9.0)}, positions="generated")
    return model


def test_a_preset_steers_as_its_interventions_do(model):
    batch = tokens(2, 9)
    with model.steer(CALM):
        expected = model(**batch).logits
    with model.steer("calm"):
        assert torch.equal(model(**batch).logits, expected)
    unsteered = model(**batch).logits
    assert not torch.equal(unsteered, expected)
    with model.steer("late"):  # it begins after the prompt
        assert torch.equal(model(**batch).logits, unsteered)
    with model.steer([model.presets["calm"].interventions, {}]):
        torch.testing.assert_close(model(**batch).logits[0], expected[0])
    with model.steer("late", positions="prompt"):
        moved = model(**batch).logits
    assert not torch.equal(moved, unsteered)
    with model.steer(model.presets["late"].interventions):
        assert torch.equal(model(**batch).logits, moved)
    assert model.presets["late"].positions == "generated"
    model.delete_preset("late")
    assert set(model.presets) == {"calm"}
    with pytest.raises(ValueError, match="no preset 'late'; this model has calm"):
        model.steer("late")


SCRIPT = """
folder, expected = sys.argv[1], load_file(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
with model.steer("calm"):
    assert torch.equal(model(expected["input_ids"]).logits, expected["calm"]), "calm"
with model.steer("late"):
    generated = model.generate(expected["input_ids"], max_new_tokens=6, do_sample=False, eos_token_id=None)
assert torch.equal(generated, expected["late"]), "late"
model.save_preset("own", model.presets["calm"].interventions, positions="prompt")
model.bake({"L0/5": {"kind": "clamp", "value": 2.0}})
model.save_pretrained(folder + "-again")
"""


def test_presets_travel_with_the_model_with_and_without_the_plugin(model, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "model"
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())["steering_presets"]
    assert written["calm"]["interventions"]["L2/7"] == {"kind": "add", "value": -1.5, "when": "L0/3", "above": 0.25}
    assert written["late"] == {"positions": "generated", "interventions": {"L0/5": {"kind": "clamp", "value": 9.0}}}
    ids = tokens(2, 9)["input_ids"]
    with model.steer("calm"):
        calm = model(ids).logits.detach()
    with model.steer("late"):
        late = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert not torch.equal(late, model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None))
    headless = AutoModel.from_pretrained(folder)
    with headless.steer("calm"):
        assert torch.equal(model.lm_head(headless(ids).last_hidden_state), calm)
    save_file({"input_ids": ids, "calm": calm, "late": late}, tmp_path / "expected")
    run_without_the_plugin(SCRIPT, tmp_path, folder, tmp_path / "expected")
    again = MFNForCausalLM.from_pretrained(f"{folder}-again")
    assert again.presets == {**model.presets, "own": (model.presets["calm"].interventions, "prompt")}
    assert again.config.direction_norms == {"L0/5": 0.0}
    with model.steer({(0, 5): Clamp(2.0)}):
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_steering_in_a_pipeline(model, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0", padding_side="left")
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with model.steer([{(0, 5): Clamp(9.0)}, {(0, 5): Clamp(-9.0)}], positions="generated"):
        found = generate(["w5 w6 w7", "w9 w8 w9"], batch_size=2, return_tensors=True, **arguments)
    for ids, value, each in zip(([5, 6, 7], [9, 8, 9]), (9.0, -9.0), found, strict=True):
        with model.steer({(0, 5): Clamp(value)}, positions="generated"):
            expected = model.generate(torch.tensor([ids]), **arguments)
        assert list(each[0]["generated_token_ids"]) == expected[0].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("calm", {}), "preset 'calm' already"),
        (("", {}), "'' is not a name"),
        (("a\nb", {}), r"'a\\nb' is not a name"),
        (("dtype", CALM), "do not keep the name 'dtype'"),
        (("_auto_class", CALM), "do not keep the name '_auto_class'"),
        (("rows", [{(0, 5): Ablate()}, {}]), "not a mapping of features to interventions, for every row alike"),
        (("mask", CALM, torch.ones(2, 6, dtype=torch.bool)), "a mask belongs to one batch"),
        (("where", CALM, "promt"), "'promt'; they can be all, prompt, generated"),
        (("far", {(1, 5): Ablate()}), "block 1 has no MFN layer"),
        (("far", {(0, 5): Ablate(when=(0, 80))}), "L0/80 does not exist"),
        (("number", {(0, 5): 4.0}), r"4\.0 is not an intervention"),
    ],
)
def test_what_cannot_be_kept_changes_nothing(model, arguments, message):
    before = model.config.to_json_string()
    with pytest.raises(ValueError, match=message):
        model.save_preset(*arguments)
    assert model.config.to_json_string() == before


def intervention(**settings):
    return {"positions": "all", "interventions": {"L0/5": settings}}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([], r"steering_presets is \[\]"),
        ({"x": {"interventions": {}}}, "preset 'x': .* does not hold just positions and interventions"),
        ({"x": {"positions": ["all"], "interventions": {}}}, r"preset 'x': positions of a preset are \['all'\]"),
        ({"x": {"positions": "all", "interventions": []}}, "preset 'x': interventions are .*not a mapping"),
        ({"x": intervention(kind="push", value=1.0)}, "preset 'x': .*kind must be one of ablate, add, clamp, scale"),
        ({"x": intervention(kind="clamp")}, r"preset 'x': .*it needs \['value'\]"),
        ({"x": intervention(kind="clamp", value=1.0, code="1")}, r"preset 'x': .*it needs \['value'\]"),
        (
            {"x": intervention(kind="clamp", value="4")},
            "preset 'x': value of Clamp is '4'; it must be a finite",
        ),
        (
            {"x": intervention(kind="clamp", value=float("nan"))},
            "preset 'x': value of Clamp is nan; it must be",
        ),
        ({"x": intervention(kind="ablate", when="L2/1")}, "preset 'x': .*L0/5 waits for a later layer"),
        ({"x": {"positions": "all", "interventions": {"L0/80": {"kind": "ablate"}}}}, "preset 'x': L0/80 does not"),
        ({"a\nb": intervention(kind="ablate")}, "is not a name for a preset"),
    ],
)
def test_a_config_with_a_preset_that_the_model_cannot_have(model, tmp_path, written, message):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"steering_presets": written}))
    for auto_class in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=message):
            auto_class.from_pretrained(folder)
