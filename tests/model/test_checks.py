"""Settings of any type and value are either taken or refused with a `ValueError` that names the setting."""

import copy
import time

import numpy as np
import pytest
import torch
from conftest import make_base, make_mfn, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from modeling_mfn import Ablate, Add, Clamp, MFNConfig, MFNForCausalLM, MFNTrainingArguments, Scale
from modeling_mfn.features.atlas import Label

BASE = make_base("llama-tied").config
DEEP = []
for _ in range(20_000):
    DEEP = [DEEP]
ODD = [
    None,
    True,
    "",
    "false",
    "8",
    -1,
    0,
    2.5,
    10**5000,
    float("nan"),
    float("inf"),
    [],
    [None],
    {},
    {"0": 5},
    {5: "x"},
]
ODD += [DEEP, b"8", (1, 2), {"L0/1": DEEP}, float, object(), 1j, np.float32(0.5), torch.tensor([1.0, 2.0])]
SETTINGS = (
    "text_config",
    "layers",
    "num_features",
    "k",
    "alpha",
    "codes",
    "coding_rounds",
    "refine_steps",
    "blend_into",
)
SETTINGS += ("input_norm", "decoder_bias", "shared_decoder", "steering_presets", "direction_norms", "pruned_features")
SETTINGS += ("removed_decoder_rows", "removed_encoder_rows", "mfn_version", "expansion_factor")
OPTIONS = ("lambda_recon", "lambda_aux", "named_features", "stop_gradient", "rho", "stability_pass", "rate_window")
OPTIONS += (
    "stability_strength",
    "trainable_features",
    "mfn_warmup",
    "alpha_end",
    "k_start",
    "k_shape",
    "max_steps",
    "aux_k",
)
JSON = st.recursive(
    st.sampled_from([None, True, 0, 3, -1, 2.5, "L0/1", "0", "kind", "clamp", "ablate", "value", "all", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0", "L0/1", "kind", "when"]), inner),
    max_leaves=8,
)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def refused(make, name):
    """Returns True if a value was refused, by an error that names the setting."""
    try:
        make()
    except ValueError as error:
        message = str(error)
    else:
        return False
    assert name in message
    assert len(message) < 1000
    return True


def config(**settings):
    return MFNConfig(**{"text_config": BASE, "num_features": 80, "k": 8} | settings)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_the_config(name):
    refusals = [refused(lambda value=value: config(**{name: value}), name.removesuffix("_presets")) for value in ODD]
    assert sum(refusals) > len(ODD) / 2


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_the_training(name, tmp_path):
    def make(value):
        return lambda: MFNTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **{name: value})

    assert sum(refused(make(value), name) for value in ODD) > len(ODD) / 2


def test_interventions_and_labels():
    for value in ODD:
        for kind, number in ((Clamp, "value"), (Add, "value"), (Scale, "factor")):
            refused(lambda kind=kind, value=value: kind(value), number)
        refused(lambda value=value: Ablate(when=value), "names no feature")
        refused(lambda value=value: Ablate(when="L0/1", above=value), "above")
        for name in ("feature", "label", "source", "score", "details"):
            refused(lambda name=name, value=value: Label(**{"feature": "L0/1", "label": "x", name: value}), "")
    assert Clamp(np.float32(0.5)) == Clamp(torch.tensor(0.5)) == Clamp(0.5)


@QUICK
@given(JSON)
def test_settings_from_json(value):
    for name in ("layers", "direction_norms", "pruned_features", "text_config"):
        refused(lambda name=name: config(**{name: value}), name)
    for preset in (
        value,
        {"positions": "all", "interventions": value},
        {"positions": "all", "interventions": {"L0/1": value}},
    ):
        refused(lambda preset=preset: config(steering_presets={"x": preset}), "preset 'x'")


EDITS = [("prune_features", (99, [])), ("prune_features", (0, [[1]])), ("reset_features", (DEEP, [1]))]
EDITS += [
    ("merge_features", (0, "1", [2])),
    ("compact", ("false",)),
    ("delete_preset", ([],)),
    ("set_blend", ("1",)),
    ("set_k", (DEEP,)),
]


@pytest.mark.parametrize(("edit", "arguments"), EDITS)
def test_editing_refuses_and_changes_nothing(edit, arguments):
    model = make_mfn(make_base("gpt2-tied"))
    before = copy.deepcopy(model.state_dict()), model.config.to_json_string()
    with pytest.raises(ValueError, match=r"[a-z]"):
        getattr(model, edit)(*arguments)
    assert all(torch.equal(weight, before[0][name]) for name, weight in model.state_dict().items())
    assert model.config.to_json_string() == before[1]


WRONG = {"blend_into": "mpl", "alpha": 1.5, "k": 81, "layers": [7], "decoder_bias": "false", "num_features": 7}


@pytest.mark.parametrize("name", WRONG)
def test_a_setting_that_is_changed_later(name, tmp_path):
    """Assignment and `from_pretrained` refuse as the constructor does, and leave a model that loads."""
    model = make_mfn(make_base("llama-tied"))
    model.save_pretrained(tmp_path)
    before = model.config.to_dict()
    with pytest.raises(ValueError, match="k is 8" if name == "num_features" else name):
        setattr(model.config, name, WRONG[name])
    with pytest.raises(ValueError, match="k is 8" if name == "num_features" else name):
        AutoModelForCausalLM.from_pretrained(tmp_path, **{name: WRONG[name]})
    assert model.config.to_dict() == before


def test_settings_that_fit_together_are_checked_together(tmp_path):
    model = make_mfn(make_base("gpt2-tied"))
    model.save_pretrained(tmp_path)
    changed = MFNConfig.from_pretrained(tmp_path, k=100, num_features=120, alpha=1)
    assert (changed.k, changed.num_features, changed.alpha) == (100, 120, 1.0)
    loaded = MFNForCausalLM.from_pretrained(tmp_path, k=3, alpha=0.5)
    model.config.k, model.config.alpha = 3, 0.5
    assert torch.equal(loaded(**tokens(2, 5)).logits, model(**tokens(2, 5)).logits)


def test_huge_numbers_of_layers_are_refused_at_once():
    huge = copy.deepcopy(BASE)
    huge.num_hidden_layers = 10**8
    begun = time.perf_counter()
    with pytest.raises(ValueError, match="num_hidden_layers is 100000000; it must be a whole number from 1 to 10000"):
        MFNConfig(text_config=huge, num_features=80, k=8)
    huge.num_hidden_layers = 10_000
    assert MFNConfig(text_config=huge, num_features=80, k=8, layers=list(range(10_000))).layers[-1] == 9_999
    assert time.perf_counter() - begun < 5  # a minute, were each compared with all
