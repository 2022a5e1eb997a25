"""Interventions as JSON, and as objects of another copy of the classes, act like the plugin's own objects."""

import pytest
import torch
from conftest import make_base, make_mfn, tokens
from fresh_process import run_before_the_plugin, run_without_the_plugin
from safetensors.torch import save_file

from modeling_mfn import Ablate, Add, Clamp, Scale

OBJECTS = {
    "L0/5": Clamp(4.0),
    "L2/7": Add(-1.5, when=(0, 3), above=0.25),
    "L2/9": Scale(0.5, when=(2, 9)),
    "L2/1": Ablate(),
}
JSON = {
    "L0/5": {"kind": "clamp", "value": 4.0},
    "L2/7": {"kind": "add", "value": -1.5, "when": "L0/3", "above": 0.25},
    "L2/9": {"kind": "scale", "factor": 0.5, "when": "L2/9"},
    "L2/1": {"kind": "ablate"},
}


@pytest.fixture
def model(family_base):
    return make_mfn(family_base, layers=[0, 2])


@torch.no_grad()
def logits(model, *steered):
    with model.steer(*steered):
        return model(**tokens(2, 9)).logits


def test_json_does_what_objects_do(model):
    expected = logits(model, OBJECTS)
    assert not torch.equal(expected, logits(model, {}))
    assert torch.equal(logits(model, JSON), expected)
    assert torch.equal(logits(model, {**JSON, "L0/5": Clamp(4.0)}), expected)
    by_row = [{(0, 5): {"kind": "clamp", "value": 4}}, {(0, 5): Ablate()}]
    assert torch.equal(logits(model, by_row), logits(model, [{(0, 5): Clamp(4.0)}, {(0, 5): Ablate()}]))
    model.save_preset("json", JSON, positions="prompt")
    model.save_preset("objects", OBJECTS, positions="prompt")
    presets = model.config.steering_presets
    assert presets["json"] == presets["objects"]
    assert presets["json"]["interventions"]["L2/7"] == JSON["L2/7"]
    assert model.presets["json"].interventions == OBJECTS


def test_json_is_baked_as_objects_are(model):
    wanted = {"L0/5": {"kind": "add", "value": 1.5}, "L2/1": {"kind": "scale", "factor": 0.5}}
    expected = logits(model, {(0, 5): Add(1.5), (2, 1): Scale(0.5)})
    model.bake(wanted)
    torch.testing.assert_close(logits(model, {}), expected, atol=1e-4, rtol=0)
    assert model.config.direction_norms == {"L2/1": 0.5}


class NotOurs:
    """A class that shares only its name with `Clamp`."""

    def __repr__(self):
        return "NotOurs()"


NotOurs.__name__ = "Clamp"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (4.0, r"4\.0 is not an intervention; use Clamp, Scale, Add or Ablate, or .* one of ablate, add, clamp, scale"),
        ("clamp", "'clamp' is not an intervention"),
        (Clamp, "class .*Clamp.* is not an intervention"),
        (NotOurs(), r"NotOurs\(\) is not an intervention"),
        ({"value": 4.0}, r"\{'value': 4\.0\} is not an intervention; .* one of ablate, add, clamp, scale"),
        ({"kind": "push", "value": 4.0}, "'push', .* is not an intervention; .* one of ablate, add, clamp, scale"),
        (
            {"kind": "clamp", "factor": 4.0},
            r"\{'factor': 4\.0, 'kind': 'clamp'\} is not an intervention; it needs \['value'\], and may have",
        ),
        ({"kind": "ablate", "value": 4.0}, r"it needs \[\], and may have when and above"),
        ({"kind": "clamp", "value": "4"}, "value of Clamp is '4'; it must be a finite number"),
        ({"kind": "clamp", "value": float("inf")}, "value of Clamp is inf; it must be a finite number"),
        ({"kind": "ablate", "above": 0.5}, r"above is 0\.5; it must be at least 0, and belongs to a feature"),
        ({"kind": "ablate", "when": "5/3"}, "'5/3' names no feature"),
        ({"kind": "ablate", "when": "L2/3"}, "L0/5 waits for a later layer"),
        ({"kind": "ablate", "when": "L0/80"}, "L0/80 does not exist"),
    ],
)
def test_what_is_no_intervention_is_refused_by_all_that_take_one(given, message):
    model = make_mfn(make_base("llama-tied"), layers=[0, 2])
    before = model.config.to_json_string()
    for take in (model.steer, model.bake, lambda w: model.save_preset("x", w), lambda w: model.steer([{}, w])):
        with pytest.raises(ValueError, match=message):
            take({"L0/5": given})
    assert model.config.to_json_string() == before


LOADED = """
folder, expected = sys.argv[1], load_file(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = expected["input_ids"]
def check(interventions):
    with model.steer(interventions), torch.no_grad():
        assert torch.equal(model(ids).logits, expected["steered"])
"""
WITHOUT = f"""
check({JSON!r})
"""
BESIDE = """
from modeling_mfn import Ablate, Add, Clamp, FeatureAtlas, MFNForCausalLM, Scale
assert not isinstance(model, MFNForCausalLM)
wanted = {
    "L0/5": Clamp(4.0),
    "L2/7": Add(-1.5, when=(0, 3), above=0.25),
    "L2/9": Scale(0.5, when=(2, 9)),
    "L2/1": Ablate(),
}
check(wanted)
model.save_preset("packaged", wanted)
check("packaged")
ours = MFNForCausalLM.from_pretrained(folder)
ours.save_preset("remote", model.presets["packaged"].interventions)
assert ours.config.steering_presets["remote"] == model.config.steering_presets["packaged"]
assert type(ours.presets["remote"].interventions["L0/5"]) is Clamp
model.bake({(0, 5): Scale(0.5)})
assert model.config.direction_norms == {"L0/5": 0.5}
class Negate(Clamp):
    pass
try:
    model.steer({(0, 5): Negate(1.0)})
except ValueError as error:
    assert "Negate(1.0) is not an intervention; use Clamp, Scale, Add or Ablate" in str(error), error
else:
    raise SystemExit("took an intervention that its code does not know")
"""


@pytest.mark.parametrize(
    ("base", "run", "script"),
    [("llama-tied", run_without_the_plugin, WITHOUT), ("gpt2-tied", run_before_the_plugin, BESIDE)],
    ids=["not installed", "imported beside the model's code"],
)
def test_a_model_with_its_own_code(base, tmp_path, run, script):
    """Steers a model that runs its own code, without the plugin and next to it.

    The classes of the plugin are not those of the model.
    """
    model = make_mfn(make_base(base), layers=[0, 2])
    model.save_pretrained(tmp_path / "model")
    ids = tokens(2, 9)["input_ids"]
    save_file({"input_ids": ids, "steered": logits(model, OBJECTS)}, tmp_path / "expected")
    run(LOADED + script, tmp_path, tmp_path / "model", tmp_path / "expected")
